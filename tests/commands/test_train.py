"""The `train` command: a folder whose run is finished, and the progress of a run."""

import json
import time
from pathlib import Path

import pytest

from raydistill.config.run import Run
from raydistill.core import console
from raydistill.train import RunFollower, _describe_validation, train_command
from raydistill.training.records import (
    PROGRESS_FILE,
    RESULT_FILE,
    RUN_FILE,
    RunProgress,
    RunResult,
    Validation,
    write_history,
    write_run,
)
from tests.factories.clock import FakeClock
from tests.factories.training import VALIDATIONS


@pytest.mark.parametrize(("repetition", "warns"), [(0.9, True), (0.4, False)])
def test_model_whose_outputs_repeat_themselves_is_reported(repetition, warns, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path))
    settings = {"name": "teacher", "teacher": str(tmp_path), "dataset": str(tmp_path)}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    folder = tmp_path / "runs" / "teacher"
    write_run(folder / RUN_FILE, Run.model_validate(settings))
    result = RunResult(key="teacher", status="done", metrics={"rouge2": 0.0, "repetition": repetition})
    result.write(folder / RESULT_FILE)
    train_command(str(tmp_path / "run.json"), [], as_json=True)
    printed = capsys.readouterr()
    assert ("90% of the outputs of teacher repeat themselves" in printed.err) == warns
    assert json.loads(printed.out) == {**result.to_json(), "checkpoint": str(folder / "best")}


def write_progress(folder, step, resumed_step=0, seconds=1.0):
    RunProgress(
        step=step, total_steps=1200, resumed_step=resumed_step, seconds=seconds, updated_at=time.time() + step
    ).write(folder / PROGRESS_FILE)


@pytest.mark.parametrize(
    ("resumed_step", "line"), [(0, "training 1,200 steps"), (300, "resuming from step 300 of 1,200 steps")]
)
def test_steps_rate_and_time_left_are_shown(resumed_step, line, tmp_path, monkeypatch, capsys):
    """A step takes 0.1 s. The record of an earlier process is not shown."""
    clock = FakeClock()
    monkeypatch.setattr(console, "time", clock)
    write_progress(tmp_path, 700)
    follower = RunFollower(tmp_path)
    follower._show_steps(follower._read_progress())
    assert capsys.readouterr().err == ""
    write_progress(tmp_path, resumed_step, resumed_step)
    follower._show_steps(follower._read_progress())
    assert capsys.readouterr().err == f"  {line}\n"
    clock.sleep(10)
    write_progress(tmp_path, resumed_step + 100, resumed_step, seconds=10.0)
    follower._show_steps(follower._read_progress())
    left = {0: "1 min 50 s", 300: "1 min 20 s"}[resumed_step]  # 1,100 and 800 steps of 0.1 s
    shown = f"step {resumed_step + 100} of 1,200, 10.00 steps/s, {left} left"
    assert capsys.readouterr().err == f"  training: {shown}\n"


def test_validations_are_printed_once_also_after_a_damaged_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_history(tmp_path, VALIDATIONS[:1])
    follower = RunFollower(tmp_path)
    with follower:
        (tmp_path / "metrics.jsonl").write_text("{\n{\n")
        time.sleep(1.5)  # the follower reads the file every second
        assert follower.thread.is_alive()
        write_history(tmp_path, VALIDATIONS)
    assert capsys.readouterr().err.splitlines() == ["  step      2, epoch 0.00, 0 s: bleu 22.00"]


def test_a_score_that_is_the_validation_loss_is_printed_once() -> None:
    loss = {"step": 1, "total_steps": 2, "metric": "val_loss", "val_loss": 2.5, "score": -2.5}
    line = _describe_validation(Validation.model_validate(loss))
    assert line == "  step      1, epoch 0.00, 0 s: validation loss 2.500"
