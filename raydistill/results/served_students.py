"""Served students and the served teacher: one entry per serving configuration, in served.json.

SWEEP/served.json holds the entries of the teacher, SWEEP/trials/KEY/served.json the entries of a finalist.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from raydistill.core.files import corrupt_file_error
from raydistill.core.records import Record
from raydistill.results.pareto import pool_latency
from raydistill.results.records import ServingConfig, Trial, scores_with_interval
from raydistill.training.records import SplitScores

SERVED_FILE = "served.json"
# Metrics that depend on the shape and the decoding of a student and not on its weights.
SHAPE_METRICS = ("latency_ms", "latency_ms_b1", "peak_mb", "speedup")

Hardware = dict[str, str | int]  # as `evaluation.latency.hardware` describes it


class ServedStudent(BaseModel):
    """A checkpoint as served on real rows with one configuration.

    Attributes:
        decoding: The configuration.
        engine: The engine that served the checkpoint.
        precision: That engine's precision.
        version: Version of the engine's library.
        hardware: The machine.
        rows: Number of validation rows.
        background_cores: CPU cores that other processes kept busy meanwhile.
        metrics: Scores on the validation split.
        interval: 95 % confidence interval of the main metric.
        costs: Latencies by name.
        test: Scores on the test split, once they are computed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    decoding: ServingConfig
    engine: str
    precision: str
    version: str
    hardware: Hardware
    rows: int
    background_cores: float
    metrics: dict[str, float]
    interval: tuple[float, float]
    costs: dict[str, float]
    test: SplitScores | None = None

    @property
    def setup(self) -> str:
        """Engine, machine and threads, such as "ctranslate2 fp32, AMD EPYC, 2 threads"."""
        threads = [f"{self.hardware.get('threads')} threads"] if self.hardware.get("kind") == "cpu" else []
        return ", ".join([f"{self.engine} {self.precision}", str(self.hardware.get("name")), *threads])


class ServedRecord(Record):
    """The content of served.json.

    Attributes:
        hardware: The machine whose timings the selection uses; read from the teacher's file.
        entries: One entry per machine and configuration, the checkpoint's own decoding first.
    """

    remedy = "Delete this file and run the sweep again to measure again"

    hardware: Hardware
    entries: list[ServedStudent]

    def on(self, hardware: Hardware | None) -> list[ServedStudent]:
        """The entries of one machine; all entries for None."""
        return [entry for entry in self.entries if hardware is None or entry.hardware == hardware]


@dataclass(frozen=True)
class ServedTeacher:
    """The teacher's costs as served.

    Attributes:
        costs: Costs with the teacher's own decoding, as served where these were measured.
        hardware: The machine whose timings count; None before the teacher is served.
        costs_by_decoding: Costs by key of the configuration.
    """

    costs: dict[str, float]
    hardware: Hardware | None
    costs_by_decoding: dict[str, dict[str, float]]


def read_served(folder: Path) -> ServedRecord | None:
    """The record of a folder; None if nothing was served.

    Raises:
        UserError: The file is damaged.
    """
    return ServedRecord.read_if_present(folder / SERVED_FILE)


def load_served_teacher(sweep: Path, costs: dict[str, float]) -> ServedTeacher:
    """The teacher as served. `costs` are those that were measured at fixed lengths.

    Latencies are medians over the teacher's decodings with the same number of beams.
    """
    served = read_served(sweep)
    if served is None:
        return ServedTeacher(costs, None, {})
    entries = served.on(served.hardware)
    pooled = pool_latency([entry.costs for entry in entries], [_latency_group("teacher", entry) for entry in entries])
    by_decoding = {entry.decoding.key: costs for entry, costs in zip(entries, pooled, strict=True)}
    return ServedTeacher({**costs, **next(iter(by_decoding.values()), {})}, served.hardware, by_decoding)


def expand_by_serving(trials: list[Trial], teacher: ServedTeacher) -> list[Trial]:
    """One student per scored trial and decoding, limited to measurements on the teacher's hardware.

    Latencies are medians over the students of equal shape, beams and engine; where the median differs from the
    student's own measurement, the latter is kept as `latency_ms_unpooled`. `speedup` compares with the teacher under
    its own decoding, `speedup_same_decoding` with the teacher under the student's decoding.
    """
    students, groups = [], []
    for trial in trials:
        served = read_served(trial.folder) if trial.scored else None
        for i, entry in enumerate(served.on(teacher.hardware) if served else []):
            students.append(_with_serving(trial, entry, is_default=i == 0))
            groups.append(_latency_group(trial.size, entry))
    pooled_metrics = pool_latency([student.metrics for student in students], groups)
    return [
        _with_pooled_latency(student, metrics, teacher)
        for student, metrics in zip(students, pooled_metrics, strict=True)
    ]


def impute_served_timing(trials: list[Trial], students: list[Trial]) -> list[Trial]:
    """The scored trials that were not served, each with the timings of the first served student of its size.

    A trial's own timings are for fixed output lengths and are not comparable with timings on real rows. Trials of a
    size that was not served are left out.
    """
    served_folders = {student.folder for student in students}
    first_by_size = {student.size: student for student in reversed(students)}
    imputed = []
    for trial in trials:
        if not trial.scored or trial.folder in served_folders or trial.size not in first_by_size:
            continue
        source = first_by_size[trial.size]
        timings = {name: value for name, value in source.metrics.items() if name in SHAPE_METRICS}
        measured = f"{source.measured_with}, on {source.label}"
        imputed.append(replace(trial, metrics={**trial.metrics, **timings}, measured_with=measured))
    return imputed


def _latency_group(size: str, entry: ServedStudent) -> tuple[str, int, str, str, str]:
    """The properties that determine latency; the length penalty affects only the length of the outputs."""
    return size, entry.decoding.beams, entry.engine, entry.precision, entry.version


def _with_serving(trial: Trial, entry: ServedStudent, is_default: bool) -> Trial:
    """The trial with the scores and costs of one served decoding.

    `is_default` marks the checkpoint's own decoding, for which the trial's test scores hold too.
    """
    return replace(
        trial,
        key=f"{trial.key} {entry.decoding.key}",
        metrics={**trial.metrics, **entry.metrics, **entry.costs},
        interval=entry.interval,
        test=scores_with_interval(entry.test) or (trial.test if is_default else None),
        decoding=entry.decoding,
        measured_with=entry.setup,
    )


def _with_pooled_latency(student: Trial, metrics: dict[str, float], teacher: ServedTeacher) -> Trial:
    """The student with pooled latencies and the speed-ups computed from them."""
    same_decoding = teacher.costs_by_decoding.get(student.decoding.key, {}) if student.decoding else {}
    baselines = {"speedup": teacher.costs, "speedup_same_decoding": same_decoding}
    with corrupt_file_error(student.folder / SERVED_FILE):
        speedups = {
            name: costs["latency_ms"] / metrics["latency_ms"]
            for name, costs in baselines.items()
            if costs.get("latency_ms")
        }
    own = student.metrics.get("latency_ms")
    unpooled = {"latency_ms_unpooled": own} if own is not None and own != metrics["latency_ms"] else {}
    return replace(student, metrics={**metrics, **unpooled, **speedups})
