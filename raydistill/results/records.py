"""What a sweep leaves in its folder: tables, figures, choices and MLflow come from it alone.

SWEEP/space.yaml  SWEEP/sweep.json
SWEEP/trials/KEY/run.json  metrics.jsonl  rows.npz  best/  result.json (last: the trial is finished)
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from raydistill.config.console import home
from raydistill.config.errors import UserError
from raydistill.config.load import read_yaml
from raydistill.config.space import BOUNDED
from raydistill.results.budget import Candidate, Choice, absolute_bounds, choose, front
from raydistill.results.stopping import Curve


@dataclass(frozen=True)
class Trial:
    """One trial as its folder tells it; `status` is "running", without a number, while there is no result.json.

    A trial that was "stopped" early has a scored checkpoint like one that is "done".

    `metrics` are on validation, `test` on the test split (with its "interval"), both with the contract's names.
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

    @property
    def label(self) -> str:
        """A short name for tables and messages, such as "12-3 kd (trial 4)"; the key where there is no number."""
        return self.key if self.number is None else f"{self.size} {self.method} (trial {self.number})"

    @property
    def scored(self) -> bool:
        """Whether there is a checkpoint with its score."""
        return self.status in ("done", "stopped")

    @property
    def device_hours(self) -> float:
        """What the trial has taken; of one under way, up to its last validation."""
        if self.status != "running":
            return self.metrics.get("gpu_hours", 0.0)
        training = self.run_config().get("training") or {}
        seconds = max((float(line.get("time_s", 0.0)) for line in self.history()), default=0.0)
        return seconds * int(training.get("workers", 1)) * int(training.get("threads", 1)) / 3600

    def score(self, metric: str) -> float | None:
        """The validation score."""
        return self.metrics.get(metric, self.metrics.get("score"))

    def rows(self, split: str = "validation") -> np.ndarray | None:
        """Per-row statistics of the main metric, [rows] or [rows, 10]; None where they were not kept."""
        return read_rows(self.folder / "rows.npz", split)

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
                found.append(json.loads(line))
            except ValueError as error:
                if i == len(lines) - 1:
                    break
                raise _damaged(path, f"line {i + 1}: {error}") from None
        return found

    def run_config(self) -> dict[str, Any]:
        """The resolved run, as a nested mapping."""
        path = self.folder / "run.json"
        return read_json(path) if path.exists() else {}


@dataclass(frozen=True)
class Outcome:
    """A sweep read as a whole: its trials, the front, and the choice for each budget."""

    sweep: Path
    name: str
    metric: str
    cost: str
    info: dict[str, Any]
    trials: list[Trial]
    front: list[str]
    bounds: dict[str, dict[str, float]]
    choices: dict[str, Choice]

    @property
    def chosen(self) -> dict[str, str | None]:
        """The chosen trial's key per budget."""
        return {name: choice.best.key if choice.best else None for name, choice in self.choices.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping, or a UserError that names the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise _damaged(path, str(error)) from None
    if not isinstance(data, dict):
        raise _damaged(path, f"a mapping was expected, found {type(data).__name__}")
    return data


def read_rows(path: Path, split: str) -> np.ndarray | None:
    """Per-row statistics of a split, [rows] or [rows, 10]; None where they were not kept."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return np.asarray(arrays[split]) if split in arrays else None
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, str(error)) from None


def read_sweep(sweep: Path) -> dict[str, Any]:
    """The sweep's own record, sweep.json."""
    path = sweep / "sweep.json"
    if not path.exists():
        raise UserError(f"{sweep}: no sweep.json; the sweep was not started or stopped before its first trial")
    return read_json(path)


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


def rivals(sweep: Path, key: str) -> tuple[Curve, list[Curve]]:
    """The validation curve of a trial, and those of the others of its shape, as early stopping compares them."""
    trials = {trial.key: trial for trial in read_trials(sweep)}
    shape = _shape_asked(trials[key])
    others = [t for t in trials.values() if t.key != key and t.status != "failed" and _shape_asked(t) == shape]
    return curve(trials[key]), [curve(trial) for trial in others]


def curve(trial: Trial) -> Curve:
    """(share of the steps done, score) of each validation; a run that ended by itself stays at its best."""
    points = [(float(line["progress"]), float(line["score"])) for line in trial.history() if "progress" in line]
    if trial.status == "done" and points and points[-1][0] < 1:
        points.append((1.0, max(score for _, score in points)))
    return points


def _shape_asked(trial: Trial) -> str:
    """The size as the run names it: a trial under way has no other, and "" is the full teacher's."""
    return str((trial.run_config().get("student") or {}).get("size") or "")


def device_hours(sweep: Path) -> float:
    """What the sweep has taken so far: its trials, whatever became of them, and the teacher's passes, once."""
    teacher = read_sweep(sweep).get("teacher_gpu_hours") or 0.0
    return float(teacher) + sum(trial.device_hours for trial in read_trials(sweep))


def candidates(trials: list[Trial], metric: str) -> list[Candidate]:
    """The finished trials as candidates of a budget."""
    found = []
    for trial in trials:
        score = trial.score(metric)
        if trial.scored and score is not None:
            costs = {k: float(trial.metrics[k]) for k in BOUNDED if trial.metrics.get(k) is not None}
            found.append(Candidate(trial.key, float(score), trial.rows(), costs, trial.label))
    return found


def outcome(sweep: Path) -> Outcome:
    """Read a sweep and judge it: the front by the space's cost, a choice per stored budget."""
    info = read_sweep(sweep)
    trials = read_trials(sweep)
    space = read_yaml(sweep / "space.yaml")[0] if (sweep / "space.yaml").exists() else {}
    cost = (space.get("search") or {}).get("cost", "latency_ms")
    metric = str(info.get("metric", "rouge2"))
    teacher_costs = (info.get("teacher") or {}).get("costs") or {}
    budgets = info.get("budgets") or space.get("budgets") or {}
    students = candidates(trials, metric)
    bounds: dict[str, dict[str, float]] = {}
    choices: dict[str, Choice] = {}
    for name, budget in budgets.items():
        try:
            bounds[name] = absolute_bounds(budget, teacher_costs)
            choices[name] = choose(students, bounds[name], metric)
        except UserError as error:  # a share of what was not measured on the teacher (yet)
            bounds[name] = {}
            choices[name] = Choice(None, None, [], {}, str(error))
    return Outcome(
        sweep=sweep,
        name=str(info.get("name", sweep.name)),
        metric=metric,
        cost=cost,
        info=info,
        trials=trials,
        front=[c.key for c in front(students, cost)],
        bounds=bounds,
        choices=choices,
    )


def _finished(folder: Path) -> Trial:
    path = folder / "result.json"
    data = read_json(path)
    if data.get("status") not in ("done", "stopped", "failed"):
        raise _damaged(path, f"status is {data.get('status')!r}, not done, stopped or failed")
    checkpoint = folder / str(data.get("checkpoint") or "best")
    interval = data.get("interval")
    try:
        return Trial(
            key=folder.name,
            folder=folder,
            status=data["status"],
            number=None if data.get("number") is None else int(data["number"]),
            reason=str(data.get("reason") or ""),
            method=str(data.get("method") or ""),
            size=str(data.get("size") or ""),
            copied=dict(data.get("copied") or {}),
            labels=str(data.get("labels") or ""),
            chosen=dict(data.get("chosen") or {}),
            metrics={k: float(v) for k, v in (data.get("metrics") or {}).items() if v is not None},
            interval=(float(interval[0]), float(interval[1])) if interval else None,
            test=data.get("test") or None,
            steps=int(data.get("steps") or 0),
            signature=str(data.get("signature") or ""),
            checkpoint=checkpoint if checkpoint.is_dir() else None,
            seed=int(data.get("seed") or 0),
        )
    except (TypeError, ValueError, IndexError) as error:
        raise _damaged(path, str(error)) from None


def _running(folder: Path) -> Trial:
    run = read_json(folder / "run.json")
    student, training = run.get("student") or {}, run.get("training") or {}
    return Trial(
        key=folder.name,
        folder=folder,
        status="running",
        method=str(run.get("method") or ""),
        size=str(student.get("size") or ""),
        labels=str(run.get("labels") or ""),
        seed=int(training.get("seed") or 0),
    )


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: damaged: {what}. Delete {path.parent} to have it made again")
