"""The loop: optimiser steps, learning rates, validations and early stopping."""

import math
import time
import types

import pytest
import torch

from raydistill.config.run import Loss, Training
from raydistill.data.batching import Examples, split_by_tokens
from raydistill.models import families
from raydistill.training import loop
from raydistill.training.distillation import DistillationStep
from raydistill.training.loop import (
    NonFiniteLoss,
    clip_and_step,
    fit,
    learning_rate_factor,
    make_optimizer,
    read_step_inputs,
    train_step,
)
from raydistill.training.workers import Worker
from tests.factories.training import (
    SETTINGS,
    fit_and_record,
    flat_weights,
    no_report,
    relative_distance,
    rising_scores,
    tiny_distillation,
)


def sgd_step(distillation, settings):
    """One SGD step over six rows; returns the means of the loss terms and the weights after the step."""
    parameters = [p for p in distillation.student.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    inputs = read_step_inputs(distillation, list(range(6)), settings, Worker())
    means = train_step(distillation, inputs, settings, Worker(), None, parameters, optimizer)
    return {name: float(value) for name, value in means.items()}, flat_weights(distillation.student)


@pytest.mark.parametrize("size", ["2-2", "1-2"])
def test_micro_batches_give_the_step_of_the_whole_batch(size, tmp_path):
    settings = Training(batch_size=6, gradient_clip=1e9)
    start = flat_weights(tiny_distillation("bart", tmp_path / "t", size).student)
    means, whole = sgd_step(tiny_distillation("bart", tmp_path / "t", size), settings)
    micro_means, split = sgd_step(
        tiny_distillation("bart", tmp_path / "t", size), settings.model_copy(update={"accumulation": 4})
    )
    assert micro_means == pytest.approx(means, rel=1e-5)
    assert relative_distance(split - start, whole - start) < 1e-5


def test_gradients_are_clipped_to_the_configured_norm(tmp_path):
    start = flat_weights(tiny_distillation("bart", tmp_path / "t").student)
    _, after = sgd_step(tiny_distillation("bart", tmp_path / "t"), Training(batch_size=6, gradient_clip=0.5))
    assert float((after - start).norm()) == pytest.approx(0.1 * 0.5, rel=1e-3)  # learning rate times norm


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_clip_and_step_equals_clipping_before_the_step(kind, max_norm):
    torch.manual_seed(0)
    start = [torch.randn(4, 3), torch.randn(5)]
    gradients = [[torch.randn_like(p) for p in start] for _ in range(3)]
    settings = Training(optimizer=kind, learning_rate=0.1, weight_decay=0.1)

    def weights_after(take_step):
        parameters = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = make_optimizer(parameters, settings)
        for step_gradients in gradients:
            for p, gradient in zip(parameters, step_gradients, strict=True):
                p.grad = gradient.clone()
            take_step(optimizer, parameters)
        return torch.cat([p.detach().flatten() for p in parameters])

    def clip_then_step(optimizer, parameters):
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()

    combined = weights_after(lambda optimizer, parameters: clip_and_step(optimizer, parameters, max_norm))
    torch.testing.assert_close(combined, weights_after(clip_then_step))


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_math_attention_kernel_gives_the_gradients_of_the_fused_one(family, tmp_path, monkeypatch):
    """In bf16 on a CPU, the two kernels differ less from each other than from float32."""

    def gradient(max_tokens, precision):
        monkeypatch.setattr(loop, "MATH_ATTENTION_MAX_TOKENS", max_tokens)
        distillation = tiny_distillation(family, tmp_path / "t")
        parameters = [p for p in distillation.student.parameters() if p.requires_grad]
        inputs = read_step_inputs(distillation, list(range(6)), Training(batch_size=6), Worker())
        settings, optimizer = Training(gradient_clip=1e9), torch.optim.SGD(parameters)
        train_step(distillation, inputs, settings, Worker(), precision, parameters, optimizer)
        return torch.cat([p.grad.flatten() for p in parameters])

    plain, fused, exact = gradient(128, torch.bfloat16), gradient(0, torch.bfloat16), gradient(0, None)
    assert 0 < relative_distance(plain, fused) < 0.7 * relative_distance(fused, exact)


def test_gpu_micro_batches_scale_with_the_gpu_share_and_discount_source_tokens():
    examples = Examples([[1] * 400] * 64, [[1] * 25] * 64, list(range(64)))

    def sizes(gpus, shared, targets=25):
        with_targets = Examples(examples.sources, [[1] * targets] * 64, examples.source_indices)
        distillation = types.SimpleNamespace(encoder_shared=shared)
        limits = loop.micro_batch_limits(distillation, Training(gpus=gpus), Worker(device="cuda:0"))
        return [len(part) for part in split_by_tokens(range(64), with_targets, *limits)]

    assert sizes(1, True) == [64]  # 64 * (100 + 25) = 8,000 of 16,384
    assert sizes(0.25, True) == [32, 32]  # 32 * 125 = 4,000 of 4,096
    assert sizes(1, False) == [38, 26]  # 38 * 425 = 16,150
    assert sizes(1, True, targets=512) == [26, 26, 12]  # 26 * 612 = 15,912
    assert loop.micro_batch_limits(None, Training(gpus=0.25), Worker()) == (16_384, 1.0)
    configured = Training(gpus=0.25, micro_tokens=999)
    assert loop.micro_batch_limits(None, configured, Worker(device="cuda:0")) == (999, 1.0)


def test_learning_rate_factors_match_values_computed_by_hand():
    linear = Training(warmup_steps=4)
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]
    assert [learning_rate_factor(s, linear, 10) for s in range(11)] == pytest.approx(expected)
    constant = Training(warmup_steps=2, schedule="constant")
    assert [learning_rate_factor(s, constant, 10) for s in (0, 1, 2, 9)] == [0.5, 1.0, 1.0, 1.0]
    none = Training(warmup_steps=0)
    assert [learning_rate_factor(s, none, 4) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    longer_than_the_run = Training(warmup_steps=500)  # warm-up takes at most half of the run
    assert [learning_rate_factor(s, longer_than_the_run, 4) for s in range(4)] == [0.5, 1.0, 1.0, 0.5]


def test_number_of_steps_ignores_floating_point_noise(tmp_path):
    distillation = tiny_distillation("bart", tmp_path / "t", n=10)
    settings = SETTINGS.model_copy(update={"batch_size": 1, "epochs": 1.1, "checks_per_epoch": 1})
    _, state = fit_and_record(distillation, settings, tmp_path / "run")
    assert state.step == 11  # 1.1 * 10 is 11.000000000000002


def scripted_scores(distillation, scores):
    """A validation that saves the weights and gives the next of `scores`."""
    save_and_count = rising_scores(distillation)

    def validate(folder):
        return {"score": scores[int(save_and_count(folder)["score"]) - 1]}

    return validate


@pytest.mark.parametrize(
    ("patience", "scores", "checks", "best"),
    [
        (2, [1, 3, 2, 3, 9, 9, 9, 9], 4, 2),  # an equal score is not an improvement
        (3, [5, 4, 3, 2, 9, 9, 9, 9], 4, 1),
        (2, [1, 2, 1, 3, 2, 4, 1, 5], 8, 8),
        (None, [4, 3, 2, 1, 9, 9, 9, 9], 3, 1),  # the default patience is the validations of an epoch: 2
    ],
)
def test_training_stops_when_patience_runs_out_and_keeps_the_best_checkpoint(patience, scores, checks, best, tmp_path):
    distillation = tiny_distillation("bart", tmp_path / "t", n=8)
    # 4 steps per epoch, a validation after every second step
    settings = SETTINGS.model_copy(update={"patience": patience, "epochs": 4, "checks_per_epoch": 2})
    weights_at_validation = []
    state = fit_and_record(
        distillation,
        settings,
        tmp_path / "run",
        report=lambda m, f: weights_at_validation.append(flat_weights(distillation.student)),
        validate=scripted_scores(distillation, scores),
    )[1]
    assert (len(state.history), state.best_step, state.best_score) == (checks, 2 * best, scores[best - 1])
    checkpoints = list((tmp_path / "run").glob("checkpoint-*"))
    assert [p.name for p in checkpoints] == [f"checkpoint-{2 * best}"]
    assert torch.equal(torch.load(checkpoints[0] / "weights.pt"), weights_at_validation[best - 1])
    again = tiny_distillation("bart", tmp_path / "t", n=8)
    resumed = fit(again, settings, scripted_scores(again, [99]), tmp_path / "run", no_report)
    assert resumed.step == state.step  # a stopped run stays stopped


def test_nan_loss_ends_the_run(tmp_path):
    distillation = tiny_distillation("bart", tmp_path / "t")
    with torch.no_grad():
        distillation.student.get_decoder().layers[0].fc1.weight.fill_(math.nan)
    with pytest.raises(NonFiniteLoss, match="the loss is nan at step 1; try a lower learning rate"):
        fit_and_record(distillation, SETTINGS, tmp_path / "run")


def test_nan_metric_ends_the_run(tmp_path):
    distillation = tiny_distillation("bart", tmp_path / "t")
    with pytest.raises(NonFiniteLoss, match="val_loss is nan"):
        fit_and_record(
            distillation, SETTINGS, tmp_path / "run", validate=lambda f: {"score": 0.0, "val_loss": math.nan}
        )


def test_step_time_includes_waiting_for_the_loss_values():
    """On a GPU a step returns before its work is done; here the values arrive late."""

    class Late:
        def __truediv__(self, steps):
            time.sleep(0.1)
            return torch.tensor(3.0) / steps

    losses = loop._RunningMeans()
    losses.add({"loss": Late()}, time.monotonic() - 1.0, 0.25)
    means = losses.pop(Worker())
    assert means["loss"] == 3.0
    assert means["step_ms"] >= 1100
    assert means["data_wait"] == pytest.approx(250 / means["step_ms"])


@pytest.mark.parametrize("family", ["bart", "marian", "t5"])
def test_training_does_not_change_frozen_parts_and_teacher(family, tmp_path):
    distillation = tiny_distillation(family, tmp_path / "t", dropout=0.3)
    teacher, student = distillation.teacher, distillation.student
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    teacher_before = flat_weights(teacher)
    fit_and_record(distillation, SETTINGS, tmp_path / "run")
    frozen = ("shared.", "embed_tokens.", "embed_positions.", "lm_head.", "encoder.")
    for name, parameter in student.named_parameters():
        if not name.endswith("k_proj.bias"):  # a softmax does not depend on this bias
            assert torch.equal(parameter, before[name]) == any(part in name for part in frozen), name
    assert torch.equal(flat_weights(teacher), teacher_before)
    assert all(p.grad is None for p in teacher.parameters())
    assert not teacher.training


def test_dropout_depends_on_the_seed_alone(tmp_path):
    """Dropout has to act in the loop: tests of resuming rely on it."""
    with_dropout, _ = fit_and_record(tiny_distillation("bart", tmp_path / "t", dropout=0.3), SETTINGS, tmp_path / "a")
    other_seed, _ = fit_and_record(
        tiny_distillation("bart", tmp_path / "t", dropout=0.3), SETTINGS.model_copy(update={"seed": 1}), tmp_path / "b"
    )
    again, _ = fit_and_record(tiny_distillation("bart", tmp_path / "t", dropout=0.3), SETTINGS, tmp_path / "c")
    assert with_dropout == again
    assert with_dropout != other_seed


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("frozen_embeddings", [True, False])
def test_dropout_does_not_act_on_a_frozen_encoder(family, frozen_embeddings, tmp_path):
    distillation = tiny_distillation(family, tmp_path / "t", dropout=0.5)
    if not frozen_embeddings:
        for parameter in families.embedding_parameters(distillation.student):
            parameter.requires_grad_(True)
        distillation = DistillationStep(
            distillation.student,
            None,
            distillation.examples,
            "sft",
            Loss(),
            distillation.layer_plan,
            encoder_shared=False,
        )
    loop._set_train_mode(distillation)
    ids = torch.tensor([distillation.examples.sources[0]])
    mask = torch.ones_like(ids)
    encoded = [families.encode(distillation.student, ids, mask).last_hidden_state for _ in range(2)]
    assert torch.equal(*encoded)
    decoded = [families.decode(distillation.student, ids, encoded[0], mask).last_hidden_state for _ in range(2)]
    assert not torch.equal(*decoded)


def test_dropout_acts_on_a_trained_encoder(tmp_path):
    distillation = tiny_distillation("bart", tmp_path / "t", "1-2", dropout=0.5)
    loop._set_train_mode(distillation)
    ids = torch.tensor([distillation.examples.sources[0]])
    mask = torch.ones_like(ids)
    encoded = [families.encode(distillation.student, ids, mask).last_hidden_state for _ in range(2)]
    assert not torch.equal(*encoded)
