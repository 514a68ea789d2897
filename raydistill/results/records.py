"""What a sweep leaves in its folder: tables, figures, choices and MLflow come from it alone.

SWEEP/space.yaml  SWEEP/sweep.json
SWEEP/trials/KEY/run.json  metrics.jsonl  rows.npz  best/  result.json (last: the trial is finished)
"""

import json
import re
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from raydistill.config.run import NAME_PATTERN
from raydistill.config.space import COST_METRICS, check_bounds
from raydistill.core.errors import UserError
from raydistill.core.files import PARSE_ERRORS, corrupt_file_error, read_json, safe_join
from raydistill.core.paths import raydistill_home

MAX_ROW_BYTES = 2**30  # of unpacked per-row statistics: ten numbers for each of 13 million rows


@dataclass(frozen=True)
class Trial:
    """One trial as its folder tells it; `status` is "running", without a number, while there is no result.json.

    A trial that was "stopped" early has a scored checkpoint like one that is "done". A finalist stands once per way of
    `decoding` that it was served with: its key and label tell which, and its scores and costs are of that.

    `metrics` are on validation, `test` on the test split (with its "interval"), both with the contract's names.
    `measured` says with which engine and precision, and on what, a finalist was timed.
    """

    key: str
    folder: Path
    status: Literal["done", "stopped", "failed", "running"]
    number: int | None = None
    reason: str = ""
    method: str = ""
    size: str = ""
    copied: dict[str, list[int]] = field(default_factory=dict)
    labels: str = ""
    chosen: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    interval: tuple[float, float] | None = None
    test: dict[str, Any] | None = None
    steps: int = 0
    signature: str = ""
    checkpoint: Path | None = None
    seed: int = 0
    decoding: dict[str, Any] | None = None
    measured: str = ""

    @property
    def label(self) -> str:
        """A short name for tables and messages, such as "12-3 kd (trial 4)"; the key where there is no number."""
        if self.number is None:
            return self.key
        served = f", {decoding_label(self.decoding)}" if self.decoding else ""
        return f"{self.size} {self.method} (trial {self.number}{served})"

    @property
    def scored(self) -> bool:
        """Whether there is a checkpoint with its score."""
        return self.status in ("done", "stopped")

    @property
    def device_hours(self) -> float:
        """What the trial has taken; of one under way, up to its last validation."""
        if self.status != "running":
            return self.metrics.get("gpu_hours", 0.0)
        with corrupt_file_error(self.folder / "metrics.jsonl"):
            return max((float(line.get("gpu_hours", 0.0)) for line in self.history()), default=0.0)

    def score(self, metric: str) -> float | None:
        """The validation score."""
        return self.metrics.get(metric, self.metrics.get("score"))

    def rows(self, split: str = "validation") -> np.ndarray | None:
        """Per-row statistics of the main metric, [rows] or [rows, 10]; None where they were not kept."""
        return read_rows(self.folder / rows_filename(split, self.decoding), split)

    def history(self) -> list[dict[str, Any]]:
        """One mapping per validation, in order. A torn last line, as a kill leaves it, is passed over."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return []
        lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
        found = []
        for i, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                found.append(dict(json.loads(line).items()))
            except (ValueError, AttributeError, RecursionError) as error:
                if i == len(lines) - 1:
                    break
                raise _corrupt_trial_error(path, f"line {i + 1}: {error}") from None
        return found

    def run_config(self) -> dict[str, Any]:
        """The resolved run, as a nested mapping."""
        path = self.folder / "run.json"
        config = read_json(path) if path.exists() else {}
        return {name: value for name, value in config.items() if name != "schema"}


def read_rows(path: Path, split: str) -> np.ndarray | None:
    """Per-row statistics of a split, [rows] or [rows, 10]; None where they were not kept."""
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as packed:
            if sum(entry.file_size for entry in packed.infolist()) > MAX_ROW_BYTES:
                raise ValueError("it would unpack to more than any sweep has rows for")
        with np.load(path, allow_pickle=False) as arrays:
            rows = np.asarray(arrays[split]) if split in arrays else None
    except (*PARSE_ERRORS, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _corrupt_trial_error(path, str(error)) from None
    if rows is not None and (rows.ndim not in (1, 2) or rows.dtype.kind not in "iuf"):
        raise _corrupt_trial_error(path, f"rows of numbers were expected, found {rows.dtype} of {rows.ndim} dimensions")
    return rows


def read_sweep(sweep: Path) -> dict[str, Any]:
    """The sweep's own record, sweep.json."""
    path = sweep / "sweep.json"
    if not path.exists():
        raise UserError(f"{sweep}: no sweep.json; the sweep was not started or stopped before its first trial")
    info = read_json(path)
    with corrupt_file_error(path):
        if not re.fullmatch(NAME_PATTERN, str(info.get("name", "unnamed"))):  # a folder of artifacts is called so
            raise ValueError(f"name is {info['name']!r}")
        if info.get("tracking_uri") is not None and not isinstance(info["tracking_uri"], str):
            raise TypeError("tracking_uri is no text")
        float(info.get("teacher_gpu_hours") or 0)
        teacher = dict(info.get("teacher") or {})
        to_floats(teacher.get("metrics") or {})
        to_floats({name: value for name, value in (teacher.get("costs") or {}).items() if name in COST_METRICS})
        for name, bounds in (info.get("budgets") or {}).items():
            check_bounds(name, bounds)
    return info


def read_trials(sweep: Path) -> list[Trial]:
    """Every trial that has begun, by number; one without result.json is "running" (or was killed)."""
    found = []
    for folder in sorted((sweep / "trials").glob("*/")):
        if (folder / "result.json").exists():
            found.append(_read_finished(folder))
        elif (folder / "run.json").exists():
            found.append(_read_running(folder))
    return sorted(found, key=lambda trial: (trial.status == "running", trial.number or 0, trial.key))


def find_sweep(name_or_path: str) -> Path:
    """A sweep's folder by path, or by name under `home()/sweeps`; a UserError names those that exist."""
    sweeps = raydistill_home() / "sweeps"
    for folder in (Path(name_or_path), sweeps / name_or_path):
        if (folder / "sweep.json").exists() or (folder / "space.yaml").exists():
            return folder.absolute()
    known = sorted(p.parent.name for p in sweeps.glob("*/sweep.json"))
    there = f"sweeps in {sweeps}: {', '.join(known)}" if known else f"there are no sweeps in {sweeps}"
    raise UserError(f"{name_or_path}: no such sweep; {there}. Give a folder or a name")


def device_hours(sweep: Path) -> float:
    """What the sweep has taken so far: its trials, whatever became of them, and the teacher's passes, once."""
    teacher = read_sweep(sweep).get("teacher_gpu_hours") or 0.0
    return float(teacher) + sum(trial.device_hours for trial in read_trials(sweep))


def to_floats(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if value is not None}


def parse_test_scores(test: dict[str, Any] | None) -> dict[str, Any] | None:
    """Scores on the test split and their "interval"; None where there are none."""
    if not test:
        return None
    scores = to_floats({name: value for name, value in test.items() if name != "interval"})
    return scores | ({"interval": list(parse_interval(test["interval"]))} if test.get("interval") else {})


def parse_interval(interval: Any) -> tuple[float, float]:
    low, high = interval
    return float(low), float(high)


def _read_finished(folder: Path) -> Trial:
    path = folder / "result.json"
    data = read_json(path)
    if data.get("status") not in ("done", "stopped", "failed"):
        raise _corrupt_trial_error(path, f"status is {data.get('status')!r}, not done, stopped or failed")
    interval = data.get("interval")
    with corrupt_file_error(path):
        checkpoint = safe_join(folder, str(data.get("checkpoint") or "best"))
        return Trial(
            key=folder.name,
            folder=folder,
            status=data["status"],
            number=None if data.get("number") is None else int(data["number"]),
            reason=str(data.get("reason") or ""),
            method=str(data.get("method") or ""),
            size=str(data.get("size") or ""),
            copied={side: [int(n) for n in ns] for side, ns in (data.get("copied") or {}).items() if ns is not None},
            labels=str(data.get("labels") or ""),
            chosen=dict(data.get("chosen") or {}),
            metrics=to_floats(data.get("metrics") or {}),
            interval=parse_interval(interval) if interval else None,
            test=parse_test_scores(data.get("test")),
            steps=int(data.get("steps") or 0),
            signature=str(data.get("signature") or ""),
            # A kill may have come before a failed run's checkpoint was deleted
            checkpoint=checkpoint if checkpoint.is_dir() and data["status"] != "failed" else None,
            seed=int(data.get("seed") or 0),
        )


def _read_running(folder: Path) -> Trial:
    run = read_json(folder / "run.json")
    with corrupt_file_error(folder / "run.json"):
        return Trial(
            key=folder.name,
            folder=folder,
            status="running",
            method=str(run.get("method") or ""),
            size=str((run.get("student") or {}).get("size") or ""),
            labels=str(run.get("labels") or ""),
            seed=int((run.get("training") or {}).get("seed") or 0),
        )


def _corrupt_trial_error(path: Path, detail: str) -> UserError:
    return UserError(f"{path}: damaged: {detail}. Delete {path.parent} to have it made again")


def decoding_key(decoding: dict[str, Any]) -> str:
    """A way of decoding in a file's name: "b4-p0.6"; one beam has no length penalty."""
    penalty = f"-p{decoding['length_penalty']:g}" if decoding["beams"] > 1 else ""
    return f"b{decoding['beams']}{penalty}"


def rows_filename(split: str, decoding: dict[str, Any] | None) -> str:
    """The file of the per-row statistics: of a run's own scores, or of a split as it was served with a decoding."""
    return f"rows-{split}-{decoding_key(decoding)}.npz" if decoding else "rows.npz"


def decoding_label(decoding: dict[str, Any]) -> str:
    """The same for people."""
    if decoding["beams"] == 1:
        return "1 beam"
    return f"{decoding['beams']} beams, length penalty {decoding['length_penalty']:g}"
