"""Budgets, the Pareto front and the choice of a student, as pure functions over candidates."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raydistill.config.space import LOWER_BOUNDED
from raydistill.core.errors import UserError
from raydistill.evaluation.metrics import Comparison, compare_with_reference

COST_UNITS = {
    "latency_ms": "ms for a batch of 32",
    "latency_ms_b1": "ms for one row",
    "params_m": "million parameters",
    "memory_mb": "MB of weights",
    "peak_mb": "MB of peak memory for a batch of 32",
    "device_hours": "device-hours",
    "rows_per_s": "rows per second",
}


@dataclass(frozen=True)
class Candidate:
    """A scored student.

    Attributes:
        key: Name of the student.
        score: Score on the rows that students are chosen on; higher is better.
        rows: Per-row statistics of the score as the metric's bootstrap reads them; None if they were not kept.
        costs: Costs in the units of `COST_UNITS`.
        label: The student in texts; the key if empty.
        intervals: Confidence intervals of the costs that have one.
        other_seeds: Per-row statistics of the same student trained with other seeds; `score` is then the mean.
    """

    key: str
    score: float
    rows: np.ndarray | None = field(repr=False, compare=False)
    costs: dict[str, float] = field(compare=False)
    label: str = ""
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict, compare=False)
    other_seeds: tuple[np.ndarray, ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True)
class Choice:
    """The chosen student and the reason for choosing it, in one to three sentences.

    Attributes:
        best: The first student of `non_inferior`, or `highest` if the list is empty; None if no student fits the
            bounds.
        highest: The student with the highest score within the bounds.
        non_inferior: The cheaper students within the bounds that are not inferior to `highest`, cheapest first.
        comparisons: By key, the difference candidate - highest of the cheaper and the more expensive students that
            were scored on the same rows as `highest`.
        reason: Why `best` was chosen.
    """

    best: Candidate | None
    highest: Candidate | None
    non_inferior: list[Candidate]
    comparisons: dict[str, Comparison]
    reason: str


def as_cost(name: str, value: float) -> float:
    """A measurement as a cost to minimise: seconds per row for `rows_per_s`, and the value itself for all others."""
    return 1 / value if name in LOWER_BOUNDED else value


def share_of_bound(name: str, value: float, bound: float) -> float:
    """The share of a bound that a measurement uses; up to 1 fits. Half of a lower bound uses 2."""
    return as_cost(name, value) / as_cost(name, bound)


def resolve_bounds(bounds: dict[str, Any], teacher_costs: dict[str, float]) -> dict[str, float]:
    """Convert bounds to numbers; "50%" is half of the teacher's cost, and "200%" twice its rows per second.

    Raises:
        UserError: A bound is a percentage of a cost that was not measured on the teacher.
    """
    numbers = {key: _resolve_bound(key, bound, teacher_costs) for key, bound in bounds.items()}
    for key, number in numbers.items():
        if number is None:
            raise UserError(
                f"{key}={bounds[key]}: the teacher has no measured {key}; give a number instead of a percentage"
            )
    return {key: number for key, number in numbers.items() if number is not None}


def resolve_budgets(budgets: dict[str, dict[str, Any]], teacher_costs: dict[str, float]) -> list[dict[str, float]]:
    """Convert every budget's bounds to numbers, without percentages of costs that were not measured on the teacher."""
    resolved = []
    for bounds in budgets.values():  # `load_selection` reports what cannot be resolved
        numbers = {key: _resolve_bound(key, bound, teacher_costs) for key, bound in bounds.items()}
        resolved.append({key: number for key, number in numbers.items() if number is not None})
    return resolved


def _resolve_bound(key: str, bound: Any, teacher_costs: dict[str, float]) -> float | None:
    """A bound as a number; None for a percentage of a cost that was not measured on the teacher."""
    text = str(bound).strip()
    if not text.endswith("%"):
        return float(text)
    cost = teacher_costs.get(key)
    return None if cost is None else float(text[:-1]) / 100 * cost


def feasible(candidates: Sequence[Candidate], bounds: dict[str, float]) -> list[Candidate]:
    """Candidates within every bound (inclusive); a cost that was not measured fits no bound."""
    return [c for c in candidates if all(_share_of_bound(c, key, bound) <= 1 for key, bound in bounds.items())]


def fits_any_budget(costs: dict[str, float], budgets: Sequence[dict[str, float]]) -> bool:
    """Whether the known costs fit at least one budget; unknown costs are ignored, and no budgets admit everything."""
    return not budgets or any(
        all(share_of_bound(key, costs[key], bound) <= 1 for key, bound in bounds.items() if key in costs)
        for bounds in budgets
    )


def pareto_front(candidates: Sequence[Candidate], cost: str) -> list[Candidate]:
    """Candidates that no other candidate dominates in score and cost, cheapest first.

    Candidates that tie in both are all kept; candidates without this cost are left out.
    """
    priced = [c for c in candidates if cost in c.costs]
    front: list[Candidate] = []
    for c in sorted(priced, key=lambda c: (as_cost(cost, c.costs[cost]), -c.score)):
        ties_with_last = front and (front[-1].costs[cost], front[-1].score) == (c.costs[cost], c.score)
        if not front or c.score > front[-1].score or ties_with_last:
            front.append(c)
    return front


def choose(candidates: Sequence[Candidate], bounds: dict[str, float], metric: str, tolerance: float) -> Choice:
    """Choose the cheapest candidate within the bounds that is not inferior to the one with the highest score.

    A cheaper candidate is not inferior if the lower end of the interval of (cheaper - highest) is above -`tolerance`.
    The interval is the 95 % interval of a paired bootstrap over the rows, so that each comparison is a one-sided test
    at a level of 2.5 %, as ICH E9 (1998, section 5.5) and FDA (2016, "Non-Inferiority Clinical Trials to Establish
    Effectiveness") recommend for non-inferiority. Candidates are compared by the first bounded cost, or by
    `latency_ms` without bounds.

    Args:
        candidates: Scored students.
        bounds: Inclusive bounds by cost: lower bounds of `LOWER_BOUNDED`, upper bounds of all others.
        metric: Name of the score.
        tolerance: Points of the metric that a cheaper student may be worse; 0 chooses the highest score.
    """
    cost = next(iter(bounds), "latency_ms")
    within = feasible(candidates, bounds)
    if not within:
        return Choice(None, None, [], {}, _explain_nearest_miss(candidates, bounds))
    highest = min(within, key=lambda c: (-c.score, _cost(c, cost), c.key))
    cheaper = [c for c in within if _cost(c, cost) < _cost(highest, cost)]
    cheaper.sort(key=lambda c: (_cost(c, cost), -c.score, c.key))
    more_expensive = [c for c in within if _cost(c, cost) > _cost(highest, cost)]
    comparisons = _compare(metric, [*cheaper, *more_expensive], highest)
    non_inferior = [c for c in cheaper if c.key in comparisons and comparisons[c.key].low > -tolerance]
    best = non_inferior[0] if non_inferior else highest
    scope = f"within {describe_bounds(bounds)}" if bounds else "of all students"
    top = f"{highest.label or highest.key} has the highest {metric}, {highest.score:.2f}, {scope}"
    if non_inferior:
        verdict = _explain_replacement(highest, non_inferior, comparisons[best.key], cost, tolerance)
    else:
        verdict = _explain_highest(cheaper, comparisons, tolerance)
    not_shown = cheaper[: cheaper.index(best)] if non_inferior else cheaper
    details = _explain_not_shown(not_shown, comparisons, highest, tolerance)
    details += _explain_doubt(more_expensive, comparisons, highest, tolerance)
    return Choice(best, highest, non_inferior, comparisons, f"{top}{verdict}.{details}")


def rows_needed(comparison: Comparison, num_rows: int, tolerance: float) -> int | None:
    """The number of rows at which the lower end of the interval would be above -`tolerance`, if the difference stays.

    The distance from the difference to the lower end shrinks with the square root of the number of rows. None if the
    difference itself is not above -`tolerance`. The number is rounded up to two significant digits.

    Args:
        comparison: The comparison (cheaper - highest).
        num_rows: The number of rows of the comparison.
        tolerance: The tolerance in points.
    """
    margin = comparison.difference + tolerance
    if margin <= 0:
        return None
    exact = round(num_rows * ((comparison.difference - comparison.low) / margin) ** 2, 6)
    unit = 10 ** max(0, math.floor(math.log10(max(exact, 1))) - 1)
    return math.ceil(exact / unit) * unit


def describe_bounds(bounds: dict[str, float]) -> str:
    """Bounds as text, such as "latency_ms <= 900, rows_per_s >= 50"."""
    return ", ".join(f"{key} {bound_sign(key)} {bound:.4g}" for key, bound in bounds.items()) or "no bound"


def bound_sign(name: str) -> str:
    """The relation of a measurement to its bound: ">=" for lower bounds, "<=" for upper bounds."""
    return ">=" if name in LOWER_BOUNDED else "<="


def describe_nearest_miss(costs: dict[str, dict[str, float]], budgets: dict[str, dict[str, float]]) -> str:
    """The configuration and the budget that it misses least, such as "2-1 for fast: latency_ms 60 (20.0% over)".

    Args:
        costs: Costs of the configurations that fit no budget, by name.
        budgets: Resolved bounds by budget.
    """
    excesses = [
        (
            max((share_of_bound(key, values[key], bound), key) for key, bound in bounds.items() if key in values),
            name,
            budget,
        )
        for name, values in costs.items()
        for budget, bounds in budgets.items()
    ]
    (share, key), name, budget = min(excesses)
    return f"{name} for {budget}: {key} {costs[name][key]:.4g} ({_format_miss(key, share)})"


def _cost(candidate: Candidate, name: str) -> float:
    """A candidate's measurement as a cost; infinite if not measured."""
    return as_cost(name, candidate.costs[name]) if name in candidate.costs else math.inf


def _share_of_bound(candidate: Candidate, key: str, bound: float) -> float:
    return share_of_bound(key, candidate.costs[key], bound) if key in candidate.costs else math.inf


def _compare(metric: str, others: Sequence[Candidate], highest: Candidate) -> dict[str, Comparison]:
    """The paired differences candidate - highest, without the candidates that were not scored on the same rows."""
    reference = highest.rows
    if reference is None or len(reference) == 0:
        return {}
    runs = {c.key: [c.rows, *c.other_seeds] for c in others if c.rows is not None and len(c.rows) == len(reference)}
    if not runs:
        return {}
    reference_runs = [reference, *highest.other_seeds]
    return dict(zip(runs, compare_with_reference(metric, list(runs.values()), reference_runs), strict=True))


def nearest_rival(choice: Choice, trial_of: Callable[[str], str]) -> str | None:
    """The student of another trial that the choice is least certain against; None if none was compared.

    This is the student with the highest score if another one was chosen for being cheaper. Otherwise it is the student
    whose interval of the difference reaches highest.

    Args:
        choice: The choice.
        trial_of: Returns the trial of a student; a trial has a student for each serving configuration.
    """
    if choice.best is None or choice.highest is None:
        return None
    own = trial_of(choice.best.key)
    if trial_of(choice.highest.key) != own:
        return choice.highest.key
    others = {key: comparison for key, comparison in choice.comparisons.items() if trial_of(key) != own}
    return max(others, key=lambda key: (others[key].high, key), default=None)


def _explain_replacement(
    highest: Candidate, non_inferior: Sequence[Candidate], comparison: Comparison, cost: str, tolerance: float
) -> str:
    """Why the cheapest of the students that are not inferior is chosen."""
    best = non_inferior[0]
    change = best.costs[cost] / highest.costs[cost] - 1
    others = f" (the cheapest of {len(non_inferior)} such students)" if len(non_inferior) > 1 else ""
    return (
        f", but {best.label or best.key} is not inferior with a tolerance of {tolerance:g} points: "
        f"{_format_comparison(comparison)} on the same rows, with {abs(change):.0%} {'more' if change > 0 else 'less'} "
        f"{cost}{others}"
    )


def _explain_highest(cheaper: Sequence[Candidate], comparisons: dict[str, Comparison], tolerance: float) -> str:
    if not cheaper:
        return "; no student is cheaper"
    if not any(c.key in comparisons for c in cheaper):
        return "; no cheaper student was scored on the same rows"
    return f"; no cheaper student is shown to be within the tolerance of {tolerance:g} points"


def _explain_not_shown(
    not_shown: Sequence[Candidate], comparisons: dict[str, Comparison], highest: Candidate, tolerance: float
) -> str:
    """A sentence on the cheapest student for which the rows are too few, else on the student nearest to the tolerance.

    `not_shown` are the students that are cheaper than the chosen one; the sentence is empty if none was compared.
    """
    compared = [c for c in not_shown if c.key in comparisons]
    num_rows = 0 if highest.rows is None else len(highest.rows)
    for candidate in compared:
        comparison = comparisons[candidate.key]
        if needed := rows_needed(comparison, num_rows, tolerance):
            return (
                f" {num_rows:,} rows are too few for {candidate.label or candidate.key} "
                f"({_format_comparison(comparison)}); if the difference stays, about {needed:,} rows would do."
            )
    if not compared:
        return ""
    nearest = max(compared, key=lambda c: comparisons[c.key].difference)
    comparison = comparisons[nearest.key]
    return f" The nearest cheaper student is {nearest.label or nearest.key}: {_format_comparison(comparison)}."


def _explain_doubt(
    more_expensive: Sequence[Candidate], comparisons: dict[str, Comparison], highest: Candidate, tolerance: float
) -> str:
    """A sentence on the more expensive student whose interval reaches furthest above the highest score.

    The sentence is empty unless the interval reaches above the tolerance.
    """
    compared = [c for c in more_expensive if c.key in comparisons]
    doubtful = max(compared, key=lambda c: comparisons[c.key].high, default=None)
    if doubtful is None or highest.rows is None or comparisons[doubtful.key].high < tolerance:
        return ""
    comparison = comparisons[doubtful.key]
    reverse = Comparison(-comparison.difference, -comparison.high, -comparison.low, comparison.p_value)
    needed = rows_needed(reverse, len(highest.rows), tolerance)
    rows = f"; if the difference stays, about {needed:,} rows would exclude this" if needed else ""
    return (
        f" {doubtful.label or doubtful.key}, which is more expensive, may be better by more than the tolerance "
        f"({_format_comparison(comparison)}){rows}."
    )


def _format_comparison(comparison: Comparison) -> str:
    return f"{comparison.difference:+.2f}, 95 % interval [{comparison.low:+.2f}, {comparison.high:+.2f}]"


def _explain_nearest_miss(candidates: Sequence[Candidate], bounds: dict[str, float]) -> str:
    if not candidates:
        return "no student has finished yet"
    worst_shares = [
        (max(((_share_of_bound(c, k, b), k) for k, b in bounds.items()), default=(0.0, "")), c) for c in candidates
    ]
    (share, key), nearest = min(worst_shares, key=lambda item: (item[0][0], -item[1].score))
    text = f"no student fits {describe_bounds(bounds)}"
    if math.isinf(share):
        return f"{text}; {key} was not measured"
    return (
        f"{text}; the nearest is {nearest.label or nearest.key} with {key} {nearest.costs[key]:.4g} "
        f"({_format_miss(key, share)}), {nearest.score:.2f} points"
    )


def _format_miss(name: str, share: float) -> str:
    """How far a measurement is from its bound: above up to 200 % as a percentage, then as a factor; or below."""
    if name in LOWER_BOUNDED:
        return f"{1 - 1 / share:.1%} under"
    if share <= 3:
        return f"{share - 1:.1%} over"
    return f"{share:.1f} times the bound" if share < 10 else f"{share:,.0f} times the bound"
