"""Served students and the served teacher: scores by serving configuration in served.json, timings of the sweep.

SWEEP/served.json holds the scores of the teacher, SWEEP/trials/KEY/served.json the scores of a finalist. Scores belong
to a checkpoint and a configuration; timings are in SWEEP/serving_latency.json.
"""

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from raydistill.config.serving import ServingConfig
from raydistill.core.records import Record
from raydistill.results.records import Trial, scores_with_interval
from raydistill.results.serving_latency import LatencySession
from raydistill.training.records import SplitScores

SERVED_FILE = "served.json"
# Metrics that depend on the shape and the serving configuration of a student and not on its weights.
SHAPE_METRICS = (
    *(f"{cost}{suffix}" for cost in ("latency_ms", "latency_ms_b1") for suffix in ("", "_low", "_high")),
    *("peak_mb", "memory_mb", "rows_per_s", "speedup", "speedup_same_serving"),
)


class ServedStudent(BaseModel):
    """The scores of a checkpoint as served with one configuration.

    Attributes:
        config: The configuration.
        engine: The engine that served the checkpoint.
        precision: Precision of the engine.
        version: Version of the engine's library.
        split: The scored split: "selection", or "validation" if no rows are kept for the choice.
        rows: Number of rows of the split.
        metrics: Scores on the split.
        interval: 95 % confidence interval of the main metric.
        memory_mb: Memory of the weights in MB.
        test: Scores on the test split, once they are computed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: ServingConfig
    engine: str
    precision: str
    version: str
    split: str = "validation"
    rows: int
    metrics: dict[str, float]
    interval: tuple[float, float]
    memory_mb: float
    test: SplitScores | None = None

    def as_split_scores(self) -> SplitScores:
        """The scores with the engine that generated the texts."""
        return SplitScores(**self.metrics, interval=self.interval, engine=f"{self.engine} {self.precision}")


class ServedRecord(Record):
    """The content of served.json: one entry per configuration, the checkpoint's own decoding first."""

    remedy: ClassVar[str | None] = "Delete this file and run the sweep again to score again"

    entries: list[ServedStudent]

    def find(self, config: ServingConfig) -> ServedStudent | None:
        """The entry of a configuration."""
        return next((entry for entry in self.entries if entry.config.key == config.key), None)

    def with_entries(self, entries: list[ServedStudent]) -> "ServedRecord":
        """The record with further entries, which replace earlier entries of these configurations."""
        by_key = {entry.config.key: entry for entry in [*self.entries, *entries]}
        return self.model_copy(update={"entries": list(by_key.values())})


def read_served(folder: Path) -> ServedRecord | None:
    """The record of a folder; None if nothing was served.

    Raises:
        UserError: The file is damaged.
    """
    return ServedRecord.read_if_present(folder / SERVED_FILE)


def expand_by_serving(trials: list[Trial], session: LatencySession | None) -> list[Trial]:
    """One student per scored trial and configuration that the session timed."""
    students = []
    for trial in trials if session else []:
        served = read_served(trial.folder) if trial.scored else None
        for i, entry in enumerate(served.entries if served else []):
            assert session is not None
            if session.is_timed(trial.size, entry.config):
                is_own = i == 0 and entry.config.variant == session.baseline.variant
                students.append(_with_serving(trial, entry, session, is_own))
    return students


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


def _with_serving(trial: Trial, entry: ServedStudent, session: LatencySession, is_own: bool) -> Trial:
    """The trial with the scores and costs of one configuration.

    `is_own` marks the checkpoint's own decoding in full precision, for which the trial's test scores hold too.
    """
    own = {name: value for name, value in trial.metrics.items() if name not in SHAPE_METRICS}
    costs = {"memory_mb": entry.memory_mb, **session.costs(trial.size, entry.config)}
    return replace(
        trial,
        key=f"{trial.key} {entry.config.key}",
        metrics={**own, **entry.metrics, **costs, **session.speedups(trial.size, entry.config)},
        interval=entry.interval,
        test=scores_with_interval(entry.test) or (trial.test if is_own else None),
        serving=entry.config,
        split=entry.split,
        measured_with=f"{session.engine(trial.size, entry.config)}, {session.describe_machine()}",
    )
