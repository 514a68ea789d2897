"""Training in pieces: what a call leaves undone, the next call resumes; and the grid that is trained so."""

import pytest

from benchmarks import pieces
from benchmarks.pieces import TrainingTask, train_piece
from benchmarks.search_efficiency import SearchMethod, open_grid, replay
from benchmarks.train_grid import make_grid, make_tasks
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
    assert train_piece(make_tasks(space, tmp_path / "runs"), 60) == 0
    grid = make_grid(space, tmp_path / "runs")
    grid.write(tmp_path / "grid.json")
    assert open_grid(tmp_path / "grid.json") == grid
    costs = {trial.size: trial.cost for trial in grid.trials.values()}
    assert costs["1-1"] < costs["2-1"] < grid.reference[1]
    points = replay(space, grid.trials, method=SearchMethod("random", "off"))
    assert {point.cost for point in points} == set(costs.values())
    assert points[-1].seconds == pytest.approx(sum(trial.total_seconds for trial in grid.trials.values()))
