"""The replay's arithmetic, by hand."""

import pytest

from benchmarks.search_efficiency import Point, Recorded, compare, cut, hypervolume, replay, seconds_to
from raydistill.cluster.search import key_of
from raydistill.config.space import Space, corners, resolve


def test_hypervolume_by_hand():
    points = [(3.0, 2.0), (5.0, 6.0), (2.0, 7.0), (9.0, 11.0), (0.5, 1.0)]
    # over the reference (1, 10): (3 - 1) x (10 - 2), then (5 - 3) x (10 - 6); the others add nothing
    assert hypervolume(points, (1.0, 10.0)) == 16 + 8
    assert hypervolume([], (1.0, 10.0)) == 0


def test_time_to_a_hypervolume():
    points = [Point(10, 3, 2), Point(25, 5, 6)]
    assert seconds_to(points, 16, (1, 10)) == 10
    assert seconds_to(points, 24, (1, 10)) == 25
    assert seconds_to(points, 25, (1, 10)) is None


def test_ratio_of_medians():
    ratio, low, high = compare([1.0] * 9, [4.0] * 9)
    assert (ratio, low, high) == (0.25, 0.25, 0.25)


SPACE = Space.model_validate(
    {
        "name": "s",
        "run": {
            "teacher": "t",
            "dataset": "d",
            "student": {"size": {"choice": ["2-2", "2-1"]}},
            "training": {"learning_rate": {"choice": [1e-3, 1e-4]}},
        },
        "search": {"stopping": "per_shape", "sampler": "random", "trials": 4},
    }
)


def record(size: str, score: float) -> Recorded:
    curve = [(share, share * score) for share in (0.25, 0.5, 0.75, 1.0)]
    return Recorded(size, curve, (10.0, 20.0, 30.0, 40.0), 5.0, score, 8.0 if size == "2-2" else 4.0)


def test_a_trial_that_is_stopped_is_charged_what_it_ran_and_its_scoring():
    weak = record("2-2", 4.0)
    assert cut(weak, [], SPACE.search) == (4, 45.0, 4.0)
    assert cut(weak, [record("2-2", 8.0).curve], SPACE.search) == (1, 15.0, 1.0)


@pytest.mark.parametrize(("stopping", "seconds"), [("per_shape", {120.0, 150.0, 180.0}), ("off", {180.0})])
def test_a_replay_tries_all_of_the_grid_once(stopping: str, seconds: set[float]):
    runs = [resolve(SPACE, chosen, "s") for chosen in corners(SPACE.run)]
    grid = {
        key_of(run): record(str(run.student.size), 8.0 if run.training.learning_rate == 1e-3 else 4.0) for run in runs
    }
    totals = set()
    for seed in range(6):
        search = SPACE.search.model_copy(update={"stopping": stopping, "seed": seed})
        points = replay(SPACE.model_copy(update={"search": search}), grid)
        assert len(points) == 4
        totals.add(points[-1].seconds)
    assert totals <= seconds
    assert hypervolume([(p.score, p.latency) for p in points], (0, 10)) == 8 * 6
