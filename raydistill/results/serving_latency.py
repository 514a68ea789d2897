"""The timings of a sweep, SWEEP/serving_latency.json, and of the first pass before them, SWEEP/first_pass.json.

Latency belongs to a shape, a serving configuration and a number of rows, and not to the weights of a student. All
timings of serving_latency.json were taken in one session, by one run of the command. Times of two sessions differ by
more than two students do, so they are never compared.
"""

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from raydistill.config.serving import EngineVariant, ServingConfig, ThroughputSetting
from raydistill.core.records import Record
from raydistill.evaluation.latency import LATENCY_BATCH_SIZES, Hardware
from raydistill.evaluation.paired_latency import PairedTiming

LATENCY_FILE = "serving_latency.json"
FIRST_PASS_FILE = "first_pass.json"
TEACHER_SHAPE = "teacher"  # not the teacher's size: a student of that size has other texts and other times


class TimedServing(BaseModel):
    """A shape as served with one configuration, timed in pairs with the baseline.

    Attributes:
        shape: Size of the student, or `TEACHER_SHAPE`.
        config: The configuration.
        cost: "latency_ms" for a batch of 32 rows, "latency_ms_b1" for single rows.
        engine: Engine and precision, such as "ctranslate2 int8".
        timing: Latency as a share of the baseline's, with all call times.
        peak_mb: Peak memory in MB of the engine and its calls; None if the system does not report it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: str
    config: ServingConfig
    cost: str
    engine: str
    timing: PairedTiming
    peak_mb: float | None = None


class MeasuredThroughput(BaseModel):
    """The rows per second of a shape as served with one configuration.

    Attributes:
        shape: Size of the student, or `TEACHER_SHAPE`.
        config: The configuration.
        setting: The threads and batches that decode the most rows per second.
        rows_per_s: Rows per second of the median pass.
        background_cores: Average number of CPU cores that other processes kept busy meanwhile.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: str
    config: ServingConfig
    setting: ThroughputSetting
    rows_per_s: float = Field(gt=0)
    background_cores: float


class LatencySession(Record):
    """The content of serving_latency.json. The baseline is the teacher with its own decoding.

    Attributes:
        started_at: Start of the session (UTC).
        hardware: The machine.
        versions: Versions of the engines' libraries.
        baseline: The baseline's configuration: own decoding, full precision, whole vocabulary.
        baseline_engine: The baseline's engine and precision.
        baseline_ms: The baseline's median milliseconds by cost.
        baseline_peak_mb: The baseline's peak memory.
        representatives: By shape, the key of the trial whose checkpoint was timed.
        servings: Timings of all other pairs of shape and configuration.
        throughputs: Rows per second of the baseline and of the students; empty if no budget bounds them.
    """

    remedy: ClassVar[str | None] = "Delete this file and run the sweep again to measure again"

    started_at: datetime
    hardware: Hardware
    versions: dict[str, str]
    baseline: ServingConfig
    baseline_engine: str
    baseline_ms: dict[str, float]
    baseline_peak_mb: float | None = None
    representatives: dict[str, str]
    servings: list[TimedServing]
    throughputs: tuple[MeasuredThroughput, ...] = ()

    @model_validator(mode="after")
    def _check_numbers(self) -> "LatencySession":
        if self.baseline_ms.keys() != LATENCY_BATCH_SIZES.keys() or not min(self.baseline_ms.values()) > 0:
            raise ValueError(f"baseline_ms: expected positive milliseconds of {', '.join(LATENCY_BATCH_SIZES)}")
        for serving in self.servings:
            if serving.cost not in self.baseline_ms or not (serving.timing.pairs and serving.timing.best_ratio > 0):
                raise ValueError(f"the timing of {serving.shape}, {serving.config.label}, has no positive ratio")
        return self

    def is_timed(self, shape: str, config: ServingConfig) -> bool:
        """Whether a shape was timed with a configuration, for every cost."""
        return self._is_baseline(shape, config) or len(self._find(shape, config)) == len(LATENCY_BATCH_SIZES)

    def costs(self, shape: str, config: ServingConfig) -> dict[str, float]:
        """Milliseconds by cost, with `_low` and `_high` where the interval is known, peak memory, and `rows_per_s`.

        The milliseconds are the ratio times the baseline's median in this session.
        """
        peaks = [self.baseline_peak_mb] if self._is_baseline(shape, config) else []
        costs = dict(self.baseline_ms) if self._is_baseline(shape, config) else {}
        for serving in self._find(shape, config):
            baseline_ms = self.baseline_ms[serving.cost]
            costs[serving.cost] = serving.timing.best_ratio * baseline_ms
            if serving.timing.interval is not None:
                low, high = serving.timing.interval
                costs |= {f"{serving.cost}_low": low * baseline_ms, f"{serving.cost}_high": high * baseline_ms}
            peaks.append(serving.peak_mb)
        if known := [peak for peak in peaks if peak is not None]:
            costs["peak_mb"] = max(known)
        if throughput := self.throughput(shape, config):
            costs["rows_per_s"] = throughput.rows_per_s
        return costs

    def throughput(self, shape: str, config: ServingConfig) -> MeasuredThroughput | None:
        """The rows per second of a configuration; None if they were not measured."""
        return next((t for t in self.throughputs if t.shape == shape and t.config.key == config.key), None)

    def speedups(self, shape: str, config: ServingConfig) -> dict[str, float]:
        """How many times faster than the teacher, for a batch of 32 rows.

        `speedup` compares with the teacher as served today: own decoding, full precision, whole vocabulary.
        `speedup_same_serving` compares with the teacher under the same configuration, where that was timed.
        """
        own = self.costs(shape, config)["latency_ms"]
        same = self.costs(TEACHER_SHAPE, config).get("latency_ms")
        speedups = {"speedup": self.baseline_ms["latency_ms"] / own}
        return {**speedups, **({"speedup_same_serving": same / own} if same is not None else {})}

    def engine(self, shape: str, config: ServingConfig) -> str:
        """Engine and precision of a timed configuration."""
        return next((serving.engine for serving in self._find(shape, config)), self.baseline_engine)

    def describe_machine(self) -> str:
        """The machine and its threads, such as "AMD EPYC, 2 threads"."""
        threads = [f"{self.hardware.get('threads')} threads"] if self.hardware.get("kind") == "cpu" else []
        return ", ".join([str(self.hardware.get("name")), *threads])

    def _is_baseline(self, shape: str, config: ServingConfig) -> bool:
        return shape == TEACHER_SHAPE and config.key == self.baseline.key

    def _find(self, shape: str, config: ServingConfig) -> list[TimedServing]:
        return [s for s in self.servings if s.shape == shape and s.config.key == config.key]


class FirstPassTime(BaseModel):
    """Milliseconds of a shape for a batch of 32 rows, with a number of beams and an engine variant."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: str
    beams: int
    variant: EngineVariant
    ms: float


class FirstPass(Record):
    """The content of first_pass.json: short timings that find the configurations of each shape worth scoring.

    Only times of one shape and one number of beams are comparable, since they were taken in alternation.

    Attributes:
        hardware: The machine.
        versions: Versions of the engines' libraries.
        unsupported: Precisions of the space that the machine cannot compute.
        times: The timings.
    """

    remedy: ClassVar[str | None] = "Delete this file and run the sweep again to measure again"

    hardware: Hardware
    versions: dict[str, str]
    unsupported: list[str]
    times: list[FirstPassTime]

    def variant_times(self, shape: str, beams: int) -> dict[EngineVariant, float]:
        """Milliseconds by variant of a shape with a number of beams."""
        return {entry.variant: entry.ms for entry in self.times if (entry.shape, entry.beams) == (shape, beams)}

    def merged_with(self, other: "FirstPass") -> "FirstPass":
        """This record with the timings and the unsupported precisions of another record."""
        unsupported = sorted({*self.unsupported, *other.unsupported})
        return self.with_times(other.times).model_copy(update={"unsupported": unsupported})

    def with_times(self, times: Iterable[FirstPassTime]) -> "FirstPass":
        """The record with further timings, which replace earlier timings of these shapes and numbers of beams."""
        new = list(times)
        replaced = {(entry.shape, entry.beams) for entry in new}
        kept = [entry for entry in self.times if (entry.shape, entry.beams) not in replaced]
        return self.model_copy(update={"times": [*kept, *new]})


def read_session(sweep: Path) -> LatencySession | None:
    """The timings of a sweep; None if nothing was timed.

    Raises:
        UserError: The file is damaged.
    """
    return LatencySession.read_if_present(sweep / LATENCY_FILE)
