"""Budgets, the Pareto front and the choice of a student, as pure functions over candidates."""

import math
import statistics
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from raydistill.config.space import LOWER_BOUNDED
from raydistill.core.errors import UserError
from raydistill.evaluation.metrics import Comparison, paired_bootstrap

COST_UNITS = {
    "latency_ms": "ms for a batch of 32",
    "latency_ms_b1": "ms for one row",
    "params_m": "million parameters",
    "memory_mb": "MB of weights",
    "peak_mb": "MB of peak memory for a batch of 32",
    "device_hours": "device-hours",
    "rows_per_s": "rows per second",
}
# Timings are noisy; each maps to the function that combines several measurements of equal configurations.
TIMING_REDUCERS: dict[str, Callable[[list[float]], float]] = {
    "rows_per_s": statistics.median,
    **{
        f"{name}{suffix}": reducer
        for name in ("latency_ms", "latency_ms_b1")
        for suffix, reducer in (("", statistics.median), ("_low", min), ("_high", max))
    },
}


@dataclass(frozen=True)
class Candidate:
    """A scored student.

    `score` is on validation, higher is better. `rows` holds the per-row statistics of the score as the metric's
    bootstrap reads them, or None if they were not kept. `costs` are in the units of `COST_UNITS`.
    """

    key: str
    score: float
    rows: np.ndarray | None = field(repr=False, compare=False)
    costs: dict[str, float] = field(compare=False)
    label: str = ""


@dataclass(frozen=True)
class Choice:
    """The chosen student and the reason for choosing it, in one or two sentences.

    `best` is None if no student fits the bounds. `highest` has the highest score within the bounds.
    `indistinguishable` are the cheaper students within the bounds whose scores are not significantly different from the
    highest, cheapest first; `best` is the first of them, or `highest` if there are none. `comparisons` holds the
    difference highest - candidate by candidate key.
    """

    best: Candidate | None
    highest: Candidate | None
    indistinguishable: list[Candidate]
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


def pool_latency(costs: Sequence[dict[str, float]], groups: Sequence[Hashable]) -> list[dict[str, float]]:
    """Replace the timings of each student by the timings pooled over its group.

    Students of one group (shape, beams, engine) differ in speed only by noise or by the length of their outputs, so
    none of them counts as cheaper. Latencies become the group's median; the `_low` and `_high` ends become the group's
    minimum and maximum. Other costs stay.

    Args:
        costs: Costs of each student.
        groups: For each student, the key of its group; same length as `costs`.
    """
    pooled: dict[tuple[Hashable, str], list[float]] = {}
    for own_costs, group in zip(costs, groups, strict=True):
        for name in own_costs.keys() & TIMING_REDUCERS.keys():
            pooled.setdefault((group, name), []).append(own_costs[name])
    return [
        {
            name: TIMING_REDUCERS[name](pooled[group, name]) if name in TIMING_REDUCERS else value
            for name, value in own_costs.items()
        }
        for own_costs, group in zip(costs, groups, strict=True)
    ]


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


def choose(candidates: Sequence[Candidate], bounds: dict[str, float], metric: str) -> Choice:
    """Choose the cheapest candidate within the bounds whose score is not significantly below the highest.

    A score is not significantly different if the 95 % interval of the difference, from a paired bootstrap over the
    validation rows, contains 0. Candidates are compared by the first bounded cost, or by `latency_ms` without bounds.

    Args:
        candidates: Scored students.
        bounds: Inclusive bounds by cost: lower bounds of `LOWER_BOUNDED`, upper bounds of all others.
        metric: Name of the score, "rouge2" or "bleu".
    """
    cost = next(iter(bounds), "latency_ms")
    within = feasible(candidates, bounds)
    if not within:
        return Choice(None, None, [], {}, _explain_nearest_miss(candidates, bounds))
    highest = min(within, key=lambda c: (-c.score, _cost(c, cost), c.key))
    cheaper = [c for c in within if _cost(c, cost) < _cost(highest, cost)]
    comparisons = {c.key: comparison for c in cheaper if (comparison := _compare(metric, highest, c)) is not None}
    indistinguishable = [c for c in cheaper if c.key in comparisons and _contains_zero(comparisons[c.key])]
    indistinguishable.sort(key=lambda c: (_cost(c, cost), -c.score, c.key))
    best = indistinguishable[0] if indistinguishable else highest
    choice = Choice(best, highest, indistinguishable, comparisons, reason="")
    scope = f"within {describe_bounds(bounds)}" if bounds else "of all students"
    top = f"{highest.label or highest.key} has the highest {metric}, {highest.score:.2f}, {scope}"
    return replace(choice, reason=_explain_choice(choice, best, top, cost))


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


def _compare(metric: str, a: Candidate, b: Candidate) -> Comparison | None:
    """The paired difference a - b; None if the two were not scored on the same rows."""
    if a.rows is None or b.rows is None or len(a.rows) != len(b.rows) or len(a.rows) == 0:
        return None
    return paired_bootstrap(metric, a.rows, b.rows)


def _contains_zero(comparison: Comparison) -> bool:
    return comparison.low <= 0 <= comparison.high


def _explain_choice(choice: Choice, best: Candidate, top: str, cost: str) -> str:
    if choice.highest is None or best is choice.highest:
        return f"{top}; no cheaper student has an equivalent score."
    difference = choice.comparisons[best.key]
    change = best.costs[cost] / choice.highest.costs[cost] - 1
    num_equivalent = len(choice.indistinguishable)
    others = f" (the cheapest of {num_equivalent} such students)" if num_equivalent > 1 else ""
    return (
        f"{top}, but {best.label or best.key} is not significantly different: {difference.difference:.2f} lower, 95 % "
        f"interval [{-difference.high:+.2f}, {-difference.low:+.2f}] on the same rows, with {abs(change):.0%} "
        f"{'more' if change > 0 else 'less'} {cost}{others}."
    )


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
