"""Compares the latency of a student with the latency of its teacher, in alternation and until the answer is clear.

Two latencies of different minutes differ by more than their engines: processors change their frequency, and other
processes come and go. Here both engines are timed in one process, as pairs of neighbouring measurements. The ratio of
a pair does not depend on what changes slowly. The median ratio gets an interval, and the interval decides.
"""

import bisect
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, exp, log
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from raydistill.evaluation.confidence_sequence import median_interval
from raydistill.evaluation.latency import MAX_BACKGROUND_CORES, BackgroundLoad, limit_seconds

# Short calls are repeated for this time in each half of a pair. The system counts CPU time in ticks of 10 ms, so that
# the load by other processes is not known for much shorter times.
MIN_HALF_SECONDS = 0.1
WARMUP_CALLS = 2  # of each engine, before the first pair
# A shape is excluded before training only if its ratio is above the bound by this factor, see `may_exclude`.
EXCLUSION_MARGIN = 1.3

Call = Callable[[], object]
Decision = Literal["below", "above", "undecided"]
StopReason = Literal["bounds_cleared", "precise", "time_limit", "noisy"]
PositiveMs = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class StoppingRule:
    """When a comparison ends.

    Attributes:
        min_pairs: Pairs that are not noisy before the first decision.
        precision: The comparison ends when both ends of the interval differ from the ratio by at most this share.
        confidence: Probability that the interval covers the true ratio, whenever the comparison ends.
        max_seconds: The comparison ends without a decision after this time, or after RAYDISTILL_TIMING_SECONDS if that
            is shorter.
    """

    min_pairs: int = 15
    precision: float = 0.02
    confidence: float = 0.95
    max_seconds: float = 60.0


class Pair(BaseModel):
    """Neighbouring measurements of baseline and student.

    Attributes:
        baseline_ms: Milliseconds of each timed call of the baseline.
        student_ms: Milliseconds of each timed call of the student.
        seconds: Duration of the pair, untimed calls included.
        background_cores: Average number of CPU cores that other processes kept busy during the pair.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    baseline_ms: tuple[PositiveMs, ...] = Field(min_length=1)
    student_ms: tuple[PositiveMs, ...] = Field(min_length=1)
    seconds: float
    background_cores: float

    @property
    def log_ratio(self) -> float:
        """The logarithm of the student's median call over the baseline's median call."""
        return log(statistics.median(self.student_ms) / statistics.median(self.baseline_ms))

    @property
    def noisy(self) -> bool:
        """Whether other processes kept more than `MAX_BACKGROUND_CORES` busy. The rule does not see the call times."""
        return self.background_cores > MAX_BACKGROUND_CORES


class PairedTiming(BaseModel):
    """The latency of a student as a share of its baseline's latency.

    Attributes:
        ratio: Median of the ratios of the pairs that are not noisy; None if all pairs are noisy.
        interval: Confidence interval of the ratio; None if fewer pairs than the rule asks for are not noisy.
        confidence: Probability that the interval covers the true ratio.
        bounds: Ratios that the comparison was meant to decide.
        stop_reason: `bounds_cleared`: the interval holds none of the bounds. `precise`: the interval is as narrow as
            the rule asks for. `time_limit`: neither was reached in time. `noisy`: neither was reached in time, and at
            least half of the pairs are noisy.
        pairs: All pairs in the order of the measurement, noisy pairs included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ratio: float | None
    interval: tuple[float, float] | None
    confidence: float
    bounds: tuple[float, ...]
    stop_reason: StopReason
    pairs: tuple[Pair, ...]

    @property
    def best_ratio(self) -> float:
        """The ratio; if all pairs are noisy, the median of the ratios of all pairs, which may be wrong."""
        return self.ratio or exp(statistics.median(pair.log_ratio for pair in self.pairs))

    @property
    def valid_pairs(self) -> int:
        """Number of pairs that the ratio is computed from."""
        return sum(not pair.noisy for pair in self.pairs)

    @property
    def dropped_pairs(self) -> int:
        """Number of pairs that were dropped because other processes were busy."""
        return len(self.pairs) - self.valid_pairs

    @property
    def background_cores(self) -> float:
        """Average number of CPU cores that other processes kept busy, noisy pairs included."""
        return statistics.fmean(pair.background_cores for pair in self.pairs)

    def decided(self, bound: float) -> Decision:
        """Return on which side of a ratio the student is.

        Any bound may be given: the interval does not depend on the bounds.
        """
        if self.interval is not None and self.interval[1] < bound:
            return "below"
        if self.interval is not None and self.interval[0] > bound:
            return "above"
        return "undecided"


def time_pairs(
    baseline_call: Call,
    student_call: Call,
    bounds: Sequence[float] = (),
    rule: StoppingRule | None = None,
) -> PairedTiming:
    """Time baseline and student in alternation until the ratio of their latencies is clear of all bounds, or precise.

    The two halves of a pair change their order from pair to pair, so that drift within a pair cancels out. Each half
    lasts about `MIN_HALF_SECONDS` or more: short calls are repeated, and the first of them is not timed, because the
    other engine has used the caches of the processor. Pairs during which other processes kept more than
    `MAX_BACKGROUND_CORES` busy are dropped. The load of a GPU by other processes is not measured.

    Args:
        baseline_call: The work of the baseline, usually the teacher. Every call does the same work.
        student_call: The same work, by the student.
        bounds: Ratios to decide, such as a budget's share of the teacher's latency. Without a bound, the comparison
            ends when the interval is precise.
        rule: When the comparison ends.

    Returns:
        The ratio with its interval and all call times. `stop_reason` says whether the comparison could decide.
    """
    halves = _Half(baseline_call), _Half(student_call)
    return compare_pairs(_measure_pairs(*halves), bounds, rule or StoppingRule())


def compare_pairs(pairs: Iterable[Pair], bounds: Sequence[float], rule: StoppingRule) -> PairedTiming:
    """Take pairs until the rule ends the comparison. `time_pairs` describes the arguments."""
    taken: list[Pair] = []
    ordered: list[float] = []  # logarithms of the ratios of the pairs that are not noisy
    interval: tuple[float, float] | None = None
    stop_reason: StopReason | None = None
    seconds, max_seconds = 0.0, limit_seconds(rule.max_seconds)
    for pair in pairs:
        taken.append(pair)
        seconds += pair.seconds
        if not pair.noisy:
            bisect.insort(ordered, pair.log_ratio)
        if len(ordered) >= rule.min_pairs:
            interval = median_interval(ordered, rule.confidence)
            stop_reason = _decisive(interval, statistics.median(ordered), bounds, rule.precision)
        if stop_reason is not None or seconds >= max_seconds:
            break
    if stop_reason is None:
        stop_reason = "noisy" if len(taken) >= 2 * len(ordered) else "time_limit"
    return PairedTiming(
        ratio=exp(statistics.median(ordered)) if ordered else None,
        interval=(exp(interval[0]), exp(interval[1])) if interval is not None else None,
        confidence=rule.confidence,
        bounds=tuple(bounds),
        stop_reason=stop_reason,
        pairs=tuple(taken),
    )


def valid_pairs(pairs: Sequence[Pair]) -> Sequence[Pair]:
    """Return the pairs that are not noisy; all pairs if every pair is noisy."""
    return [pair for pair in pairs if not pair.noisy] or pairs


def may_exclude(timing: PairedTiming, bound: float) -> bool:
    """Return whether a shape may be excluded before training, because its students cannot meet the bound.

    Latency of untrained weights at fixed lengths is not the latency of trained weights on real rows. Therefore the
    whole interval must be above `EXCLUSION_MARGIN` times the bound. An undecided shape is not excluded.
    """
    return timing.decided(bound * EXCLUSION_MARGIN) == "above"


def _decisive(
    interval: tuple[float, float] | None, center: float, bounds: Sequence[float], precision: float
) -> StopReason | None:
    """Return why the comparison ends with this interval; None if it continues.

    `interval` and `center` are logarithms; `bounds` and `precision` are not. Clear bounds come first: a comparison may
    reach both at the same pair.
    """
    if interval is None:
        return None
    lower, upper = interval
    if bounds and not any(lower <= log(bound) <= upper for bound in bounds):
        return "bounds_cleared"
    if max(upper - center, center - lower) <= log(1 + precision):
        return "precise"
    return None


class _Half:
    """One side of the pairs: a call, and how often a pair repeats the call."""

    def __init__(self, call: Call) -> None:
        self._call = call
        seconds = [self._timed_seconds() for _ in range(WARMUP_CALLS)]
        self._repeats = max(1, ceil(MIN_HALF_SECONDS / max(min(seconds), 1e-6)))

    def measure(self) -> tuple[float, ...]:
        """Return the milliseconds of the timed calls."""
        if self._repeats > 1:
            self._call()
        return tuple(1000 * self._timed_seconds() for _ in range(self._repeats))

    def _timed_seconds(self) -> float:
        started = time.perf_counter()
        self._call()
        return time.perf_counter() - started


def _measure_pairs(baseline: _Half, student: _Half) -> Iterator[Pair]:
    """Measure pairs without end; the order of the halves alternates."""
    for student_first in itertools.cycle((False, True)):
        load, started = BackgroundLoad(), time.perf_counter()
        if student_first:
            student_ms = student.measure()
            baseline_ms = baseline.measure()
        else:
            baseline_ms = baseline.measure()
            student_ms = student.measure()
        seconds = time.perf_counter() - started
        yield Pair(baseline_ms=baseline_ms, student_ms=student_ms, seconds=seconds, background_cores=load.mean_cores())
