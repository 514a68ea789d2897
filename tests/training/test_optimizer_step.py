"""One optimiser step: micro-batches, clipping, the attention kernel and the learning rate."""

import pytest
import torch

from raydistill.config.run import Training
from raydistill.data.batching import Examples, epoch_batches, split_by_tokens
from raydistill.training import optimizer_step
from raydistill.training.distillation import DistillationStep
from raydistill.training.optimizer_step import (
    OptimizerStep,
    clip_and_step,
    learning_rate_factor,
    make_optimizer,
    micro_batch_limits,
    parameter_groups,
    trainable_parameters,
)
from raydistill.training.workers import Worker
from tests.factories.training import flat_weights, relative_distance, tiny_distillation


def sgd_step(distillation, settings):
    """One SGD step over six rows; returns the means of the loss terms and the weights after the step."""
    optimizer = torch.optim.SGD(trainable_parameters(distillation.student), lr=0.1)
    step = OptimizerStep(distillation, settings, optimizer)
    means = step.run(step.read_inputs(range(6)))
    return {name: float(value) for name, value in means.items()}, flat_weights(distillation.student)


def test_batches_are_read_ahead_of_their_steps_in_the_order_of_the_steps(tmp_path, monkeypatch):
    distillation = tiny_distillation("bart", tmp_path / "t")
    settings = Training(batch_size=2, precision="fp32", seed=3)
    step = OptimizerStep.create(distillation, settings)
    total, events = 20, []
    monkeypatch.setattr(DistillationStep, "read_ahead", lambda self, batch: events.append(("ahead", tuple(batch))))
    monkeypatch.setattr(DistillationStep, "read_batch", lambda self, batch: events.append(("read", tuple(batch))))
    assert len(list(step.iter_inputs(0, total))) == total
    ahead, read = ([rows for kind, rows in events if kind == name] for name in ("ahead", "read"))
    lengths = optimizer_step.effective_lengths(distillation.examples)
    epochs = [epoch_batches(lengths, 2, 3, epoch) for epoch in range(7)]
    assert ahead == read == [tuple(batch) for batches in epochs for batch in batches][:total]
    for n, position in enumerate(i for i, (kind, _) in enumerate(events) if kind == "read"):
        num_ahead = sum(kind == "ahead" for kind, _ in events[:position])
        assert num_ahead == min(total, n + 1 + optimizer_step.READ_AHEAD_STEPS)
    events.clear()
    list(step.iter_inputs(7, total))
    assert [rows for kind, rows in events if kind == "read"] == read[7:]


@pytest.mark.parametrize("size", ["2-2", "1-2"])
def test_micro_batches_give_the_step_of_the_whole_batch(size, tmp_path):
    settings = Training(batch_size=6, gradient_clip=1e9, precision="fp32")
    start = flat_weights(tiny_distillation("bart", tmp_path / "t", size).student)
    means, whole = sgd_step(tiny_distillation("bart", tmp_path / "t", size), settings)
    micro_means, split = sgd_step(
        tiny_distillation("bart", tmp_path / "t", size), settings.model_copy(update={"accumulation": 4})
    )
    assert micro_means == pytest.approx(means, rel=1e-5)
    assert relative_distance(split - start, whole - start) < 1e-5


def test_gradients_are_clipped_to_the_configured_norm(tmp_path):
    start = flat_weights(tiny_distillation("bart", tmp_path / "t").student)
    _, after = sgd_step(
        tiny_distillation("bart", tmp_path / "t"), Training(batch_size=6, gradient_clip=0.5, precision="fp32")
    )
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


def test_adafactor_steps_by_the_learning_rate_whatever_the_size_of_the_weights():
    """The released recipe: `scale_parameter=False, relative_step=False` (lightning_base.py of transformers 3).

    The second moment of a gradient whose squares are an outer product is exact, so that the first update has the
    magnitude of the learning rate for each weight. With scaled steps it would be 50 times smaller here.
    """
    torch.manual_seed(0)
    start = 0.02 * torch.randn(4, 3)
    signs = torch.randn(4, 3).sign()
    weights = torch.nn.Parameter(start.clone())
    weights.grad = signs * torch.outer(torch.rand(4) + 0.5, torch.rand(3) + 0.5)
    make_optimizer([weights], Training(optimizer="adafactor", learning_rate=1e-3)).step()
    torch.testing.assert_close(weights.detach(), start - 1e-3 * signs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_encoder_layers_have_their_own_learning_rate(family, tmp_path):
    """The first step of AdamW changes each weight by the learning rate, in the direction of the gradient's sign."""
    settings = Training(batch_size=6, learning_rate=1e-3, encoder_learning_rate=1e-4, adam_eps=1e-20, precision="fp32")
    distillation = tiny_distillation(family, tmp_path / "t", "1-2")
    student = distillation.student
    before = {name: p.detach().clone() for name, p in student.named_parameters() if p.requires_grad}
    step = OptimizerStep.create(distillation, settings)
    step.run(step.read_inputs(range(6)))
    largest = {name: float((student.get_parameter(name).detach() - old).abs().max()) for name, old in before.items()}
    encoder = {name for name in largest if name.startswith(("encoder.", "model.encoder."))}
    assert encoder
    assert encoder < largest.keys()
    for name, change in largest.items():
        assert change == pytest.approx(1e-4 if name in encoder else 1e-3, rel=0.02), name


def test_a_frozen_encoder_has_no_group(tmp_path):
    distillation = tiny_distillation("bart", tmp_path / "t", "2-2")
    assert not any(p.requires_grad for p in distillation.student.get_encoder().parameters())
    [group] = parameter_groups(distillation.student, Training(encoder_learning_rate=1e-4))
    assert len(group["params"]) == len(trainable_parameters(distillation.student))


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_math_attention_kernel_gives_the_gradients_of_the_fused_one(family, tmp_path, monkeypatch):
    """In bf16 on a CPU, the two kernels differ less from each other than from float32."""

    def gradient(max_tokens, precision):
        monkeypatch.setattr(optimizer_step, "MATH_ATTENTION_MAX_TOKENS", max_tokens)
        distillation = tiny_distillation(family, tmp_path / "t")
        parameters = trainable_parameters(distillation.student)
        settings = Training(batch_size=6, gradient_clip=1e9, precision=precision)
        step = OptimizerStep(distillation, settings, torch.optim.SGD(parameters))
        step.run(step.read_inputs(range(6)))
        return torch.cat([p.grad.flatten() for p in parameters])

    plain, fused, exact = gradient(128, "bf16"), gradient(0, "bf16"), gradient(0, "fp32")
    assert 0 < relative_distance(plain, fused) < 0.7 * relative_distance(fused, exact)


def test_gpu_micro_batches_scale_with_the_gpu_share_and_discount_source_tokens():
    examples = Examples([[1] * 400] * 64, [[1] * 25] * 64, list(range(64)))

    def sizes(gpus, encoder_shared, targets=25):
        with_targets = Examples(examples.sources, [[1] * targets] * 64, examples.source_indices)
        limits = micro_batch_limits(Training(gpus=gpus), Worker(device="cuda:0"), encoder_shared)
        return [len(part) for part in split_by_tokens(range(64), with_targets, *limits)]

    assert sizes(1, True) == [64]  # 64 * (100 + 25) = 8,000 of 16,384
    assert sizes(0.25, True) == [32, 32]  # 32 * 125 = 4,000 of 4,096
    assert sizes(1, False) == [38, 26]  # 38 * 425 = 16,150
    assert sizes(1, True, targets=512) == [26, 26, 12]  # 26 * 612 = 15,912
    assert micro_batch_limits(Training(gpus=0.25), Worker(), True) == (16_384, 1.0)
    configured = Training(gpus=0.25, micro_tokens=999)
    assert micro_batch_limits(configured, Worker(device="cuda:0"), True) == (999, 1.0)


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
