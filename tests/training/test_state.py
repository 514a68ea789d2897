"""A run's saved state: a killed run resumes to the same weights and metrics."""

import itertools

import pytest
import torch

from raydistill.core import artifact
from raydistill.training import loop
from raydistill.training.loop import fit
from raydistill.training.optimizer_step import OptimizerStep
from raydistill.training.state import (
    STATE_FOLDER,
    STATE_KIND,
    StateManifest,
    TrainingState,
    load_state,
    save_progress,
    save_state,
)
from tests.factories.clock import FakeClock
from tests.factories.kills import kill_at_every_step
from tests.factories.training import (
    SETTINGS,
    fit_and_record,
    flat_weights,
    no_report,
    read_metrics,
    read_state,
    rising_scores,
    tiny_distillation,
    with_cache,
)


class Killed(Exception):
    """Stands for a kill of the process."""


def kill_at_step(step):
    """A report callback that fails at a step."""

    def report(metrics, _folder):
        if metrics["step"] == step:
            raise Killed

    return report


KILL_POINTS = ["after the state", "before the state", "after the checkpoint alone"]


@pytest.mark.parametrize(
    ("kill_point", "optimizer", "cached"),
    [*itertools.product(KILL_POINTS, ["adamw", "adafactor"], [False]), ("after the state", "adamw", True)],
)
def test_killed_run_resumes_to_the_weights_of_an_undisturbed_run(kill_point, optimizer, cached, tmp_path, monkeypatch):
    settings = SETTINGS.model_copy(update={"optimizer": optimizer})

    def make_distillation():
        live = tiny_distillation("bart", tmp_path / "t", dropout=0.3)
        return with_cache(live, live.teacher, tmp_path / "cache") if cached else live

    whole = make_distillation()
    expected, _ = fit_and_record(whole, settings, tmp_path / "whole")
    assert len(expected) == 6

    kill = kill_at_step(3)
    killed = make_distillation()
    real_save, real_write = loop.save_state, loop.write_history
    if kill_point == "before the state":

        def killed_save(folder, state, *rest):
            kill({"step": state.step}, folder)
            real_save(folder, state, *rest)

        monkeypatch.setattr(loop, "save_state", killed_save)
    if kill_point == "after the checkpoint alone":

        def killed_write(folder, validations):
            if len(validations) == 3:
                raise Killed
            real_write(folder, validations)

        monkeypatch.setattr(loop, "write_history", killed_write)
    with pytest.raises(Killed):
        fit_and_record(killed, settings, tmp_path / "run", report=kill)
    monkeypatch.undo()
    torch.manual_seed(12345)  # random numbers that the new process drew before
    torch.rand(7)
    resumed = make_distillation()
    history, state = fit_and_record(resumed, settings, tmp_path / "run")
    assert history == expected
    assert torch.equal(flat_weights(resumed.student), flat_weights(whole.student))
    assert state.step == 6
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == [f"checkpoint-{state.best_step}", "metrics.jsonl", "progress.json", "state"]
    assert sorted(p.name for p in (tmp_path / "run" / "state").iterdir()) == ["manifest.json", "step-6.safetensors"]


def tiny_optimizer(weight):
    """A model with one weight, and its optimiser after a step."""
    student = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.AdamW(student.parameters())
    student(torch.ones(1)).sum().backward()
    optimizer.step()
    torch.nn.init.constant_(student.weight, weight)
    return student, optimizer


def save(folder, step):
    """Save a state whose weight is its step."""
    save_state(folder, TrainingState(step=step), *tiny_optimizer(step))


def test_a_kill_at_any_step_of_a_save_leaves_the_old_or_the_new_state(tmp_path):
    folder = tmp_path / "home" / "run"
    folder.parent.mkdir()

    def load(_):
        student, optimizer = tiny_optimizer(0)
        state = load_state(folder, student, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
        assert student.weight.item() == state.step
        return state.step

    steps = kill_at_every_step(lambda: save(folder, 2), lambda: save(folder, 1), folder, load)
    # Steps: the temporary folder; fsync of the tensors and of the folder; open, fsync, rename, fsync and unlink for the
    # manifest; the rename of the old state and that of the new state. Then the fsync of the parent folder, the deletion
    # of the old manifest, tensors and folder, and the unlink of what is left. The last value is that without a kill.
    assert steps == [1] * 9 + [2] * 7


def test_a_kill_at_any_step_of_a_save_of_the_progress_leaves_the_old_or_the_new_progress(tmp_path):
    folder = tmp_path / "home" / "run"
    folder.parent.mkdir()

    def reason(_):
        artifact.open_artifact(folder / STATE_FOLDER, StateManifest, STATE_KIND)
        return read_state(folder).reason

    reasons = kill_at_every_step(
        lambda: save_progress(folder, TrainingState(step=1, reason="stopped")), lambda: save(folder, 1), folder, reason
    )
    assert reasons == [""] * 3 + ["stopped"] * 3  # the steps of the manifest as above


def test_run_time_includes_startup_and_validations_and_continues_after_a_kill(tmp_path, monkeypatch):
    """A start-up takes 5 s, a step 1 s, a validation 0.25 s; the first process is killed at its third validation."""
    distillation = tiny_distillation("bart", tmp_path / "t")
    save_weights = rising_scores(distillation)
    clock = FakeClock()
    monkeypatch.setattr(loop, "time", clock)

    class TimedStep(OptimizerStep):
        def run(self, inputs):
            clock.sleep(1)
            return super().run(inputs)

    def slow_validation(folder, engine):
        clock.sleep(0.25)
        return save_weights(folder)

    def step():
        return TimedStep.create(distillation, SETTINGS)

    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(Killed):
        fit(step(), folder, slow_validation, kill_at_step(3), started_at=clock.now - 5)
    assert read_state(folder).seconds == 5 + 3 * 1.25
    state = fit(step(), folder, slow_validation, no_report, started_at=clock.now - 5)
    assert [line["time_s"] for line in state.history] == [6.25, 7.5, 8.75, 15.0, 16.25, 17.5]
    assert state.seconds == 17.5


def test_resumed_run_continues_the_learning_rate_schedule(tmp_path):
    settings = SETTINGS.model_copy(update={"warmup_steps": 0, "learning_rate": 0.06})
    with pytest.raises(Killed):
        fit_and_record(tiny_distillation("bart", tmp_path / "t"), settings, tmp_path / "run", report=kill_at_step(2))
    history, _ = fit_and_record(tiny_distillation("bart", tmp_path / "t"), settings, tmp_path / "run")
    # the rate of the next step
    assert [h["learning_rate"] for h in history] == pytest.approx([0.05, 0.04, 0.03, 0.02, 0.01, 0.0])
