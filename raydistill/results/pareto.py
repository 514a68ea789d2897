"""What fits a budget, what is on the Pareto front, and which student to take: pure functions."""

import math
import statistics
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raydistill.core.errors import UserError
from raydistill.evaluation.metrics import Comparison, paired_bootstrap

UNITS = {
    "latency_ms": "ms for a batch of 32",
    "latency_ms_b1": "ms for one row",
    "params_m": "million parameters",
    "memory_mb": "MB of weights",
    "peak_mb": "MB held while writing a batch of 32",
    "gpu_hours": "device-hours",
}
# Measured with a clock, and so never twice the same; with how several measurements of one thing become one.
TIMED: dict[str, Callable[[list[float]], float]] = {
    f"{name}{end}": combined
    for name in ("latency_ms", "latency_ms_b1")
    for end, combined in (("", statistics.median), ("_low", min), ("_high", max))
}


@dataclass(frozen=True)
class Candidate:
    """A finished student: its validation score (higher is better) and `rows`, the per-row statistics or None."""

    key: str
    score: float
    rows: np.ndarray | None = field(repr=False, compare=False)
    costs: dict[str, float] = field(compare=False)
    label: str = ""


@dataclass(frozen=True)
class Choice:
    """The student to take (None: nothing fits), and why, in a sentence or two.

    `highest` has the highest score within the bounds. `indistinguishable` are the cheaper ones within them
    whose score could be the same, cheapest first; `best` is the first of these, or `highest` without any.
    """

    best: Candidate | None
    highest: Candidate | None
    indistinguishable: list[Candidate]
    comparisons: dict[str, Comparison]
    reason: str


def absolute_bounds(bounds: dict[str, Any], teacher_costs: dict[str, float]) -> dict[str, float]:
    """Bounds as numbers; "50%" is half of what the teacher costs. A UserError where that was not measured."""
    numbers = {}
    for key, bound in bounds.items():
        text = str(bound).strip()
        if not text.endswith("%"):
            numbers[key] = float(text)
        elif teacher_costs.get(key) is None:
            raise UserError(f"{key}={text}: the teacher has no measured {key} to take a share of; give a number")
        else:
            numbers[key] = float(text[:-1]) / 100 * teacher_costs[key]
    return numbers


def known_bounds(budgets: dict[str, dict[str, Any]], teacher_costs: dict[str, float]) -> list[dict[str, float]]:
    """Every budget's bounds as numbers; one with a share of what was not measured on the teacher bounds nothing."""
    found = []
    for bounds in budgets.values():
        try:
            found.append(absolute_bounds(bounds, teacher_costs))
        except UserError:  # `outcome` tells of it
            found.append({})
    return found


def feasible(candidates: Sequence[Candidate], bounds: dict[str, float]) -> list[Candidate]:
    """Those within every bound (a bound is inclusive); a cost that was not measured fits no bound on it."""
    return [c for c in candidates if all(_share(c, key, bound) <= 1 for key, bound in bounds.items())]


def admitted(costs: dict[str, float], budgets: Sequence[dict[str, float]]) -> bool:
    """Whether some budget could admit a student of these costs; what is not known of it (yet) is no obstacle.

    Without budgets everything is admitted.
    """
    return not budgets or any(
        all(costs[key] <= bound for key, bound in bounds.items() if key in costs) for bounds in budgets
    )


def on_one_clock(costs: Sequence[dict[str, float]], alike: Sequence[Hashable]) -> list[dict[str, float]]:
    """The costs, with the median over all that are `alike` in the place of each one's own milliseconds.

    `alike` names for each what decides its speed (shape, beams, engine). Of two that are alike one is the faster by
    noise, or by the length of what it wrote; so neither is cheaper, and the higher score wins. Lowest and highest
    become those of all.
    """
    pooled: dict[tuple[Hashable, str], list[float]] = {}
    for one, group in zip(costs, alike, strict=True):
        for name in one.keys() & TIMED.keys():
            pooled.setdefault((group, name), []).append(one[name])
    return [
        {name: TIMED[name](pooled[group, name]) if name in TIMED else value for name, value in one.items()}
        for one, group in zip(costs, alike, strict=True)
    ]


def front(candidates: Sequence[Candidate], cost: str) -> list[Candidate]:
    """The Pareto front, cheapest first: those that no other beats in score or cost without losing in the other.

    Candidates that tie in both are all kept; one without this cost is left out.
    """
    priced = [c for c in candidates if cost in c.costs]
    kept: list[Candidate] = []
    for c in sorted(priced, key=lambda c: (c.costs[cost], -c.score)):
        tie = kept and (kept[-1].costs[cost], kept[-1].score) == (c.costs[cost], c.score)
        if not kept or c.score > kept[-1].score or tie:
            kept.append(c)
    return kept


def choose(candidates: Sequence[Candidate], bounds: dict[str, float], metric: str) -> Choice:
    """The highest score within the bounds, or the cheapest that cannot be told from it.

    A cheaper candidate "cannot be told" from the highest where the 95 % interval of their difference, by a
    paired bootstrap over the validation rows, holds 0. Cheaper is by the first bounded cost, else by `latency_ms`.
    """
    cost = next(iter(bounds), "latency_ms")
    within = feasible(candidates, bounds)
    if not within:
        return Choice(None, None, [], {}, _nearest_miss(candidates, bounds))
    highest = min(within, key=lambda c: (-c.score, c.costs.get(cost, math.inf), c.key))
    cheaper = [c for c in within if c.costs.get(cost, math.inf) < highest.costs.get(cost, math.inf)]
    compared = {c.key: found for c in cheaper if (found := _compare(metric, highest, c)) is not None}
    same = [c for c in cheaper if c.key in compared and compared[c.key].low <= 0 <= compared[c.key].high]
    same.sort(key=lambda c: (c.costs[cost], -c.score, c.key))
    best = same[0] if same else highest
    return Choice(best, highest, same, compared, _reason(best, highest, same, compared, bounds, metric, cost))


def describe_bounds(bounds: dict[str, float]) -> str:
    """Bounds for a reader, such as "latency_ms <= 900"."""
    return ", ".join(f"{key} <= {bound:.4g}" for key, bound in bounds.items()) or "no bound"


def _share(c: Candidate, key: str, bound: float) -> float:
    """The cost as a share of its bound."""
    return c.costs[key] / bound if key in c.costs else math.inf


def _compare(metric: str, a: Candidate, b: Candidate) -> Comparison | None:
    if a.rows is None or b.rows is None or len(a.rows) != len(b.rows) or len(a.rows) == 0:
        return None  # not scored on the same rows: no statement, so the higher score stands
    return paired_bootstrap(metric, a.rows, b.rows)


def _reason(
    best: Candidate,
    highest: Candidate,
    same: list[Candidate],
    compared: dict[str, Comparison],
    bounds: dict[str, float],
    metric: str,
    cost: str,
) -> str:
    where = f"within {describe_bounds(bounds)}" if bounds else "of all"
    top = f"{highest.label or highest.key} has the highest {metric}, {highest.score:.2f}, {where}"
    if best is highest:
        return f"{top}; no cheaper student equals it."
    found = compared[best.key]
    saved = 1 - best.costs[cost] / highest.costs[cost]
    others = f" (the cheapest of {len(same)} such)" if len(same) > 1 else ""
    return (
        f"{top}, but {best.label or best.key} cannot be told from it: {found.difference:.2f} less, 95 % interval "
        f"[{-found.high:+.2f}, {-found.low:+.2f}] on the same rows. It has {saved:.0%} less {cost}{others}."
    )


def _nearest_miss(candidates: Sequence[Candidate], bounds: dict[str, float]) -> str:
    if not candidates:
        return "no student has finished yet"
    worst = [(max(((_share(c, k, b), k) for k, b in bounds.items()), default=(0.0, "")), c) for c in candidates]
    (share, key), nearest = min(worst, key=lambda item: (item[0][0], -item[1].score))
    text = f"no student fits {describe_bounds(bounds)}"
    if math.isinf(share):
        return f"{text}; {key} was not measured"
    return (
        f"{text}; the nearest is {nearest.label or nearest.key} with {key} {nearest.costs[key]:.4g} "
        f"({_excess(share)}), {nearest.score:.2f} points"
    )


def _excess(share: float) -> str:
    """By how much a cost is over its bound; beyond 200 % a factor reads better."""
    if share <= 3:
        return f"{share - 1:.1%} over"
    return f"{share:.1f} times the bound" if share < 10 else f"{share:,.0f} times the bound"
