"""The loop: optimiser steps, learning rates, validations and early stopping."""

import math
import threading
from types import SimpleNamespace

import pytest
import torch

from raydistill.config.run import Loss
from raydistill.models import families
from raydistill.training import loop, prefetch
from raydistill.training.distillation import DistillationStep
from raydistill.training.loop import NonFiniteLoss, fit, set_train_mode
from raydistill.training.optimizer_step import OptimizerStep
from raydistill.training.records import PROGRESS_FILE, RunProgress
from tests.factories.clock import FakeClock
from tests.factories.training import (
    SETTINGS,
    fit_and_record,
    flat_weights,
    no_report,
    read_state,
    rising_scores,
    tiny_distillation,
)


def test_number_of_steps_ignores_floating_point_noise(tmp_path):
    distillation = tiny_distillation("bart", tmp_path / "t", n=10)
    settings = SETTINGS.model_copy(update={"batch_size": 1, "epochs": 1.1, "checks_per_epoch": 1})
    _, state = fit_and_record(distillation, settings, tmp_path / "run")
    assert state.step == 11  # 1.1 * 10 is 11.000000000000002


def scripted_scores(distillation, scores, losses=None):
    """A validation that saves the weights and gives the next of `scores` and `losses`; by default, equal losses."""
    save_and_count = rising_scores(distillation)

    def validate(folder, engine=None):
        index = int(save_and_count(folder)["score"]) - 1
        return {"metric": "rouge2", "score": scores[index], "val_loss": losses[index] if losses else 1.0}

    return validate


@pytest.mark.parametrize(
    ("losses", "best"), [([4, 2, 3, 2], 2), ([4, 3, 2, 1], 3), ([4, 2, 2, 1], 2), ([1, 3, 4, 0], 2)]
)
def test_of_equal_scores_the_lower_loss_is_the_best_and_the_run_is_not_prolonged(losses, best, tmp_path):
    distillation = tiny_distillation("bart", tmp_path / "t", n=8)
    settings = SETTINGS.model_copy(update={"patience": 2, "epochs": 4, "checks_per_epoch": 2})
    validate = scripted_scores(distillation, [1, 3, 3, 2, 9], losses)
    _, state = fit_and_record(distillation, settings, tmp_path / "run", validate=validate)
    assert (len(state.history), state.best_step) == (4, 2 * best)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{2 * best}"]


@pytest.mark.parametrize(("checks_per_epoch", "validations"), [(4, 5), (10, 5), (2, 3)])
def test_default_patience_is_one_epoch_also_where_an_epoch_has_fewer_steps_than_checks(
    checks_per_epoch, validations, tmp_path
):
    """An epoch has 4 steps; the score never rises after the first validation."""
    distillation = tiny_distillation("bart", tmp_path / "t", n=8)
    settings = SETTINGS.model_copy(update={"patience": None, "epochs": 4, "checks_per_epoch": checks_per_epoch})
    validate = scripted_scores(distillation, [9, *range(8, -8, -1)])
    _, state = fit_and_record(distillation, settings, tmp_path / "run", validate=validate)
    assert len(state.history) == validations


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
    assert (len(state.history), state.best_step, state.best["score"]) == (checks, 2 * best, scores[best - 1])
    assert state.ended_early == read_state(tmp_path / "run").ended_early == (checks < len(scores))
    checkpoints = list((tmp_path / "run").glob("checkpoint-*"))
    assert [p.name for p in checkpoints] == [f"checkpoint-{2 * best}"]
    assert torch.equal(torch.load(checkpoints[0] / "weights.pt"), weights_at_validation[best - 1])
    again = tiny_distillation("bart", tmp_path / "t", n=8)
    step = OptimizerStep.create(again, settings)
    resumed = fit(step, tmp_path / "run", scripted_scores(again, [99]), no_report)
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
            distillation, SETTINGS, tmp_path / "run", validate=lambda f, e: {"score": 0.0, "val_loss": math.nan}
        )


def test_step_time_includes_waiting_for_inputs_and_loss_values(tmp_path, monkeypatch):
    """On a GPU a step returns before its work is done: its loss values arrive half a second after they are read.

    The inputs are read in another thread. They take a quarter of a second from when the step waits for them.
    """
    clock, asked = FakeClock(now=0.0), threading.Event()

    def monotonic():
        asked.set()
        return clock.now

    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(prefetch, "time", SimpleNamespace(monotonic=monotonic))

    class LateTensor(torch.Tensor):
        def tolist(self):
            clock.sleep(0.5)
            return super().tolist()

    class SlowStep(OptimizerStep):
        def read_inputs(self, batch):
            asked.wait()
            clock.sleep(0.25)
            return super().read_inputs(batch)

        def run(self, inputs):
            return {name: value.as_subclass(LateTensor) for name, value in super().run(inputs).items()}

    distillation = tiny_distillation("bart", tmp_path / "t")
    settings = SETTINGS.model_copy(update={"max_steps": 1})
    (tmp_path / "run").mkdir()
    step = SlowStep.create(distillation, settings)
    [metrics] = fit(step, tmp_path / "run", rising_scores(distillation), no_report).history
    assert metrics["step_ms"] == 750
    assert metrics["data_wait"] == pytest.approx(1 / 3)


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
    set_train_mode(distillation.student)
    ids = torch.tensor([distillation.examples.sources[0]])
    mask = torch.ones_like(ids)
    encoded = [families.encode(distillation.student, ids, mask).last_hidden_state for _ in range(2)]
    assert torch.equal(*encoded)
    decoded = [families.decode(distillation.student, ids, encoded[0], mask).last_hidden_state for _ in range(2)]
    assert not torch.equal(*decoded)


def test_dropout_acts_on_a_trained_encoder(tmp_path):
    distillation = tiny_distillation("bart", tmp_path / "t", "1-2", dropout=0.5)
    set_train_mode(distillation.student)
    ids = torch.tensor([distillation.examples.sources[0]])
    mask = torch.ones_like(ids)
    encoded = [families.encode(distillation.student, ids, mask).last_hidden_state for _ in range(2)]
    assert not torch.equal(*encoded)


def test_progress_is_recorded_between_validations_and_names_the_step_of_a_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "PROGRESS_INTERVAL_S", 0.0)
    settings = SETTINGS.model_copy(update={"epochs": 2, "checks_per_epoch": 1, "max_steps": 6})
    records = []

    def validate(folder, engine=None):
        records.append(RunProgress.read(tmp_path / "run" / PROGRESS_FILE))
        if len(records) == 2:
            raise KeyboardInterrupt
        return {"metric": "rouge2", "score": 1.0, "val_loss": 1.0}

    with pytest.raises(KeyboardInterrupt):
        fit_and_record(tiny_distillation("bart", tmp_path / "t", n=8), settings, tmp_path / "run", validate=validate)
    step = OptimizerStep.create(tiny_distillation("bart", tmp_path / "t", n=8), settings)
    fit(step, tmp_path / "run", validate, no_report)
    assert [record.resumed_step for record in records] == [0, 0, records[0].step]
    assert [record.step for record in records] == [records[0].step, records[0].total_steps, records[0].total_steps]
    assert records[2].steps_per_s > 0
