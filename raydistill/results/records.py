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

from raydistill.config.space import BOUNDED, NAME, check_bounds
from raydistill.core.console import home
from raydistill.core.errors import UserError
from raydistill.core.files import UNFIT, damage_told, inside, read_json

MOST_ROW_BYTES = 2**30  # of unpacked per-row statistics: ten numbers for each of 13 million rows


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
        with damage_told(self.folder / "metrics.jsonl"):
            return max((float(line.get("gpu_hours", 0.0)) for line in self.history()), default=0.0)

    def score(self, metric: str) -> float | None:
        """The validation score."""
        return self.metrics.get(metric, self.metrics.get("score"))

    def rows(self, split: str = "validation") -> np.ndarray | None:
        """Per-row statistics of the main metric, [rows] or [rows, 10]; None where they were not kept."""
        return read_rows(self.folder / rows_name(split, self.decoding), split)

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
                raise _damaged(path, f"line {i + 1}: {error}") from None
        return found

    def run_config(self) -> dict[str, Any]:
        """The resolved run, as a nested mapping."""
        path = self.folder / "run.json"
        return read_json(path) if path.exists() else {}


def read_rows(path: Path, split: str) -> np.ndarray | None:
    """Per-row statistics of a split, [rows] or [rows, 10]; None where they were not kept."""
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as packed:
            if sum(entry.file_size for entry in packed.infolist()) > MOST_ROW_BYTES:
                raise ValueError("it would unpack to more than any sweep has rows for")
        with np.load(path, allow_pickle=False) as arrays:
            rows = np.asarray(arrays[split]) if split in arrays else None
    except (*UNFIT, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _damaged(path, str(error)) from None
    if rows is not None and (rows.ndim not in (1, 2) or rows.dtype.kind not in "iuf"):
        raise _damaged(path, f"rows of numbers were expected, found {rows.dtype} of {rows.ndim} dimensions")
    return rows


def read_sweep(sweep: Path) -> dict[str, Any]:
    """The sweep's own record, sweep.json."""
    path = sweep / "sweep.json"
    if not path.exists():
        raise UserError(f"{sweep}: no sweep.json; the sweep was not started or stopped before its first trial")
    info = read_json(path)
    with damage_told(path):
        if not re.fullmatch(NAME, str(info.get("name", "unnamed"))):  # a folder of artifacts is called so
            raise ValueError(f"name is {info['name']!r}")
        if info.get("tracking_uri") is not None and not isinstance(info["tracking_uri"], str):
            raise TypeError("tracking_uri is no text")
        float(info.get("teacher_gpu_hours") or 0)
        teacher = dict(info.get("teacher") or {})
        numbers_of(teacher.get("metrics") or {})
        numbers_of({name: value for name, value in (teacher.get("costs") or {}).items() if name in BOUNDED})
        for name, bounds in (info.get("budgets") or {}).items():
            check_bounds(name, bounds)
    return info


def read_trials(sweep: Path) -> list[Trial]:
    """Every trial that has begun, by number; one without result.json is "running" (or was killed)."""
    found = []
    for folder in sorted((sweep / "trials").glob("*/")):
        if (folder / "result.json").exists():
            found.append(_finished(folder))
        elif (folder / "run.json").exists():
            found.append(_running(folder))
    return sorted(found, key=lambda trial: (trial.status == "running", trial.number or 0, trial.key))


def open_sweep(name_or_path: str) -> Path:
    """A sweep's folder by path, or by name under `home()/sweeps`; a UserError names those that exist."""
    sweeps = home() / "sweeps"
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


def numbers_of(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if value is not None}


def tested(test: dict[str, Any] | None) -> dict[str, Any] | None:
    """Scores on the test split and their "interval"; None where there are none."""
    if not test:
        return None
    scores = numbers_of({name: value for name, value in test.items() if name != "interval"})
    return scores | ({"interval": list(ends_of(test["interval"]))} if test.get("interval") else {})


def ends_of(ends: Any) -> tuple[float, float]:
    low, high = ends
    return float(low), float(high)


def _finished(folder: Path) -> Trial:
    path = folder / "result.json"
    data = read_json(path)
    if data.get("status") not in ("done", "stopped", "failed"):
        raise _damaged(path, f"status is {data.get('status')!r}, not done, stopped or failed")
    interval = data.get("interval")
    with damage_told(path):
        checkpoint = inside(folder, str(data.get("checkpoint") or "best"))
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
            metrics=numbers_of(data.get("metrics") or {}),
            interval=ends_of(interval) if interval else None,
            test=tested(data.get("test")),
            steps=int(data.get("steps") or 0),
            signature=str(data.get("signature") or ""),
            # A kill may have come before a failed run's checkpoint was deleted
            checkpoint=checkpoint if checkpoint.is_dir() and data["status"] != "failed" else None,
            seed=int(data.get("seed") or 0),
        )


def _running(folder: Path) -> Trial:
    run = read_json(folder / "run.json")
    with damage_told(folder / "run.json"):
        return Trial(
            key=folder.name,
            folder=folder,
            status="running",
            method=str(run.get("method") or ""),
            size=str((run.get("student") or {}).get("size") or ""),
            labels=str(run.get("labels") or ""),
            seed=int((run.get("training") or {}).get("seed") or 0),
        )


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: damaged: {what}. Delete {path.parent} to have it made again")


def decoding_name(decoding: dict[str, Any]) -> str:
    """A way of decoding in a file's name: "b4-p0.6"; one beam has no length penalty."""
    penalty = f"-p{decoding['length_penalty']:g}" if decoding["beams"] > 1 else ""
    return f"b{decoding['beams']}{penalty}"


def rows_name(split: str, decoding: dict[str, Any] | None) -> str:
    """The file of the per-row statistics: of a run's own scores, or of a split as it was served with a decoding."""
    return f"rows-{split}-{decoding_name(decoding)}.npz" if decoding else "rows.npz"


def decoding_label(decoding: dict[str, Any]) -> str:
    """The same for people."""
    if decoding["beams"] == 1:
        return "1 beam"
    return f"{decoding['beams']} beams, length penalty {decoding['length_penalty']:g}"
