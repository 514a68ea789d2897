"""The Pareto front against brute force, and choices computed by hand."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from raydistill.core.errors import UserError
from raydistill.evaluation.metrics import Comparison
from raydistill.results.pareto import (
    Candidate,
    choose,
    describe_bounds,
    describe_nearest_miss,
    feasible,
    fits_any_budget,
    nearest_rival,
    pareto_front,
    resolve_bounds,
    resolve_budgets,
    rows_needed,
)

TOLERANCE = 0.5


def candidate(key: str, score: float, latency: float, rows: np.ndarray | None = None, **costs: float) -> Candidate:
    return Candidate(key, score, rows, {"latency_ms": latency, **costs}, label=f"student {key}")


POINTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12)


@given(POINTS)
def test_front_equals_brute_force(points: list[tuple[int, int]]) -> None:
    candidates = [candidate(str(i), score, cost) for i, (score, cost) in enumerate(points)]
    undominated = {
        str(i)
        for i, (score, cost) in enumerate(points)
        if not any(s >= score and c <= cost and (s, c) != (score, cost) for s, c in points)
    }
    front = pareto_front(candidates, "latency_ms")
    assert {c.key for c in front} == undominated
    assert [c.costs["latency_ms"] for c in front] == sorted(c.costs["latency_ms"] for c in front)


@given(POINTS, st.integers(0, 5))
def test_choice_has_the_highest_score_within_the_bound(points: list[tuple[int, int]], bound: int) -> None:
    candidates = [candidate(str(i), score, cost) for i, (score, cost) in enumerate(points)]
    choice = choose(candidates, {"latency_ms": bound + 0.5}, "rouge2", TOLERANCE)
    scores = [score for score, cost in points if cost <= bound + 0.5]
    assert (choice.best.score if choice.best else None) == max(scores, default=None)


def test_front_excludes_candidates_without_the_cost() -> None:
    assert pareto_front([Candidate("a", 9, None, {}), candidate("b", 1, 1)], "latency_ms")[0].key == "b"


def served(key: str, score: float, rows_per_s: float, **costs: float) -> Candidate:
    return Candidate(key, score, None, {"rows_per_s": rows_per_s, **costs}, f"student {key}")


def test_rows_per_second_are_bounded_from_below() -> None:
    slow, fast = served("slow", 30, 50, latency_ms=10), served("fast", 20, 200, latency_ms=40)
    assert feasible([slow, fast], {"rows_per_s": 50}) == [slow, fast]
    assert feasible([slow, fast], {"rows_per_s": 51}) == [fast]
    assert feasible([slow, fast], {"latency_ms": 20, "rows_per_s": 50}) == [slow]
    assert feasible([slow, fast], {"latency_ms": 20, "rows_per_s": 51}) == []
    assert feasible([candidate("unmeasured", 1, 1)], {"rows_per_s": 1}) == []
    assert choose([slow, fast], {"rows_per_s": 60}, "bleu", TOLERANCE).best is fast
    assert "within rows_per_s >= 60" in choose([slow, fast], {"rows_per_s": 60}, "bleu", TOLERANCE).reason
    assert describe_bounds({"latency_ms": 20, "rows_per_s": 60}) == "latency_ms <= 20, rows_per_s >= 60"


def test_rows_per_second_of_a_shape_admit_it_to_a_budget_from_the_bound_upwards() -> None:
    budgets = [{"rows_per_s": 100.0, "latency_ms": 40.0}]
    assert fits_any_budget({"rows_per_s": 100.0, "latency_ms": 40.0}, budgets)
    assert not fits_any_budget({"rows_per_s": 99.0}, budgets)
    assert not fits_any_budget({"rows_per_s": 150.0, "latency_ms": 41.0}, budgets)
    assert fits_any_budget({"latency_ms": 40.0}, budgets), "unknown until finalists are served"


def test_percentage_of_the_teachers_rows_per_second() -> None:
    assert resolve_bounds({"rows_per_s": "200%"}, {"rows_per_s": 30.0}) == {"rows_per_s": 60.0}
    budgets: dict[str, dict[str, Any]] = {
        "bulk": {"rows_per_s": "200%", "latency_ms": "50%"},
        "any": {"params_m": 3},
    }
    assert resolve_budgets(budgets, {"latency_ms": 80.0}) == [{"latency_ms": 40.0}, {"params_m": 3.0}]


def test_front_and_choice_prefer_more_rows_per_second() -> None:
    rows = np.linspace(0, 40, 400)
    noise = np.where(np.arange(400) % 2 == 0, 3.0, -3.0)
    best = Candidate("best", 20.1, rows + 0.1, {"rows_per_s": 100.0}, "student best")
    close = Candidate("close", 20.0, rows + noise, {"rows_per_s": 150.0}, "student close")
    closer = Candidate("closer", 20.05, rows + noise + 0.05, {"rows_per_s": 90.0}, "student closer")
    far = Candidate("far", 15.0, rows - 5, {"rows_per_s": 300.0}, "student far")
    assert pareto_front([best, close, closer, far], "rows_per_s") == [far, close, best]
    choice = choose([best, close, closer, far], {"rows_per_s": 80.0}, "rouge2", TOLERANCE)
    assert choice.best is close
    assert choice.non_inferior == [close]
    assert "with 50% more rows_per_s" in choice.reason


def test_nearest_miss_of_a_lower_bound_is_a_percentage_under() -> None:
    slow, slower = served("slow", 30, 80), served("slower", 35, 10)
    reason = choose([slow, slower], {"rows_per_s": 100}, "bleu", TOLERANCE).reason
    assert reason.startswith(
        "no student fits rows_per_s >= 100; the nearest is student slow with rows_per_s 80 (20.0% "
    )
    assert "(20.0% under), 30.00 points" in reason
    costs = {"2-1": {"rows_per_s": 80.0, "latency_ms": 60.0}, "2-2": {"rows_per_s": 50.0, "latency_ms": 70.0}}
    # 2-1: 1.2 times the latency, and 1.25 times the seconds per row
    miss = describe_nearest_miss(costs, {"bulk": {"rows_per_s": 100.0, "latency_ms": 50.0}})
    assert miss == "2-1 for bulk: rows_per_s 80 (20.0% under)"


def test_percentage_bounds_are_relative_to_the_teacher() -> None:
    bounds = resolve_bounds({"latency_ms": "50%", "params_m": 120}, {"latency_ms": 1900.0})
    assert bounds == {"latency_ms": 950.0, "params_m": 120.0}
    with pytest.raises(UserError, match="no measured memory_mb"):
        resolve_bounds({"memory_mb": "50%"}, {"latency_ms": 1})


def test_bounds_are_inclusive_and_all_must_hold() -> None:
    a, b = candidate("a", 1, 10, params_m=5), candidate("b", 2, 11, params_m=4)
    assert feasible([a, b], {"latency_ms": 10}) == [a]
    assert feasible([a, b], {"latency_ms": 11, "params_m": 4}) == [b]
    assert feasible([a], {"memory_mb": 10}) == []


def test_cheapest_student_that_is_not_inferior_is_chosen() -> None:
    base = np.linspace(0, 40, 400)
    noise = np.where(np.arange(400) % 2 == 0, 3.0, -3.0)  # mean 0, standard error of the mean 0.15
    best = candidate("best", 20.1, 100, base + 0.1)
    close = candidate("close", 20.0, 60, base + noise)  # lower end 0.4 below best
    closer = candidate("closer", 20.05, 80, base + noise + 0.05)
    far = candidate("far", 18.0, 50, base + noise - 2)
    slower = candidate("slower", 20.05, 120, base + noise + 0.05)
    choice = choose([far, slower, best, close, closer], {"latency_ms": 130}, "rouge2", TOLERANCE)
    assert choice.best is close
    assert choice.highest is best
    assert choice.non_inferior == [close, closer]
    assert choice.comparisons["close"].low == pytest.approx(-0.1 - 1.96 * 0.15, abs=0.02)
    assert choice.comparisons["far"].high < 0
    assert "student close is not inferior with a tolerance of 0.5 points: -0.10, 95 % interval [-0." in choice.reason
    assert "40% less latency_ms (the cheapest of 2 such students)" in choice.reason
    assert "too few" not in choice.reason, "no number of rows brings a student closer that is 2 points behind"


def test_cheaper_student_is_not_chosen_while_its_interval_reaches_below_the_tolerance() -> None:
    """With a standard error of 0.25, the lower end of the interval is 0.59 below the best: not shown, not refuted."""
    base = np.linspace(0, 40, 400)
    noise = np.where(np.arange(400) % 2 == 0, 5.0, -5.0)
    best, unsure = candidate("best", 20.1, 100, base + 0.1), candidate("unsure", 20.0, 60, base + noise)
    choice = choose([best, unsure], {}, "rouge2", TOLERANCE)
    assert choice.best is best
    assert choice.non_inferior == []
    assert "no cheaper student is shown to be within the tolerance of 0.5 points" in choice.reason
    # The distance 0.49 must shrink to 0.4: 400 * (0.49 / 0.4)^2 = 600
    assert "400 rows are too few for student unsure (-0.10, 95 % interval" in choice.reason
    needed = int(choice.reason.split("about ")[1].split(" rows")[0])
    assert 570 <= needed <= 630
    assert choose([best, unsure], {}, "rouge2", 0.7).best is unsure
    assert choose([best, unsure], {}, "rouge2", 0.0).best is best


def test_reason_names_a_more_expensive_student_that_may_be_better() -> None:
    """The highest score of a cheaper student may be luck: 200 rows do not show that the larger student is worse."""
    base = np.linspace(0, 40, 200)
    noise = np.where(np.arange(200) % 2 == 0, 5.0, -5.0)  # standard error 0.35
    highest, larger = candidate("highest", 20.0, 60, base), candidate("larger", 19.9, 100, base + noise - 0.1)
    choice = choose([highest, larger], {}, "rouge2", TOLERANCE)
    assert choice.best is highest
    assert "no student is cheaper. student larger, which is more expensive, may be better by more than" in choice.reason
    needed = int(choice.reason.split("about ")[1].split(" rows")[0])
    assert needed == pytest.approx(200 * (1.96 * 0.3536 / 0.6) ** 2, rel=0.05)  # 267
    worse = candidate("worse", 18.0, 100, base + noise - 2)
    assert "may be better" not in choose([highest, worse], {}, "rouge2", TOLERANCE).reason


def test_rows_needed_by_hand() -> None:
    comparison = Comparison(difference=-0.1, low=-0.9, high=0.7, p_value=0.8)
    assert rows_needed(comparison, 200, 0.5) == 800  # 0.8 must become 0.4: four times the rows
    assert rows_needed(comparison, 210, 0.5) == 840
    assert rows_needed(comparison, 211, 0.5) == 850  # 844, rounded up to two digits
    assert rows_needed(Comparison(-0.5, -0.6, -0.4, 0.01), 200, 0.5) is None


ROWS_OF_FOUR = st.lists(st.integers(0, 6), min_size=4, max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.lists(ROWS_OF_FOUR, min_size=1, max_size=5), st.sampled_from([0.3, 0.8, 1.7]))
def test_choice_equals_brute_force_over_all_resamples(rows: list[list[int]], tolerance: float) -> None:
    """Four rows have 256 resamples, which give the exact distribution of every difference."""
    candidates = [candidate(str(i), float(np.mean(r)), i, np.array(r, dtype=float)) for i, r in enumerate(rows)]
    top = max(c.score for c in candidates)
    highest = next(c for c in candidates if c.score == top)
    draws = np.array(list(itertools.product(range(4), repeat=4)))
    expected = highest
    for c in candidates[int(highest.key) :: -1]:
        assert c.rows is not None
        assert highest.rows is not None
        # The ends for slightly more and fewer resamples below: at the tolerance, 10,000 random resamples may differ
        differences = (c.rows - highest.rows)[draws].mean(axis=1)
        outer, inner = np.percentile(differences, [1.8, 3.2])
        assume(not outer <= -tolerance < inner)
        expected = c if outer > -tolerance else expected
    assert choose(candidates, {}, "rouge2", tolerance).best is expected


def test_first_bounded_cost_decides_which_student_is_cheaper() -> None:
    rows = np.array([1.0, 2, 3, 4])
    a = candidate("a", 2.6, 100, rows + 0.1 * np.array([1, -1, 1, -0.6]), params_m=50)
    b = candidate("b", 2.5, 120, rows, params_m=40)
    assert choose([a, b], {"params_m": 60}, "rouge2", TOLERANCE).best is b
    assert choose([a, b], {"latency_ms": 200}, "rouge2", TOLERANCE).best is a
    assert choose([a, b], {}, "rouge2", TOLERANCE).best is a


def test_higher_score_is_chosen_when_rows_are_not_comparable() -> None:
    a, b = candidate("a", 2, 100, np.ones(4)), candidate("b", 1, 50, np.ones(3))
    choice = choose([a, b], {}, "rouge2", TOLERANCE)
    assert choice.best is a
    assert "no cheaper student was scored on the same rows" in choice.reason


def test_equal_scores_choose_the_cheaper_student() -> None:
    cheaper = candidate("b", 2, 50)
    assert choose([candidate("a", 2, 100), cheaper], {}, "rouge2", TOLERANCE).best is cheaper


@pytest.mark.parametrize(
    ("share", "text"),
    [(1.2, "20.0% over"), (3.0, "200.0% over"), (3.04, "3.0 times the bound"), (50.997, "51 times the bound")],
)
def test_excess_above_200_percent_is_reported_as_a_factor(share: float, text: str) -> None:
    reason = choose([candidate("a", 1.0, 10 * share)], {"latency_ms": 10.0}, "rouge2", TOLERANCE).reason
    assert f"({text})" in reason


def test_reason_names_the_nearest_miss_when_nothing_fits() -> None:
    choice = choose([candidate("a", 2, 100), candidate("b", 1, 60)], {"latency_ms": 50}, "rouge2", TOLERANCE)
    assert choice.best is None
    assert "no student fits latency_ms <= 50; the nearest is student b with latency_ms 60 (20.0% over)" in choice.reason
    assert choose([], {}, "rouge2", TOLERANCE).reason == "no student has finished yet"
    unmeasured = choose([candidate("a", 2, 100)], {"memory_mb": 9}, "rouge2", TOLERANCE)
    assert "memory_mb was not measured" in unmeasured.reason


def with_seeds(key: str, latency: float, *scores: float) -> Candidate:
    """A candidate of equal rows, trained with one seed for each score."""
    rows = [np.full(30, score) for score in scores]
    mean = float(np.mean(scores))
    return Candidate(key, mean, rows[0], {"latency_ms": latency}, f"student {key}", other_seeds=tuple(rows[1:]))


def test_seeds_that_vary_by_more_than_the_tolerance_do_not_replace_the_best() -> None:
    """The means differ by 0.1; with seeds of 19.9 or 21.9 against 20.9 and 21.1, the difference may be -1.2."""
    best, cheaper = with_seeds("best", 2, 20.9, 21.1), with_seeds("cheaper", 1, 19.9, 21.9)
    choice = choose([best, cheaper], {}, "rouge2", TOLERANCE)
    assert choice.best is best
    assert choice.comparisons["cheaper"].low == pytest.approx(-1.2)
    steady = with_seeds("cheaper", 1, 20.8, 21.0)
    assert choose([best, steady], {}, "rouge2", TOLERANCE).best is steady


def test_the_nearest_rival_is_of_another_trial() -> None:
    def trial_of(key: str) -> str:
        return key.split()[0]

    rows = np.random.default_rng(0).normal(20, 5, size=200)
    best = candidate("best 4", 21.0, 3, rows + 1.0)
    own = candidate("best 1", 20.9, 2, rows + 0.9)  # the same trial with fewer beams
    near, far = candidate("near 4", 20.0, 2.5, rows), candidate("far 4", 15.0, 1, rows - 5)
    choice = choose([best, own, near, far], {}, "rouge2", TOLERANCE)
    assert choice.best is own
    assert nearest_rival(choice, trial_of) == "near 4"  # the highest is of the same trial
    close = candidate("near 4", 20.95, 1.5, rows + 0.95)
    choice = choose([best, close, far], {}, "rouge2", TOLERANCE)
    assert choice.best is close
    assert nearest_rival(choice, trial_of) == "best 4"
    assert nearest_rival(choose([best, own], {}, "rouge2", TOLERANCE), trial_of) is None
    assert nearest_rival(choose([], {}, "rouge2", TOLERANCE), trial_of) is None
