"""Times the shapes of a sweep as they are served: a first pass of short timings, then one session of pairs.

Both run as exclusive Ray tasks. A session holds every time that a budget or a front compares, so it is repeated as a
whole when something is missing.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from raydistill.config.serving import EngineVariant, ServingConfig
from raydistill.core.console import ProgressBar, print_progress
from raydistill.evaluation.latency import (
    LATENCY_BATCH_SIZES,
    Repetition,
    hardware,
    measure_peak_mb,
    time_calls,
    used_memory_mb,
)
from raydistill.evaluation.paired_latency import PairedTiming, StoppingRule, time_pairs, valid_pairs
from raydistill.evaluation.serving import make_serving_call
from raydistill.inference.decoding import Engine, engine_label
from raydistill.inference.engines import supported_precisions
from raydistill.models.loading import load_config
from raydistill.results.formatting import format_count
from raydistill.results.serving_latency import FirstPass, FirstPassTime, LatencySession, TimedServing
from raydistill.search.served_engine import (
    ServedCheckpoint,
    ServingContext,
    engine_versions,
    open_served_engine,
)

# Minimum and maximum number of rounds of the first pass; every variant is called once per round.
FIRST_PASS_ROUNDS = (3, 5)
FIRST_PASS_SECONDS = 1.0
# A latency that a budget bounds is timed until the bound is decided; another latency is reported only.
BOUNDED_RULE = StoppingRule(max_seconds=8.0)
REPORTED_RULE = StoppingRule(min_pairs=10, precision=0.05, max_seconds=3.0)
# Pairs of slow calls of a latency that is only reported, whatever its time limit.
MIN_PAIRS_OF_SLOW_CALLS = 3

Call = Callable[[], None]


@dataclass(frozen=True)
class FirstPassTask:
    """The shapes of a first pass.

    Attributes:
        context: Run and shortlists.
        checkpoints: A checkpoint of each shape.
        configs: By shape, its decodings; precision and shortlist are ignored.
        variants: The engine variants of the space.
        engine: Name of the engine that serves the teacher.
    """

    context: ServingContext
    checkpoints: Sequence[ServedCheckpoint]
    configs: Mapping[str, Sequence[ServingConfig]]
    variants: Sequence[EngineVariant]
    engine: str


@dataclass(frozen=True)
class SessionTask:
    """What a session times.

    Attributes:
        context: Run and shortlists.
        teacher: The teacher.
        baseline: The teacher's own decoding in full precision with the whole vocabulary.
        checkpoints: A checkpoint of each shape, the teacher among them.
        configs: By shape, the configurations to time.
        bounds: By cost, the bounds of the space's budgets: shares of the baseline's latency, or milliseconds.
    """

    context: ServingContext
    teacher: ServedCheckpoint
    baseline: ServingConfig
    checkpoints: Sequence[ServedCheckpoint]
    configs: Mapping[str, Sequence[ServingConfig]]
    bounds: Mapping[str, "CostBounds"] = field(default_factory=dict)


@dataclass(frozen=True)
class CostBounds:
    """The bounds of all budgets on a latency: shares of the baseline's latency, and milliseconds."""

    shares: tuple[float, ...] = ()
    milliseconds: tuple[float, ...] = ()

    def ratios(self, baseline_ms: float) -> tuple[float, ...]:
        """The bounds as shares of the baseline's latency."""
        return (*self.shares, *(bound / baseline_ms for bound in self.milliseconds))


def latency_bounds(budgets: Mapping[str, Mapping[str, float | str]]) -> dict[str, CostBounds]:
    """By latency, the bounds of all budgets: shares of the teacher's latency, and milliseconds."""
    bounds = {}
    for cost in LATENCY_BATCH_SIZES:
        texts = [str(budget[cost]).strip() for budget in budgets.values() if cost in budget]
        shares = tuple(float(text[:-1]) / 100 for text in texts if text.endswith("%"))
        bounds[cost] = CostBounds(shares, tuple(float(text) for text in texts if not text.endswith("%")))
    return bounds


def run_first_pass(task: FirstPassTask, device: str, threads: int) -> FirstPass:
    """Time every variant of each shape for a batch of 32 rows, in rounds. Call with `run_exclusive`."""
    model_type = load_config(task.checkpoints[0].checkpoint).model_type
    supported = supported_precisions(task.engine, device, model_type)
    variants = [variant for variant in task.variants if variant.precision in supported]
    record = FirstPass(
        hardware=hardware(device, threads),
        versions=engine_versions(),
        unsupported=sorted({variant.precision for variant in task.variants} - supported),
        times=[],
    )
    for checkpoint in task.checkpoints if variants else []:
        engines = {
            variant: open_served_engine(task.context, checkpoint.checkpoint, variant, device, threads)
            for variant in variants
        }
        for config in {config.beams: config for config in task.configs[checkpoint.shape]}.values():
            calls = {
                variant: _make_call(task.context, checkpoint, engine, config, "latency_ms")[0]
                for variant, engine in engines.items()
            }
            times = [
                FirstPassTime(shape=checkpoint.shape, beams=config.beams, variant=variant, ms=ms)
                for variant, ms in time_rounds(calls).items()
            ]
            record = record.with_times(times)
    return record


def time_rounds(calls: Mapping[EngineVariant, Call]) -> dict[EngineVariant, float]:
    """Median milliseconds of each call, from rounds in which every call is made once, after an untimed round."""
    for call in calls.values():
        call()
    seconds: dict[EngineVariant, list[float]] = {variant: [] for variant in calls}
    started = time.perf_counter()
    min_rounds, max_rounds = FIRST_PASS_ROUNDS
    for number in range(max_rounds):
        if number >= min_rounds and time.perf_counter() - started > FIRST_PASS_SECONDS:
            break
        for variant, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[variant].append(time.perf_counter() - start)
    return {variant: 1000 * statistics.median(values) for variant, values in seconds.items()}


def run_session(task: SessionTask, device: str, threads: int) -> LatencySession:
    """Time every shape with each of its configurations in pairs with the baseline. Call with `run_exclusive`.

    Noisy comparisons are repeated once at the end.
    """
    started_at = datetime.now(UTC).replace(microsecond=0)
    session = _Session(task, device, threads)
    count = len(LATENCY_BATCH_SIZES) * (sum(map(len, task.configs.values())) - 1)  # the baseline is not compared
    servings = list(_with_progress(session.time_all(), count))
    noisy = [serving for serving in servings if serving.timing.stop_reason == "noisy"]
    if noisy:
        print_progress(f"latency: timing {format_count(len(noisy), 'disturbed comparison')} again")
        repeated = {_identity(serving): serving for serving in _with_progress(session.time_all(noisy), len(noisy))}
        servings = [repeated.get(_identity(serving), serving) for serving in servings]
    return LatencySession(
        started_at=started_at,
        hardware=hardware(device, threads),
        versions=engine_versions(),
        baseline=task.baseline,
        baseline_engine=session.baseline_engine,
        baseline_ms={cost: _baseline_ms(cost, servings, session) for cost in LATENCY_BATCH_SIZES},
        baseline_peak_mb=session.baseline_peak_mb,
        representatives={checkpoint.shape: checkpoint.key for checkpoint in task.checkpoints},
        servings=servings,
    )


def _with_progress(servings: Iterable[TimedServing], count: int) -> Iterator[TimedServing]:
    """Print from time to time how many of `count` comparisons are done, and the time left."""
    with closing(ProgressBar("latency", count)) as progress:
        for number, serving in enumerate(servings, start=1):
            progress.advance(1, f"{number}/{count} comparisons, {serving.shape} with {serving.config.label}")
            yield serving


class _Session:
    """The baseline's open engine, and the comparisons with it. One other engine is open at a time."""

    def __init__(self, task: SessionTask, device: str, threads: int) -> None:
        self._task, self._device, self._threads = task, device, threads
        memory_before_mb = used_memory_mb(device)
        variant = task.baseline.variant
        self._baseline = open_served_engine(task.context, task.teacher.checkpoint, variant, device, threads)
        self.baseline_engine = engine_label(self._baseline)
        self.calls: dict[str, tuple[Call, int]] = {
            cost: _make_call(task.context, task.teacher, self._baseline, task.baseline, cost)
            for cost in LATENCY_BATCH_SIZES
        }
        self.baseline_peak_mb = measure_peak_mb(self.calls["latency_ms"][0], device, memory_before_mb)
        self.estimate_ms = {cost: time_ms(call) / batches for cost, (call, batches) in self.calls.items()}

    def time_all(self, only: Sequence[TimedServing] | None = None) -> Iterator[TimedServing]:
        """Compare every shape and configuration, or only the comparisons `only`, with the baseline."""
        wanted = None if only is None else {_identity(serving) for serving in only}
        for checkpoint in self._task.checkpoints:
            configs = self._task.configs[checkpoint.shape]
            for variant in dict.fromkeys(config.variant for config in configs):
                pairs = [
                    (config, cost)
                    for config in sorted(configs, key=lambda config: config.beams)  # so that peak memory grows
                    for cost in LATENCY_BATCH_SIZES
                    if config.variant == variant
                    and not (checkpoint.is_teacher and config.key == self._task.baseline.key)
                    and (wanted is None or (checkpoint.shape, config.key, cost) in wanted)
                ]
                if pairs:
                    yield from self._time_variant(checkpoint, variant, pairs)

    def _time_variant(
        self, checkpoint: ServedCheckpoint, variant: EngineVariant, pairs: Sequence[tuple[ServingConfig, str]]
    ) -> Iterator[TimedServing]:
        memory_before_mb = used_memory_mb(self._device)
        engine = open_served_engine(self._task.context, checkpoint.checkpoint, variant, self._device, self._threads)
        for config, cost in pairs:
            call, _ = _make_call(self._task.context, checkpoint, engine, config, cost)
            peak_mb = measure_peak_mb(call, self._device, memory_before_mb) if cost == "latency_ms" else None
            yield TimedServing(
                shape=checkpoint.shape,
                config=config,
                cost=cost,
                engine=engine_label(engine),
                timing=self._compare(call, cost, checkpoint.is_teacher),
                peak_mb=peak_mb,
            )

    def _compare(self, call: Call, cost: str, is_teacher: bool) -> PairedTiming:
        """Time a call in pairs with the baseline. No budget selects the teacher, so its latency is only reported."""
        bounds = () if is_teacher else self._task.bounds.get(cost, CostBounds()).ratios(self.estimate_ms[cost])
        baseline_call, batches = self.calls[cost]
        rule = BOUNDED_RULE if bounds else REPORTED_RULE
        rule = extend_for_slow_calls(rule, batches * self.estimate_ms[cost], bounds)
        return time_pairs(baseline_call, call, bounds, rule)


def extend_for_slow_calls(rule: StoppingRule, baseline_ms: float, bounds: Sequence[float]) -> StoppingRule:
    """The rule with a time limit that is long enough for calls of the baseline that take `baseline_ms`.

    Without `min_pairs` pairs there is no interval, so the limit allows for them if there is a bound to decide. A
    latency that is only reported gets `MIN_PAIRS_OF_SLOW_CALLS` pairs.
    """
    pairs = rule.min_pairs if bounds else MIN_PAIRS_OF_SLOW_CALLS
    return replace(rule, max_seconds=max(rule.max_seconds, 2 * pairs * baseline_ms / 1000))


def _identity(serving: TimedServing) -> tuple[str, str, str]:
    return serving.shape, serving.config.key, serving.cost


def _make_call(
    context: ServingContext, checkpoint: ServedCheckpoint, engine: Engine, config: ServingConfig, cost: str
) -> tuple[Call, int]:
    """A call that decodes the rows of a cost, and how many batches it decodes."""
    max_source_tokens = context.max_source_tokens(checkpoint.checkpoint)
    return make_serving_call(engine, context.sources, cost, checkpoint.beam(config), max_source_tokens)


def _baseline_ms(cost: str, servings: Sequence[TimedServing], session: _Session) -> float:
    """The baseline's median milliseconds for a batch, over all pairs of the session that are not noisy.

    If every pair was noisy, over all pairs; without any comparison, the estimate from the start of the session.
    """
    pairs = valid_pairs([pair for serving in servings if serving.cost == cost for pair in serving.timing.pairs])
    if not pairs:
        return session.estimate_ms[cost]
    return statistics.median(ms for pair in pairs for ms in pair.baseline_ms) / session.calls[cost][1]


def time_ms(call: Call) -> float:
    """Median milliseconds of three calls after an untimed one."""
    return time_calls(call, Repetition(repeats=3, warmup=1, min_seconds=0.0)).median_ms


def warn_if_noisy(session: LatencySession) -> None:
    """Print a warning if all pairs of a comparison are noisy."""
    noisy = [serving for serving in session.servings if serving.timing.ratio is None]
    if noisy:
        print_progress(
            f"latency: other processes kept the machine busy during all of {format_count(len(noisy), 'comparison')}"
            f", whose ratios have no interval and may mislead the selection. End those processes, delete "
            f"serving_latency.json in the sweep's folder, and run the same command again"
        )
