"""Served students and the served teacher: scores by serving configuration in served.json, timings of the sweep.

SWEEP/served.json holds the scores of the teacher, SWEEP/trials/KEY/served.json the scores of a finalist. Scores belong
to a checkpoint and a configuration; timings are in SWEEP/serving_latency.json.
"""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from raydistill.config.serving import ServingConfig
from raydistill.core.records import Record
from raydistill.evaluation.metrics import bootstrap_interval_over_seeds
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
    """One student per scored trial and configuration that the session timed, with means over the trial's seeds."""
    students = []
    for trial in trials if session else []:
        served = read_served(trial.folder) if trial.scored else None
        for i, entry in enumerate(served.entries if served else []):
            assert session is not None
            if session.is_timed(trial.size, entry.config):
                is_own = i == 0 and entry.config.variant == session.baseline.variant
                entries = [(trial, entry), *_repeat_entries(trial, entry)]
                runs = [_with_serving(run, own, session, is_own) for run, own in entries]
                students.append(_average_over_seeds(runs, entry.metrics))
    return students


def _repeat_entries(trial: Trial, entry: ServedStudent) -> Iterator[tuple[Trial, ServedStudent]]:
    """The scored repeats of a trial with their scores for the configuration and the rows of an entry of the trial."""
    for repeat in trial.repeats:
        served = read_served(repeat.folder) if repeat.scored else None
        own = served.find(entry.config) if served else None
        if own and (own.split, own.rows) == (entry.split, entry.rows):
            yield repeat, own


def _average_over_seeds(runs: Sequence[Trial], score_names: Iterable[str]) -> Trial:
    """The first of several runs with means of the scores; of the test scores once every run has them.

    The other runs are its `repeats`. `with_interval_over_seeds` adds the intervals of the means.
    """
    student, *repeats = runs
    if not repeats:
        return replace(student, repeats=())
    means = {name: statistics.fmean(run.metrics[name] for run in runs) for name in score_names}
    tests = [run.test for run in runs if run.test]
    names = [name for name in tests[0] if name != "interval"] if len(tests) == len(runs) else []
    test = {name: statistics.fmean(scores[name] for scores in tests) for name in names} or None
    return replace(student, metrics={**student.metrics, **means}, interval=None, test=test, repeats=tuple(repeats))


def with_interval_over_seeds(student: Trial, metric: str) -> Trial:
    """A student with repeats and the intervals of its mean scores, over rows and seeds; other students as they are."""
    if not student.repeats:
        return student
    test_interval = _interval_over_seeds(student, metric, "test") if student.test else None
    test = {**(student.test or {}), "interval": list(test_interval)} if test_interval else student.test
    return replace(student, interval=_interval_over_seeds(student, metric, student.split), test=test)


def _interval_over_seeds(student: Trial, metric: str, split: str) -> tuple[float, float] | None:
    """The interval of the mean score on a split; None if the per-row statistics of a run are missing."""
    rows = [run_rows for run in (student, *student.repeats) if (run_rows := run.row_statistics(split)) is not None]
    complete = len(rows) == student.num_seeds and len(set(map(len, rows))) == 1
    return bootstrap_interval_over_seeds(metric, rows) if complete else None


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
