"""The front against brute force; choices worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydistill.config.errors import UserError
from raydistill.results.budget import Candidate, absolute_bounds, choose, feasible, front


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
