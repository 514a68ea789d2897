"""Hypervolumes of two sweeps after equal device-time, worked out by hand."""

from pathlib import Path

import pytest

from benchmarks.compare_spaces import ScoredTrial, SweepSide, as_markdown, compare_pair, front_hypervolume
from raydistill.config.corners import iter_corners
from raydistill.config.space import make_run, read_space

SPACES = Path(__file__).parents[2] / "benchmarks/spaces"
LATENCIES = {"6-6": 1.02, "6-3": 0.75, "6-1": 0.5, "2-2": 0.6}
FIRST = SweepSide(
    "first",
    1.0,
    (ScoredTrial("6-6", 36.0, 1.0), ScoredTrial("6-3", 35.0, 1.0), ScoredTrial("6-1", 17.0, 1.0)),
    teacher_test=36.0,
)
LARGER = SweepSide(
    "larger",
    1.5,
    (
        ScoredTrial("2-2", 34.0, 1.0),
        ScoredTrial("6-3", None, 0.5),  # stopped
        ScoredTrial("6-1", 31.0, 1.0),
        ScoredTrial("6-3", 35.0, 0.5),  # after the time of the other sweep
    ),
    teacher_test=36.0,
)


def test_trials_count_as_long_as_they_end_within_the_device_time():
    assert FIRST.hours == 4.0
    assert LARGER.within(4.0) == LARGER.trials[:3]
    assert LARGER.within(3.9) == LARGER.trials[:2]
    assert LARGER.within(1.0) == ()
    assert FIRST.within(FIRST.hours) == FIRST.trials


def test_hypervolume_of_shares_of_the_teachers_latency():
    # 6-1 is below the reference score and 6-6 is slower than the teacher: (35 - 18) x (1 - 0.75).
    assert front_hypervolume(FIRST.trials, LATENCIES, 18.0) == pytest.approx(4.25)
    # From a score of 0: 17 x 0.5, then (35 - 17) x 0.25.
    assert front_hypervolume(FIRST.trials, LATENCIES, 0.0) == pytest.approx(13.0)


def test_gain_after_equal_device_time():
    pair = compare_pair(LARGER, FIRST, LATENCIES)
    assert (pair["hours"], pair["larger_hours"], pair["trials"]) == (4.0, 4.0, 3)
    # (31 - 18) x 0.5, then (34 - 31) x 0.4, over 4.25
    assert pair["half_gain"] == pytest.approx(7.7 / 4.25 - 1)
    # 31 x 0.5, then 3 x 0.4, over 13
    assert pair["zero_gain"] == pytest.approx(16.7 / 13 - 1)
    timings = [{"size": "2-2", "ratio": 0.6, "interval": (0.59, 0.61), "stop_reason": "precise"}]
    text = as_markdown([pair], timings, 36.0)
    assert "Mean gain of 1: +81.2%; at least +15% was asked for." in text
    assert "| larger | first | 4.000 | 4.000 | 3 | 7.700 | 4.250 | +81.2% | +28.5% |" in text
    assert "| 2-2 | 0.600 | [0.590, 0.610] | precise |" in text


def test_the_space_of_version_1_has_every_depth_with_every_method_at_one_rate():
    space = read_space(SPACES / "multi30k_version1.yaml")
    runs = [make_run(space, params, space.name) for params in iter_corners(space.run)]
    assert {(run.method, run.student.size) for run in runs} == {
        (method, size) for method in ("sft", "kd", "pl") for size in ("6-6", "6-3", "6-2", "6-1")
    }
    assert len(runs) == space.search.trials == 12
    assert {run.training.learning_rate for run in runs} == {5e-4}


@pytest.mark.parametrize("name", ["grid_multi30k", "grid_mscmdlets", "search_shapes"])
def test_a_grid_has_as_many_trials_as_combinations(name):
    space = read_space(SPACES / f"{name}.yaml")
    assert (len(list(iter_corners(space.run))), space.search.cost) == (space.search.trials, "params_m")
