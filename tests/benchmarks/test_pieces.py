"""Training in pieces: what a call leaves undone, the next call resumes; and the grid that is trained so."""

import pytest

from benchmarks import pieces
from benchmarks.pieces import PartialResults, TrainingTask, train_piece
from benchmarks.search_efficiency import SearchMethod, open_grid, replay
from benchmarks.train_grid import (
    TEST_FILE,
    CheckpointScores,
    checkpoints_of,
    keep_best_checkpoint,
    make_grid,
    make_tasks,
    score_checkpoints,
    train_and_score,
)
from raydistill.config.run import Run
from raydistill.config.space import Space
from raydistill.training.inputs import RunInputs
from raydistill.training.records import RESULT_FILE, RunResult, read_history
from raydistill.training.state import has_state
from tests.factories.clock import FakeClock
from tests.factories.workspace import make_world


class TickingClock(FakeClock):
    """A clock on which a second passes at every call."""

    def monotonic(self) -> float:
        self.now += 1
        return self.now


def test_a_run_that_the_time_interrupts_is_resumed_at_its_step_by_the_next_call(
    tmp_path, monkeypatch: pytest.MonkeyPatch
):
    teacher, data = make_world(tmp_path)
    run = Run.model_validate(
        {
            "name": "student",
            "teacher": str(teacher),
            "dataset": {"name": str(data), "max_source_tokens": 32, "max_target_tokens": 16},
            "student": {"size": "1-1"},
            "training": {"epochs": 1, "batch_size": 8, "checks_per_epoch": 1},
            "decoding": {"beams": 1, "max_length": 8},
        }
    )
    tasks = [TrainingTask(run, tmp_path / "student", RunInputs())]
    monkeypatch.setattr(pieces, "time", TickingClock())
    assert train_piece(tasks, 4 / 60) == 1
    assert has_state(tasks[0].folder)
    assert read_history(tasks[0].folder) == []  # before the validation at the end of the six steps
    num_pieces = 1
    while train_piece(tasks, 4 / 60):
        num_pieces += 1
        assert num_pieces < 6
    result = RunResult.read(tasks[0].folder / RESULT_FILE)
    assert (result.status, result.steps) == ("done", 6)
    assert [validation.step for validation in read_history(tasks[0].folder)] == [6]
    written = (tasks[0].folder / RESULT_FILE).stat().st_mtime_ns
    assert train_piece(tasks, 1) == 0
    assert (tasks[0].folder / RESULT_FILE).stat().st_mtime_ns == written


def test_partial_results_are_kept_and_belong_to_their_settings(tmp_path):
    path = tmp_path / "measured.json"
    results = PartialResults.open(path, {"seeds": 3})
    assert results.find(size="2-2", beams=4) is None
    results = results.add(path, {"size": "2-2", "beams": 1, "bleu": 30.0})
    results.add(path, {"size": "2-2", "seed": 0})
    again = PartialResults.open(path, {"seeds": 3})
    assert again.find(size="2-2", beams=1) == {"size": "2-2", "beams": 1, "bleu": 30.0}
    assert again.find(size="2-2", beams=4) is None
    with pytest.raises(SystemExit, match="measured with other settings"):
        PartialResults.open(path, {"seeds": 2})


def test_a_checkpoint_is_kept_where_it_is_the_best(tmp_path):
    trial = tmp_path / "trials" / "key"
    (trial / "checkpoint-5").mkdir(parents=True)
    (trial / "checkpoint-5" / "weights").write_text("of step 5")
    keep_best_checkpoint({"step": 5}, trial)
    keep_best_checkpoint({"step": 5}, trial)  # a validation that is repeated after a kill
    keep_best_checkpoint({"step": 10}, trial)  # worse: its checkpoint is deleted already
    (trial / "checkpoint-5").rename(trial / "best")
    assert [path.name for path in checkpoints_of(trial).iterdir()] == ["5"]
    assert (checkpoints_of(trial) / "5" / "weights").read_text() == "of step 5"


def test_a_grid_is_trained_written_and_replayed(tmp_path):
    teacher, data = make_world(tmp_path)
    run = {
        "teacher": str(teacher),
        "dataset": {"name": str(data), "max_source_tokens": 32, "max_target_tokens": 16, "selection_share": 0},
        "student": {"size": {"choice": ["2-1", "1-1"]}},
        "training": {"max_steps": 2, "batch_size": 8},
        "decoding": {"beams": 1, "max_length": 8},
    }
    search = {"trials": 2, "sampler": "grid", "stopping": "off", "cost": "params_m"}
    space = Space.model_validate({"name": "grid", "run": run, "search": search})
    tasks = make_tasks(space, tmp_path / "runs", teacher_repetition=1.0)
    assert train_and_score(tasks, 0, lambda task: score_checkpoints(task, 3)) == 2  # no time: nothing is trained
    assert train_and_score(tasks, 60, lambda task: score_checkpoints(task, 3)) == 0
    for task in tasks:
        assert not checkpoints_of(task.folder).exists()
        assert list(CheckpointScores.read(task.folder / TEST_FILE).scores) == [2]
    grid = make_grid(space, tmp_path / "runs", 3)
    assert (grid.judged_by, grid.has_every_test_score) == ("test", True)
    grid.write(tmp_path / "grid.json")
    assert open_grid(tmp_path / "grid.json") == grid
    costs = {trial.size: trial.cost for trial in grid.trials.values()}
    assert costs["1-1"] < costs["2-1"] < grid.reference[1]
    points = replay(space, grid.trials, method=SearchMethod("random", "off"))
    assert {point.cost for point in points} == set(costs.values())
    assert points[-1].seconds == pytest.approx(sum(trial.total_seconds for trial in grid.trials.values()))
