"""Replays of searches over a recorded grid: the arithmetic, and a pair of live sweeps on a tiny teacher."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks.search_efficiency import (
    BASELINES,
    SEARCHES,
    Grid,
    RecordedTrial,
    SearchMethod,
    SearchPoint,
    Target,
    compare_searches,
    describe_judgement,
    describe_main_ratios,
    has_same_shape,
    hypervolume,
    is_any_trial,
    is_not_more_expensive,
    judge_by_one_split,
    live_rows,
    ratio_of_medians,
    read_grid,
    record_trial,
    replay,
    run_live_sweeps,
    seconds_to,
    truncate_trial,
)
from benchmarks.stopping_rules import stops_by_asha
from raydistill.config.corners import iter_corners
from raydistill.config.run import Run
from raydistill.config.space import Space, make_run, read_space
from raydistill.results.records import read_trials
from raydistill.search.study import trial_key
from tests.factories.sweeps import change_result, make_trial
from tests.factories.workspace import command, last_json, make_world


def test_hypervolume_of_a_staircase():
    points = [(3.0, 2.0), (5.0, 6.0), (2.0, 7.0), (9.0, 11.0), (0.5, 1.0)]
    # With the reference (1, 10): (3 - 1) x (10 - 2), then (5 - 3) x (10 - 6); the other points add nothing.
    assert hypervolume(points, (1.0, 10.0)) == 16 + 8
    assert hypervolume([], (1.0, 10.0)) == 0


def test_seconds_until_a_hypervolume_is_reached():
    points = [SearchPoint(10, 3, 2), SearchPoint(25, 5, 6)]
    assert seconds_to(points, 16, (1, 10)) == 10
    assert seconds_to(points, 24, (1, 10)) == 25
    assert seconds_to(points, 25, (1, 10)) == math.inf


def test_ratio_of_medians():
    assert ratio_of_medians([1.0] * 9, [4.0] * 9) == (0.25, 0.25, 0.25)


def test_a_search_that_never_reaches_the_share_counts_as_infinite():
    never = math.inf
    assert ratio_of_medians([never] * 9, [4.0] * 9) == (never, never, never)
    assert ratio_of_medians([4.0] * 9, [never] * 9) == (0, 0, 0)
    assert ratio_of_medians([never] * 9, [never] * 9) == (never, never, never)
    assert ratio_of_medians([1.0, 1.0, 1.0, never], [4.0] * 4)[0] == 0.25
    short, long = [SearchPoint(10, 3, 2)], [SearchPoint(10, 3, 2), SearchPoint(90, 5, 6)]
    replays = {"this search": [short, short, long], **{name: [long, long, long] for name in BASELINES}}
    rows, records = compare_searches(replays, 0.95, Target(24 / 0.95, (1, 10), 110))
    assert rows[0][2:] == ["90 / never / never", *["never [1.00, never]"] * 5, "33%"]
    assert records[0]["seconds"] == [None, None, 90]
    json.dumps(records, allow_nan=False)


def test_teacher_passes_are_added_to_every_search():
    seconds = dict(zip(BASELINES, (90, 40, 20, 100), strict=True))
    replays = {"this search": [[SearchPoint(10, 5, 6)]]}
    replays |= {name: [[SearchPoint(value, 5, 6)]] for name, value in seconds.items()}
    rows, records = compare_searches(replays, 0.95, Target(16 / 0.95, (1, 10), 110))
    ratios = ["0.11 [0.11, 0.11]", "0.25 [0.25, 0.25]", "0.50 [0.50, 0.50]", "0.10 [0.10, 0.10]"]
    # With the passes: (10 + 110) / (90 + 110) of the main baseline
    assert rows[0][2:] == ["10 / 10 / 10", *ratios, "0.60 [0.60, 0.60]", "100%"]
    text = describe_main_ratios(records)
    assert "- this search over random with the same stopping: 0.11 [0.11, 0.11]; at most 0.5 was asked for" in text
    assert text.endswith("- this search over random, full length: 0.10 [0.10, 0.10]")


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


def recorded_trial(size: str, score: float) -> RecordedTrial:
    curve = [(share, share * score) for share in (0.25, 0.5, 0.75, 1.0)]
    seconds = (10.0, 20.0, 30.0, 40.0)
    return RecordedTrial(size, curve, seconds, 5.0, 3.0, score, 8.0 if size == "2-2" else 4.0, (False,) * 4)


def test_a_stopped_trial_costs_its_training_and_its_scoring_on_validation():
    weak = recorded_trial("2-2", 4.0)
    strong_curve = recorded_trial("2-2", 8.0).curve
    assert truncate_trial(weak, [], SPACE.search) == (4, 45.0, 4.0)
    assert truncate_trial(weak, [strong_curve], SPACE.search) == (1, 13.0, 1.0)
    assert truncate_trial(replace(weak, score=None), [strong_curve], SPACE.search) == (1, 13.0, 1.0)
    collapsed_early = replace(weak, collapsed=(True, True, True, False))  # only its last validation is sound
    assert truncate_trial(collapsed_early, [strong_curve], SPACE.search) == (1, 13.0, None)
    long_warmup = replace(weak, warmup=0.5)
    assert truncate_trial(long_warmup, [strong_curve], SPACE.search) == (2, 23.0, 2.0)


def test_recorded_seconds_include_startup_training_validations_and_scoring(tmp_path: Path):
    """18 and 28 device-seconds until the end of the validations, and 8 for the final scoring."""
    folder = make_trial(tmp_path, "a", 0, 10.0)
    lines = [
        {"device_hours": 18 / 3600, "step": 10, "total_steps": 20, "metric": "rouge2", "score": 9.0, "repetition": 0.9},
        {
            "device_hours": 28 / 3600,
            "step": 20,
            "total_steps": 20,
            "metric": "rouge2",
            "score": 10.0,
            "repetition": 0.1,
        },
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    change_result(folder, metrics={"rouge2": 10.0, "rouge1": 20.0, "latency_ms": 100.0, "device_hours": 36 / 3600})
    (trial,) = read_trials(tmp_path)
    recorded = record_trial(trial, "rouge2", 7.0, teacher_repetition=0.0)
    # The run asks for 500 warm-up steps; at most half of its 20 steps count.
    assert (recorded.collapsed, recorded.warmup) == ((True, False), 0.5)
    assert recorded.seconds == pytest.approx((18, 28))
    assert recorded.scoring_seconds == pytest.approx(8)
    assert recorded.validation_scoring_seconds == pytest.approx(8)
    np.savez(folder / "rows.npz", validation=np.full(30, 10.0), test=np.full(10, 9.0))
    assert record_trial(trial, "rouge2", 7.0).validation_scoring_seconds == pytest.approx(6)
    assert recorded.total_seconds == pytest.approx(36)
    assert (recorded.score, recorded.cost, recorded.curve) == (10.0, 7.0, [(0.5, 9.0), (1.0, 10.0)])
    assert recorded.test_scores == (None, 9.5)  # of the trial's result, which has the score of its best checkpoint
    assert record_trial(trial, "rouge2", 7.0, test_scores={10: 8.0}).test_scores == (8.0, 8.0)
    assert record_trial(trial, "rouge2", 7.0, test_scores={20: 8.5}).test_scores == (None, 8.5)
    assert record_trial(trial, "rouge2", 7.0, test_scores={}).test_scores == (None, None)


def test_a_search_is_judged_by_the_test_score_of_the_best_checkpoint():
    trial = replace(recorded_trial("2-2", 8.0), test_scores=(None, 3.0, 3.0, 7.0))
    assert [trial.judged_score(count, 2.0) for count in (1, 2, 3, 4)] == [None, 3.0, 3.0, 7.0]
    assert trial.judged_score(4, None) is None  # failed
    assert replace(trial, test_scores=()).judged_score(2, 5.0) == 5.0


def test_test_scores_are_used_only_if_every_finished_trial_has_one():
    tested = replace(recorded_trial("2-2", 8.0), test_scores=(None, None, None, 7.0))
    untested = replace(tested, test_scores=(None,) * 4)
    failed = replace(untested, score=None)
    assert judge_by_one_split({"a": tested, "b": failed}) == {"a": tested, "b": failed}
    assert judge_by_one_split({"a": tested, "b": untested})["a"].test_scores == ()


def test_a_grid_says_how_searches_are_judged():
    every, final = (7.0,) * 4, (None, None, None, 7.0)
    texts = []
    for scores in (every, final, ()):
        trials = {"a": replace(recorded_trial("2-2", 8.0), test_scores=scores)}
        grid = Grid(name="g", space=SPACE, reference=(1.0, 10.0), pass_seconds=0.0, trials=trials)
        # (7 - 1) x (10 - 8) on test, (8 - 1) x (10 - 8) on validation
        assert grid.target.grid_hypervolume == (12 if scores else 14)
        texts.append(describe_judgement(grid))
    assert "test scores of the best checkpoints" in texts[0]
    assert "stopped early, so that these add nothing" in texts[1]
    assert texts[2].startswith("**Searches are judged by validation scores**")


def test_a_replay_decides_by_validation_scores_and_reports_test_scores():
    grid = {}
    for run in space_runs():
        is_strong = run.training.learning_rate == 1e-3
        trial = recorded_trial(str(run.student.size), 8.0 if is_strong else 4.0)
        test_scores = (None, None, None, 7.5) if is_strong else (1.5, 2.5, 3.5, 4.5)
        grid[trial_key(run)] = replace(trial, test_scores=test_scores)
    scores = set()
    for seed in range(12):
        space = SPACE.model_copy(update={"search": SPACE.search.model_copy(update={"seed": seed})})
        scores |= {point.score for point in replay(space, grid, method=SearchMethod("random", "per_shape"))}
    # Each shape has a weak and a strong trial. The weak one is stopped at its first validation if it comes second.
    assert scores == {7.5, 1.5, 4.5}


def test_asha_compares_trials_of_all_shapes():
    by_size = {"2-2": recorded_trial("2-2", 8.0), "2-1": recorded_trial("2-1", 4.0)}
    grid = {trial_key(run): by_size[str(run.student.size)] for run in space_runs()}
    method = SearchMethod("random", "per_shape", is_peer=is_any_trial, stops=stops_by_asha)
    totals = set()
    for seed in range(12):
        space = SPACE.model_copy(update={"search": SPACE.search.model_copy(update={"seed": seed})})
        totals.add(replay(space, grid, method=method)[-1].seconds)
    # Small trials after a large one stop after 13 of 45 seconds: both, one or none of them.
    assert totals <= {116.0, 148.0, 180.0}
    assert min(totals) == 45 + 45 + 13 + 13


def test_every_baseline_is_a_search():
    assert set(BASELINES) < set(SEARCHES)


def space_runs() -> list[Run]:
    """A run for each combination of `SPACE`."""
    return [make_run(SPACE, choices, "s") for choices in iter_corners(SPACE.run)]


@pytest.mark.parametrize(("stopping", "seconds"), [("per_shape", {116.0, 148.0, 180.0}), ("off", {180.0})])
def test_a_replay_tries_every_combination_once(stopping: str, seconds: set[float]):
    grid = {
        trial_key(run): recorded_trial(str(run.student.size), 8.0 if run.training.learning_rate == 1e-3 else 4.0)
        for run in space_runs()
    }
    totals = set()
    for seed in range(6):
        search = SPACE.search.model_copy(update={"stopping": stopping, "seed": seed})
        points = replay(SPACE.model_copy(update={"search": search}), grid)
        assert len(points) == 4
        totals.add(points[-1].seconds)
    assert totals <= seconds
    assert hypervolume([(p.score, p.cost) for p in points], (0, 10)) == 8 * 6


def test_a_trial_can_be_compared_with_the_trials_that_cost_no_more():
    small, large = recorded_trial("2-1", 4.0), recorded_trial("2-2", 4.0)  # of costs 4 and 8
    assert [is_not_more_expensive(large, other) for other in (small, large)] == [True, True]
    assert [is_not_more_expensive(small, other) for other in (small, large)] == [True, False]
    assert [has_same_shape(large, other) for other in (small, large)] == [False, True]
    # The larger student is worse than the smaller one at the first comparison, and then stops after 13 of 45 seconds.
    by_size = {"2-2": recorded_trial("2-2", 2.0), "2-1": recorded_trial("2-1", 8.0)}
    grid = {trial_key(run): by_size[str(run.student.size)] for run in space_runs()}
    method = SearchMethod("random", "per_shape", is_peer=is_not_more_expensive)
    totals = set()
    for seed in range(6):
        space = SPACE.model_copy(update={"search": SPACE.search.model_copy(update={"seed": seed})})
        totals.add(replay(space, grid, method=method)[-1].seconds)
    assert min(totals) == 45 + 45 + 13 + 13


def test_a_replay_ends_when_its_points_are_enough():
    grid = {trial_key(run): recorded_trial(str(run.student.size), 4.0) for run in space_runs()}
    assert len(replay(SPACE, grid, lambda points: len(points) == 3)) == 3


def test_a_failed_trial_costs_time_and_adds_no_point():
    runs = space_runs()
    grid = {trial_key(run): replace(recorded_trial(str(run.student.size), 4.0), score=None) for run in runs}
    # The only trial that does not fail; its scores are below the scores of its shape's other trials.
    grid[trial_key(runs[0])] = recorded_trial(str(runs[0].student.size), 2.0)
    seconds = set()
    for seed in range(12):
        space = SPACE.model_copy(update={"search": SPACE.search.model_copy(update={"seed": seed})})
        seconds |= {tuple(point.seconds for point in replay(space, grid))}
    assert seconds <= {(45.0,), (90.0,), (135.0,), (180.0,)}
    assert len(seconds) > 1


def test_the_grid_of_the_demo_has_about_110_trials():
    space = read_space(Path(__file__).parents[2] / "benchmarks/spaces/search_demo.yaml")
    combinations = len(list(iter_corners(space.run)))
    assert combinations == space.search.trials
    assert 100 <= combinations <= 120


@pytest.mark.slow
def test_live_sweeps_are_compared_by_the_hypervolume_of_the_grid(tmp_path: Path):
    teacher, data = make_world(tmp_path)
    run = {
        "teacher": str(teacher),
        "dataset": {"name": str(data), "max_source_tokens": 32, "max_target_tokens": 16, "selection_share": 0},
        "student": {"size": {"choice": ["2-2", "2-1"]}},
        "training": {"learning_rate": {"choice": [1e-3, 1e-4]}, "epochs": 4, "batch_size": 8, "patience": 99},
        "decoding": {"beams": 1, "max_length": 12},
        "evaluation": {"allow_repetitive_teacher": True},
    }
    search = {"trials": 4, "sampler": "grid", "stopping": "off"}
    serving = {"beams": [], "precision": ["fp32"]}
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({"name": "grid", "run": run, "search": search, "serving": serving}))
    sweep = Path(last_json(command(tmp_path / "outputs", "sweep", path, "--json"))["sweep"])
    grid = read_grid(sweep)
    live = run_live_sweeps(sweep, 3, 2)
    assert [len(points) for points in live.values()] == [2, 2]
    for points in live.values():
        assert 0 < points[0].seconds < points[1].seconds
        assert {point.cost for point in points} <= {trial.cost for trial in grid.values()}
    rows, records = live_rows(live, Target(1.0, (0.0, 1e9), 0.0))
    assert [row[0] for row in rows] == list(live)
    assert all(np.isfinite(record["reached"]) for record in records)
