"""The replay's arithmetic, by hand; and the live pair on a tiny world."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks.search_efficiency import (
    Point,
    Recorded,
    compare,
    cut,
    hypervolume,
    live,
    live_rows,
    read_grid,
    recorded,
    replay,
    rows_of,
    seconds_to,
)
from raydistill.config.corners import iter_corners
from raydistill.config.space import Space, make_run, read_space
from raydistill.core.files import write_json_atomic
from raydistill.results.records import read_trials
from raydistill.search.study import trial_key
from tests.factories.sweeps import make_trial
from tests.factories.workspace import command, last_json, make_world


def test_hypervolume_by_hand():
    points = [(3.0, 2.0), (5.0, 6.0), (2.0, 7.0), (9.0, 11.0), (0.5, 1.0)]
    # over the reference (1, 10): (3 - 1) x (10 - 2), then (5 - 3) x (10 - 6); the others add nothing
    assert hypervolume(points, (1.0, 10.0)) == 16 + 8
    assert hypervolume([], (1.0, 10.0)) == 0


def test_time_to_a_hypervolume():
    points = [Point(10, 3, 2), Point(25, 5, 6)]
    assert seconds_to(points, 16, (1, 10)) == 10
    assert seconds_to(points, 24, (1, 10)) == 25
    assert seconds_to(points, 25, (1, 10)) == math.inf


def test_ratio_of_medians():
    ratio, low, high = compare([1.0] * 9, [4.0] * 9)
    assert (ratio, low, high) == (0.25, 0.25, 0.25)


def test_a_search_that_never_gets_there_took_infinitely_long():
    never = math.inf
    assert compare([never] * 9, [4.0] * 9) == (never, never, never)
    assert compare([4.0] * 9, [never] * 9) == (0, 0, 0)
    assert compare([never] * 9, [never] * 9) == (never, never, never)
    assert compare([1.0, 1.0, 1.0, never], [4.0] * 4)[0] == 0.25
    short, long = [Point(10, 3, 2)], [Point(10, 3, 2), Point(90, 5, 6)]
    found = {"this search": [short, short, long], "random, full length": [long, long, long]}
    rows, data = rows_of(found, 0.95, 24, (1, 10), 110)
    assert rows[0][2:] == ["90 / never / never", "never [1.00, never]", "never [1.00, never]", "33%"]
    assert data[0]["seconds"] == [None, None, 90]
    json.dumps(data, allow_nan=False)


def test_teacher_passes_are_added_to_every_search():
    found = {"this search": [[Point(10, 5, 6)]], "random, full length": [[Point(90, 5, 6)]]}
    rows, _ = rows_of(found, 0.95, 16, (1, 10), 110)
    assert rows[0][2:] == ["10 / 10 / 10", "0.11 [0.11, 0.11]", "0.60 [0.60, 0.60]", "100%"]  # 10 / 90, 120 / 200


SPACE = Space.model_validate(
    {
        "name": "s",
        "run": {
            "teacher": "t",
            "dataset": "d",
            "student": {"size": {"choice": ["2-2", "2-1"]}},
            "training": {"learning_rate": {"choice": [1e-3, 1e-4]}},
        },
        "search": {"stopping": "per_shape", "sampler": "random", "trials": 4, "grace": 0.25, "reduction": 2},
    }
)


def record(size: str, score: float) -> Recorded:
    curve = [(share, share * score) for share in (0.25, 0.5, 0.75, 1.0)]
    return Recorded(size, curve, (10.0, 20.0, 30.0, 40.0), 5.0, 3.0, score, 8.0 if size == "2-2" else 4.0, (False,) * 4)


def test_a_trial_that_is_stopped_is_charged_what_it_ran_and_its_scoring_on_validation():
    weak = record("2-2", 4.0)
    assert cut(weak, [], SPACE.search) == (4, 45.0, 4.0)
    assert cut(weak, [record("2-2", 8.0).curve], SPACE.search) == (1, 13.0, 1.0)
    assert cut(replace(weak, score=None), [record("2-2", 8.0).curve], SPACE.search) == (1, 13.0, 1.0)
    lost = replace(weak, collapsed=(True, True, True, False))  # it ended well, and would not have been let
    assert cut(lost, [record("2-2", 8.0).curve], SPACE.search) == (1, 13.0, None)
    late = replace(weak, warm_up=0.5)
    assert cut(late, [record("2-2", 8.0).curve], SPACE.search) == (2, 23.0, 2.0)


def test_start_up_training_validations_and_scoring_are_all_charged(tmp_path: Path):
    """18 and 28 device-seconds at its validations, with all that was before them; 8 more for its scoring."""
    folder = make_trial(tmp_path, "a", 0, 10.0)
    lines = [
        {"gpu_hours": 18 / 3600, "step": 10, "progress": 0.5, "score": 9.0, "repetition": 0.9},
        {"gpu_hours": 28 / 3600, "step": 20, "progress": 1.0, "score": 10.0, "repetition": 0.1},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = json.loads((folder / "result.json").read_text())
    result["metrics"] |= {"gpu_hours": 36 / 3600}
    write_json_atomic(folder / "result.json", result)
    (trial,) = read_trials(tmp_path)
    found = recorded(trial, "rouge2", 7.0, repetition=0.0)
    assert (found.collapsed, found.warm_up) == ((True, False), 0.5)  # 500 steps asked for, half of 20 at most
    assert found.seconds == pytest.approx((18, 28))
    assert found.finish == pytest.approx(8)
    assert found.judged == pytest.approx(8)
    np.savez(folder / "rows.npz", validation=np.full(30, 10.0), test=np.full(10, 9.0))
    assert recorded(trial, "rouge2", 7.0).judged == pytest.approx(6)
    assert found.whole == pytest.approx(36)
    assert (found.score, found.latency, found.curve) == (10.0, 7.0, [(0.5, 9.0), (1.0, 10.0)])


@pytest.mark.parametrize(("stopping", "seconds"), [("per_shape", {116.0, 148.0, 180.0}), ("off", {180.0})])
def test_a_replay_tries_all_of_the_grid_once(stopping: str, seconds: set[float]):
    runs = [make_run(SPACE, chosen, "s") for chosen in iter_corners(SPACE.run)]
    grid = {
        trial_key(run): record(str(run.student.size), 8.0 if run.training.learning_rate == 1e-3 else 4.0)
        for run in runs
    }
    totals = set()
    for seed in range(6):
        search = SPACE.search.model_copy(update={"stopping": stopping, "seed": seed})
        points = replay(SPACE.model_copy(update={"search": search}), grid)
        assert len(points) == 4
        totals.add(points[-1].seconds)
    assert totals <= seconds
    assert hypervolume([(p.score, p.latency) for p in points], (0, 10)) == 8 * 6


def test_a_replay_ends_when_it_has_found_enough():
    runs = [make_run(SPACE, chosen, "s") for chosen in iter_corners(SPACE.run)]
    grid = {trial_key(run): record(str(run.student.size), 4.0) for run in runs}
    assert len(replay(SPACE, grid, lambda points: len(points) == 3)) == 3


def test_a_trial_that_fails_costs_its_time_and_finds_nothing():
    runs = [make_run(SPACE, chosen, "s") for chosen in iter_corners(SPACE.run)]
    grid = {trial_key(run): replace(record(str(run.student.size), 4.0), score=None) for run in runs}
    alive = trial_key(runs[0])
    grid[alive] = record(str(runs[0].student.size), 2.0)  # behind the others of its shape, which fail
    ends = set()
    for seed in range(12):
        space = SPACE.model_copy(update={"search": SPACE.search.model_copy(update={"seed": seed})})
        ends |= {tuple(p.seconds for p in replay(space, grid))}
    assert ends <= {(45.0,), (90.0,), (135.0,), (180.0,)}
    assert len(ends) > 1


def test_the_demos_grid_has_about_110_trials():
    space = read_space(Path(__file__).parents[2] / "benchmarks/spaces/search_demo.yaml")
    combinations = len(list(iter_corners(space.run)))
    assert combinations == space.search.trials
    assert 100 <= combinations <= 120


@pytest.mark.slow
def test_the_live_pair_is_two_real_sweeps_judged_by_the_grids_hypervolume(tmp_path: Path):
    teacher, data = make_world(tmp_path)
    run = {
        "teacher": str(teacher),
        "dataset": {"name": str(data), "max_source_tokens": 32, "max_target_tokens": 16},
        "student": {"size": {"choice": ["2-2", "2-1"]}},
        "training": {"learning_rate": {"choice": [1e-3, 1e-4]}, "epochs": 4, "batch_size": 8, "patience": 99},
        "decoding": {"beams": 1, "max_length": 12},
    }
    search = {"trials": 4, "sampler": "grid", "stopping": "off", "decoding": {"beams": []}}
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({"name": "grid", "run": run, "search": search}))
    sweep = Path(last_json(command(tmp_path / "outputs", "sweep", path, "--json"))["sweep"])
    grid = read_grid(sweep)
    pair = live(sweep, 3, 2)
    assert [len(points) for points in pair.values()] == [2, 2]
    for points in pair.values():
        assert 0 < points[0].seconds < points[1].seconds
        assert {point.latency for point in points} <= {trial.latency for trial in grid.values()}
    rows, kept = live_rows(pair, 1.0, (0.0, 1e9))
    assert [row[0] for row in rows] == list(pair)
    assert all(np.isfinite(one["reached"]) for one in kept)
