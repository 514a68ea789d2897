"""The records in a sweep's folder, from which all tables, figures, choices and MLflow runs are derived.

SWEEP/space.yaml, SWEEP/sweep.json, and for each trial SWEEP/trials/KEY/run.json, metrics.jsonl, rows.npz, best/ and
result.json. A trial writes result.json last: a trial that has one is finished. SWEEP/seeds/KEY-seedN/ has the same
files for the run of trial KEY with seed N.
"""

import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from raydistill.config.run import Run
from raydistill.config.serving import ServingConfig
from raydistill.config.shapes import FULL_SIZE, Shape
from raydistill.core.errors import UserError
from raydistill.core.files import PARSE_ERRORS, corrupt_file_error, safe_join
from raydistill.core.paths import raydistill_home
from raydistill.results.sweep_record import SWEEP_FILE
from raydistill.training.records import (
    RESULT_FILE,
    RUN_FILE,
    RunResult,
    SplitScores,
    Validation,
    read_history,
    read_run,
)

SEED_RUNS = "seeds"  # the folder of the runs of trials with other seeds
SEED_SEPARATOR = "-seed"
MAX_ROW_BYTES = 2**30  # unpacked size of per-row statistics: ten numbers for each of 13 million rows


@dataclass(frozen=True)
class Trial:
    """A trial as recorded in its folder, or a student: a trial served with one configuration.

    A finalist of the sweep has one student for each configuration. The student's key and label name the configuration,
    and its scores and costs were measured with that configuration.

    Attributes:
        key: Name of the trial's folder; for a student, followed by the configuration.
        folder: The trial's folder.
        status: "done"; "stopped" (early, with a scored checkpoint); "failed"; or "running", which is any trial
            without result.json, also one that was killed.
        number: Position in the order of proposals; None while the trial is running.
        reason: Why the trial failed or was stopped.
        copied_layers: The teacher's layers that the student started from, by "encoder" and "decoder".
        params: The values that the search chose.
        metrics: Scores on the rows of `split`, and costs.
        interval: 95 % confidence interval of the main metric on these rows.
        test: Scores on the test split, with their "interval".
        steps: Optimiser steps taken.
        signature: How the scores were computed, in the notation of the metric's library.
        checkpoint: The best checkpoint; None if there is none.
        serving: How a student is served; None for a trial.
        measured_with: Engine, precision and hardware of a student's timings.
        engine: The engine of the trial's own scores, with its precision; None if no text was scored.
        split: The rows of `metrics`: "validation", which checks and search also use, or "selection", the rows that are
            kept for the choice.
        repeats: Runs of the trial with other seeds (`search.seeds`). Of a student: the runs that are served like the
            student, and `metrics` are then means over all seeds.
    """

    key: str
    folder: Path
    status: Literal["done", "stopped", "failed", "running"]
    number: int | None = None
    reason: str = ""
    method: str = ""
    size: str = ""
    copied_layers: dict[str, list[int]] = field(default_factory=dict)
    labels: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    interval: tuple[float, float] | None = None
    test: dict[str, Any] | None = None
    steps: int = 0
    signature: str = ""
    checkpoint: Path | None = None
    seed: int = 0
    serving: ServingConfig | None = None
    measured_with: str = ""
    engine: str | None = None
    split: str = "validation"
    repeats: tuple["Trial", ...] = ()

    @property
    def num_seeds(self) -> int:
        """Number of scored runs, which differ in their seeds."""
        return 1 + sum(repeat.scored for repeat in self.repeats)

    @property
    def label(self) -> str:
        """A short name for tables and messages, such as "12-3 kd (trial 4)"; the key if there is no number."""
        if self.number is None:
            return self.key
        serving = f", {self.serving.label}" if self.serving else ""
        seeds = f", mean of {self.num_seeds} seeds" if self.serving and self.repeats else ""
        return f"{self.size} {self.method} (trial {self.number}{serving}{seeds})"

    @property
    def scored(self) -> bool:
        """Whether the trial has a checkpoint and that checkpoint's scores."""
        return self.status in ("done", "stopped")

    @property
    def device_hours(self) -> float:
        """Device-hours of the trial; of a running trial, until its last validation."""
        if self.status != "running":
            return self.metrics.get("device_hours", 0.0)
        return max((validation.device_hours for validation in self.history()), default=0.0)

    def score(self, metric: str) -> float | None:
        """The score that the trial, or the student, is chosen by."""
        return self.metrics.get(metric, self.metrics.get("score"))

    def row_statistics(self, split: str | None = None) -> np.ndarray | None:
        """Per-row statistics of the main metric, [rows] or [rows, statistics]; None if the trial has none.

        `split`: by default, the split of the trial's scores in `metrics`.
        """
        split = split or self.split
        return read_row_statistics(self.folder / rows_filename(split, self.serving), split)

    def history(self) -> list[Validation]:
        """The validations in order.

        Raises:
            UserError: metrics.jsonl is damaged.
        """
        return read_history(self.folder, repeat_trial_remedy(self.folder))

    def requested_shape(self) -> Shape:
        """The shape that the run's config names, which running trials have too.

        Raises:
            UserError: run.json is damaged.
        """
        return self.run_config().student.shape

    def run_config(self) -> Run:
        """The resolved run from run.json.

        Raises:
            UserError: run.json is missing, is damaged, or has another schema version.
        """
        return read_run(self.folder / RUN_FILE)


def _read_finished(folder: Path) -> Trial:
    result = RunResult.read(folder / RESULT_FILE)
    with corrupt_file_error(folder / RESULT_FILE):
        checkpoint = safe_join(folder, "best")
    # A kill can come between the failure and the deletion of the failed run's checkpoint
    has_checkpoint = result.scored and checkpoint.is_dir()
    return Trial(
        key=folder.name,
        folder=folder,
        status=result.status,
        number=result.number,
        reason=result.reason,
        method=result.method,
        size=result.size or "",
        copied_layers={side: layers for side, layers in (result.copied or {}).items() if layers is not None},
        labels=result.labels,
        params=result.params,
        metrics=result.metrics,
        interval=result.interval,
        test=scores_with_interval(result.test),
        steps=result.steps,
        signature=result.signature,
        checkpoint=checkpoint if has_checkpoint else None,
        seed=result.seed,
        engine=result.engine,
    )


def scores_with_interval(scores: SplitScores | None) -> dict[str, Any] | None:
    """Scores of the test split with their "interval", as a `Trial` has them."""
    if scores is None:
        return None
    return scores.metrics | ({"interval": list(scores.interval)} if scores.interval else {})


def _read_running(folder: Path) -> Trial:
    run = read_run(folder / RUN_FILE)
    return Trial(
        key=folder.name,
        folder=folder,
        status="running",
        method=run.method,
        size=_known_shape_name(run),
        labels=run.resolved_labels,
        seed=run.training.seed,
    )


def _known_shape_name(run: Run) -> str:
    """The name of a run's shape; an empty text if the run has the teacher's layers, whose number it does not name."""
    return "" if run.student.shape.size == FULL_SIZE else run.student.shape.name


def read_trial(folder: Path) -> Trial | None:
    """The trial in a folder; None if the trial was not started.

    Raises:
        UserError: result.json or run.json is damaged.
    """
    if (folder / RESULT_FILE).exists():
        return _read_finished(folder)
    return _read_running(folder) if (folder / RUN_FILE).exists() else None


def read_trials(sweep: Path) -> list[Trial]:
    """Every trial that was started: the finished trials by number, then the trials without result.json ("running").

    Runs of the trials with other seeds are in `repeats`.
    """
    repeats = defaultdict(list)
    for run in _read_runs(sweep / SEED_RUNS):
        repeats[run.key.rpartition(SEED_SEPARATOR)[0]].append(run)
    trials = [
        replace(trial, repeats=tuple(sorted(repeats[trial.key], key=lambda run: run.seed)))
        for trial in _read_runs(sweep / "trials")
    ]
    return sorted(trials, key=lambda trial: (trial.status == "running", trial.number or 0, trial.key))


def _read_runs(parent: Path) -> list[Trial]:
    """The runs of the folders in `parent`, by name."""
    return [run for folder in sorted(parent.glob("*/")) if (run := read_trial(folder)) is not None]


def seed_run_folder(sweep: Path, key: str, seed: int) -> Path:
    """The folder in which the run of a trial is repeated with another seed."""
    return sweep / SEED_RUNS / f"{key}{SEED_SEPARATOR}{seed}"


def scoring_engines(trials: Iterable[Trial]) -> list[str]:
    """The engines of the trials' own scores. Scores of different engines can differ by more than the students."""
    return sorted({trial.engine for trial in trials if trial.engine})


def count_finished_trials(sweep: Path) -> int:
    """The number of trials with a result. Reads names of files only."""
    return len(list((sweep / "trials").glob(f"*/{RESULT_FILE}")))


def read_row_statistics(path: Path, split: str, remedy: str | None = None) -> np.ndarray | None:
    """Per-row statistics of a split, [rows] or [rows, statistics]; None if the file or the split is missing.

    Args:
        path: The file.
        split: Name of the split.
        remedy: What the user can do about a damaged file; by default, repeat the trial in the file's folder.

    Raises:
        UserError: The file is damaged, or unpacks to more than `MAX_ROW_BYTES`.
    """
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MAX_ROW_BYTES:
                raise ValueError(f"it unpacks to more than {MAX_ROW_BYTES:,} bytes")
        with np.load(path, allow_pickle=False) as arrays:
            rows = np.asarray(arrays[split]) if split in arrays else None
    except (*PARSE_ERRORS, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _corrupt_trial_error(path, str(error), remedy) from None
    if rows is not None and (rows.ndim not in (1, 2) or rows.dtype.kind not in "iuf"):
        detail = f"expected rows of numbers, got {rows.dtype} in {rows.ndim} dimensions"
        raise _corrupt_trial_error(path, detail, remedy)
    return rows


def find_sweep(name_or_path: str) -> Path:
    """The folder of a sweep, from its path or its name under `raydistill_home()/sweeps`.

    Raises:
        UserError: There is no such sweep; the message names the sweeps that exist.
    """
    sweeps = raydistill_home() / "sweeps"
    for folder in (Path(name_or_path), sweeps / name_or_path):
        if (folder / SWEEP_FILE).exists() or (folder / "space.yaml").exists():
            return folder.absolute()
    names = sorted(p.parent.name for p in sweeps.glob(f"*/{SWEEP_FILE}"))
    existing = f"sweeps in {sweeps}: {', '.join(names)}" if names else f"there are no sweeps in {sweeps}"
    raise UserError(f"{name_or_path}: no such sweep; {existing}. Give a folder or a name")


def repeat_trial_remedy(folder: Path) -> str:
    """What a user does about a trial that lost a file, as a sentence without its period."""
    return f"Delete {folder} and run the sweep again to repeat the trial"


def _corrupt_trial_error(path: Path, detail: str, remedy: str | None = None) -> UserError:
    return UserError(f"{path}: damaged: {detail}. {remedy or repeat_trial_remedy(path.parent)}")


def rows_filename(split: str, serving: ServingConfig | None) -> str:
    """The file of per-row statistics: of the trial's own scores, or of a split served with a configuration."""
    return f"rows-{split}-{serving.key}.npz" if serving else "rows.npz"
