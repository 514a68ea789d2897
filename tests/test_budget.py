"""The front against brute force; choices worked out by hand."""

from statistics import median

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydistill.core.errors import UserError
from raydistill.results.pareto import Candidate, absolute_bounds, choose, feasible, front, on_one_clock


def candidate(key: str, score: float, latency: float, rows: np.ndarray | None = None, **costs: float) -> Candidate:
    return Candidate(key, score, rows, {"latency_ms": latency, **costs}, label=f"student {key}")


POINTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12)


@given(POINTS)
def test_front_is_what_brute_force_finds(points: list[tuple[int, int]]) -> None:
    candidates = [candidate(str(i), score, cost) for i, (score, cost) in enumerate(points)]
    undominated = {
        str(i)
        for i, (score, cost) in enumerate(points)
        if not any(s >= score and c <= cost and (s, c) != (score, cost) for s, c in points)
    }
    found = front(candidates, "latency_ms")
    assert {c.key for c in found} == undominated
    assert [c.costs["latency_ms"] for c in found] == sorted(c.costs["latency_ms"] for c in found)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.integers(0, 3)), max_size=12))
def test_on_one_clock_the_front_is_what_brute_force_finds_of_the_medians(points: list[tuple[int, int, int]]) -> None:
    """(score, milliseconds, shape): a shape costs its median; of one shape only the highest score is on the front."""
    costs = on_one_clock([{"latency_ms": ms} for _, ms, _ in points], [shape for _, _, shape in points])
    paid = [median(m for _, m, other in points if other == shape) for _, _, shape in points]
    assert [cost["latency_ms"] for cost in costs] == paid
    candidates = [candidate(str(i), score, costs[i]["latency_ms"]) for i, (score, _, _) in enumerate(points)]
    scores = [score for score, _, _ in points]
    undominated = {
        str(i)
        for i, mine in enumerate(zip(scores, paid, strict=True))
        if not any(s >= mine[0] and ms <= mine[1] and (s, ms) != mine for s, ms in zip(scores, paid, strict=True))
    }
    found = front(candidates, "latency_ms")
    assert {c.key for c in found} == undominated
    for shape in {shape for _, _, shape in points}:
        there = {scores[int(c.key)] for c in found if points[int(c.key)][2] == shape}
        assert there <= {max(score for score, _, other in points if other == shape)}


def test_half_a_percent_of_the_same_shape_is_no_saving() -> None:
    """100.0 and 99.5 ms of one shape, scores that cannot be told apart: the higher score, not the lucky timing."""
    base = np.linspace(0, 40, 400)
    noise = np.where(np.arange(400) % 2 == 0, 5.0, -5.0)
    timed = [{"latency_ms": 100.0, "params_m": 3.0}, {"latency_ms": 99.5, "params_m": 4.0}]

    def both(alike: list[str]) -> list[Candidate]:
        costs = on_one_clock(timed, alike)
        return [Candidate("better", 20.2, base + 0.2, costs[0]), Candidate("lucky", 20.0, base + noise, costs[1])]

    same, other = both(["2-1", "2-1"]), both(["2-1", "2-2"])
    assert [c.costs["latency_ms"] for c in same] == [99.75, 99.75]
    assert [c.costs["params_m"] for c in same] == [3.0, 4.0], "only milliseconds are noisy"
    assert [c.key for c in front(same, "latency_ms")] == ["better"]
    choice = choose(same, {"latency_ms": 100.0}, "rouge2")
    assert choice.best is not None
    assert choice.best.key == "better"
    assert [c.key for c in front(other, "latency_ms")] == ["lucky", "better"]
    assert choose(other, {"latency_ms": 100.0}, "rouge2").best is other[1]


def test_the_spread_on_one_clock_is_that_of_all() -> None:
    timed = [{"latency_ms": ms, "latency_ms_low": ms - 5, "latency_ms_high": ms + 5} for ms in (10.0, 14.0, 11.0)]
    wanted = {"latency_ms": 11.0, "latency_ms_low": 5.0, "latency_ms_high": 19.0}
    assert on_one_clock([*timed, {"gpu_hours": 1.0}], ["a"] * 4) == [wanted] * 3 + [{"gpu_hours": 1.0}]


@given(POINTS, st.integers(0, 5))
def test_the_choice_within_a_bound_has_the_highest_score(points: list[tuple[int, int]], bound: int) -> None:
    candidates = [candidate(str(i), score, cost) for i, (score, cost) in enumerate(points)]
    choice = choose(candidates, {"latency_ms": bound + 0.5}, "rouge2")
    scores = [score for score, cost in points if cost <= bound + 0.5]
    assert (choice.best.score if choice.best else None) == max(scores, default=None)


def test_front_leaves_out_what_was_not_measured() -> None:
    assert front([Candidate("a", 9, None, {}), candidate("b", 1, 1)], "latency_ms")[0].key == "b"


def test_percentages_are_of_the_teacher() -> None:
    bounds = absolute_bounds({"latency_ms": "50%", "params_m": 120}, {"latency_ms": 1900.0})
    assert bounds == {"latency_ms": 950.0, "params_m": 120.0}
    with pytest.raises(UserError, match="no measured memory_mb"):
        absolute_bounds({"memory_mb": "50%"}, {"latency_ms": 1})


def test_a_bound_is_inclusive_and_all_must_hold() -> None:
    a, b = candidate("a", 1, 10, params_m=5), candidate("b", 2, 11, params_m=4)
    assert feasible([a, b], {"latency_ms": 10}) == [a]
    assert feasible([a, b], {"latency_ms": 11, "params_m": 4}) == [b]
    assert feasible([a], {"memory_mb": 10}) == []


def test_the_cheapest_that_cannot_be_told_from_the_highest_wins() -> None:
    base = np.linspace(0, 40, 400)
    noise = np.where(np.arange(400) % 2 == 0, 5.0, -5.0)  # mean 0, standard error of the mean 0.25
    best = candidate("best", 20.1, 100, base + 0.1)
    close = candidate("close", 20.0, 60, base + noise)
    far = candidate("far", 18.0, 50, base + noise - 2)  # eight standard errors away
    slower = candidate("slower", 20.05, 120, base + noise + 0.05)
    choice = choose([far, slower, best, close], {"latency_ms": 130}, "rouge2")
    assert choice.best is close
    assert choice.highest is best
    assert choice.indistinguishable == [close]
    assert choice.comparisons["far"].low > 0
    assert "student close cannot be told from it: 0.10 less" in choice.reason
    assert "40% less latency_ms" in choice.reason


def test_cheaper_is_by_the_first_bounded_cost() -> None:
    rows = np.array([1.0, 2, 3, 4])
    a = candidate("a", 2.6, 100, rows + 0.1 * np.array([1, -1, 1, -0.6]), params_m=50)
    b = candidate("b", 2.5, 120, rows, params_m=40)
    assert choose([a, b], {"params_m": 60}, "rouge2").best is b
    assert choose([a, b], {"latency_ms": 200}, "rouge2").best is a
    assert choose([a, b], {}, "rouge2").best is a


def test_without_the_same_rows_the_higher_score_stands() -> None:
    a, b = candidate("a", 2, 100, np.ones(4)), candidate("b", 1, 50, np.ones(3))
    choice = choose([a, b], {}, "rouge2")
    assert choice.best is a
    assert "no cheaper student equals it" in choice.reason


def test_ties_go_to_the_cheaper() -> None:
    assert choose([candidate("a", 2, 100), candidate("b", 2, 50)], {}, "rouge2").best == candidate("b", 2, 50)


@pytest.mark.parametrize(
    ("share", "text"),
    [(1.2, "20.0% over"), (3.0, "200.0% over"), (3.04, "3.0 times the bound"), (50.997, "51 times the bound")],
)
def test_a_wide_miss_is_told_as_a_factor(share: float, text: str) -> None:
    reason = choose([candidate("a", 1.0, 10 * share)], {"latency_ms": 10.0}, "rouge2").reason
    assert f"({text})" in reason


def test_nothing_fits_names_the_nearest_miss() -> None:
    choice = choose([candidate("a", 2, 100), candidate("b", 1, 60)], {"latency_ms": 50}, "rouge2")
    assert choice.best is None
    assert "no student fits latency_ms <= 50; the nearest is student b with latency_ms 60 (20.0% over)" in choice.reason
    assert choose([], {}, "rouge2").reason == "no student has finished yet"
    assert "memory_mb was not measured" in choose([candidate("a", 2, 100)], {"memory_mb": 9}, "rouge2").reason
