"""What raydistill does and did under a home: the state of every sweep, run and label job, from their files.

The state is read from the outside, while other processes write: locks name their owners, and records that are missing
or damaged leave a field empty.
"""

import contextlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from raydistill.config.loader import read_yaml
from raydistill.config.run import Run
from raydistill.core.artifact import MANIFEST, LockOwner, lock_owner
from raydistill.core.console import format_duration, format_table
from raydistill.core.errors import UserError
from raydistill.core.last_error import ERROR_FILE, LastError
from raydistill.label_sets.batch_plan import open_plan
from raydistill.label_sets.label_set import read_manifest
from raydistill.results.formatting import format_count
from raydistill.results.records import Trial, read_trials
from raydistill.results.sweep_record import SWEEP_FILE, SweepRecord
from raydistill.results.trial_index import TrialIndex
from raydistill.training.records import (
    PROGRESS_FILE,
    RESULT_FILE,
    RUN_FILE,
    RunProgress,
    RunResult,
    Validation,
    read_history,
    read_run,
)

Kind = Literal["sweep", "run", "labels"]
State = Literal["running", "finished", "failed", "interrupted"]
MAX_ERROR_CHARS = 300


class JobStatus(BaseModel):
    """The state of a sweep, a run or a label job.

    Attributes:
        kind: What the job is.
        name: Name of its folder.
        folder: The folder.
        state: "interrupted" is every job that no process works on and that is neither finished nor failed.
        progress: What is done, in words.
        done: Finished trials, optimiser steps or labelled batches; None if unknown.
        total: The number of all of them.
        metric: The metric of `best`; "" if unknown.
        best: The best validation score so far, by size.
        device_hours: Hours of all devices so far; None if unknown.
        seconds_left: Estimated time until the trials, steps or batches are done; None if unknown.
        error: The last error; "" if there is none.
        process: The process that works on the job.
        host: The machine of that process.
        updated_at: When the newest record was written, in seconds since the epoch.
    """

    model_config = ConfigDict(frozen=True)

    kind: Kind
    name: str
    folder: Path
    state: State
    progress: str = ""
    done: int | None = None
    total: int | None = None
    metric: str = ""
    best: dict[str, float] = {}
    device_hours: float | None = None
    seconds_left: float | None = None
    error: str = ""
    process: int | None = None
    host: str = ""
    updated_at: float = 0.0


def read_statuses(home: Path, name: str | None = None) -> list[JobStatus]:
    """The jobs under a home: running ones first, then the newest first.

    Args:
        home: The folder of all outputs.
        name: Only jobs of this name.

    Raises:
        UserError: There is no job of this name; the message names the jobs that exist.
    """
    jobs = [
        *(sweep_status(folder) for folder in _folders(home / "sweeps", "space.yaml")),
        *(run_status(folder) for folder in _folders(home / "runs", RUN_FILE)),
        *(label_status(folder) for folder in _label_folders(home / "labels")),
    ]
    if name is not None and not (named := [job for job in jobs if job.name == name]):
        existing = ", ".join(sorted({job.name for job in jobs})) or "none"
        raise UserError(f"{name}: no sweep, run or label job of this name under {home}; existing: {existing}")
    selected = jobs if name is None else named
    return sorted(selected, key=lambda job: (job.state != "running", -job.updated_at))


def sweep_status(folder: Path) -> JobStatus:
    """The state of a sweep."""
    problem = ""
    record: SweepRecord | None = None
    hours: float | None = None
    trials: list[Trial] = []
    try:
        record, trials = SweepRecord.read_if_present(folder / SWEEP_FILE), read_trials(folder)
        hours = TrialIndex(folder).device_hours() if record else None
    except UserError as error:
        problem = str(error)
    owner = lock_owner(folder)
    finished = [trial for trial in trials if trial.status != "running"]
    failed = [trial for trial in finished if trial.status == "failed"]
    ended = record is not None and record.status == "finished"
    last_error = problem or _last_error(folder) or (f"{failed[-1].key}: {failed[-1].reason}" if failed else "")
    total = _num_trials(folder)
    metric = record.teacher.metric if record else ""
    return JobStatus(
        kind="sweep",
        name=folder.name,
        folder=folder,
        state="finished" if ended and not owner else _unfinished_state(owner, problem or _last_error(folder)),
        progress=_describe_sweep(record, trials, total, bool(owner)),
        done=len(finished),
        total=total,
        metric=metric,
        best=_best_scores(finished, metric),
        device_hours=hours,
        seconds_left=_search_seconds_left(finished, total) if owner and record and not ended else None,
        error=last_error[:MAX_ERROR_CHARS],
        process=owner.pid if owner else None,
        host=owner.host if owner else "",
        updated_at=_newest([folder / SWEEP_FILE, folder / "space.yaml", *(t.folder / RESULT_FILE for t in trials)]),
    )


def run_status(folder: Path) -> JobStatus:
    """The state of a run of `raydistill train`."""
    problem = ""
    run: Run | None = None
    result: RunResult | None = None
    progress: RunProgress | None = None
    history: list[Validation] = []
    try:
        run, result = read_run(folder / RUN_FILE), RunResult.read_if_present(folder / RESULT_FILE)
        progress, history = RunProgress.read_if_present(folder / PROGRESS_FILE), read_history(folder)
    except UserError as error:
        problem = str(error)
    owner = None if result else lock_owner(folder)
    failed = result is not None and not result.scored
    last_error = problem or (result.reason if result and failed else "") or _last_error(folder)
    total = progress.total_steps if progress else history[-1].total_steps if history else None
    done = result.steps if result else max([progress.step if progress else 0, *(v.step for v in history)])
    hours = result.metrics.get("device_hours") if result else history[-1].device_hours if history else None
    size = (result.size if result else None) or (run.student.size if run else None) or "model"
    best = max(history, key=lambda validation: validation.score, default=None)
    return JobStatus(
        kind="run",
        name=folder.name,
        folder=folder,
        state="finished" if result and not failed else _unfinished_state(owner, last_error),
        progress=f"step {done:,} of {total:,}" if total else f"{done:,} steps" if done else "before the first step",
        done=done,
        total=total,
        metric=best.metric if best else "",
        best={size: best.score} if best else {},
        device_hours=hours,
        seconds_left=progress.seconds_left if progress and owner else None,
        error=last_error[:MAX_ERROR_CHARS],
        process=owner.pid if owner else None,
        host=owner.host if owner else result.host if result else "",
        updated_at=_newest([folder / name for name in (RESULT_FILE, PROGRESS_FILE, RUN_FILE)]),
    )


def label_status(folder: Path) -> JobStatus:
    """The state of a label job; `folder` is that of the label set, which exists at the end only."""
    work_dir = folder.with_name(f".{folder.name}.work")
    owner, error = lock_owner(folder), _last_error(work_dir)
    rows: int | None = None
    hours: float | None = None
    total: int | None = None
    done: int | None = None
    outputs = sorted((work_dir / "out").glob("batch-*.parquet"))
    with contextlib.suppress(UserError):
        if (folder / MANIFEST).is_file():
            manifest = read_manifest(folder)
            rows, hours = manifest.rows, manifest.device_hours
        elif plan := open_plan(work_dir / "plan"):
            total, done = len(plan), len(outputs)
    seconds_left = None
    if owner and total and done:
        new = [_modified(path) for path in outputs if _modified(path) >= owner.since.timestamp()]
        seconds_left = (time.time() - owner.since.timestamp()) / len(new) * (total - done) if new else None
    is_complete = rows is not None
    return JobStatus(
        kind="labels",
        name=folder.name,
        folder=folder,
        state="finished" if is_complete else _unfinished_state(owner, error),
        progress=format_count(rows, "row") if rows is not None else f"{done} of {total} batches" if total else "plan",
        done=done,
        total=total,
        device_hours=hours,
        seconds_left=None if is_complete else seconds_left,
        error="" if is_complete else error[:MAX_ERROR_CHARS],
        process=owner.pid if owner and not is_complete else None,
        host=owner.host if owner and not is_complete else "",
        updated_at=_newest([folder / MANIFEST, work_dir, *outputs[-1:]]),
    )


def format_statuses(jobs: list[JobStatus], home: Path) -> str:
    """A table of jobs, with the last error of each below."""
    if not jobs:
        return f"no sweep, run or label job under {home}"
    rows = []
    for job in jobs:
        best = ", ".join(f"{size} {score:.2f}" for size, score in sorted(job.best.items()))
        hours = "-" if job.device_hours is None else f"{job.device_hours:.3f}"
        left = "-" if job.seconds_left is None else format_duration(job.seconds_left)
        where = f"{job.process} on {job.host}" if job.process else "-"
        rows.append([job.name, job.kind, job.state, job.progress, best or "-", hours, left, where])
    header = ["name", "kind", "state", "progress", "best so far", "device-hours", "time left", "process"]
    errors = [f"{job.name}: last error: {job.error}" for job in jobs if job.error]
    return "\n".join([format_table(header, rows), *([""] if errors else []), *errors])


def _unfinished_state(owner: LockOwner | None, error: str) -> State:
    return "running" if owner else "failed" if error else "interrupted"


def _describe_sweep(record: SweepRecord | None, trials: list[Trial], total: int | None, is_running: bool) -> str:
    finished = [trial for trial in trials if trial.status != "running"]
    counts = f"{len(finished)} of {format_count(total, 'trial')}" if total else format_count(len(finished), "trial")
    num_failed = sum(trial.status == "failed" for trial in finished)
    counts += f", {num_failed} failed" if num_failed else ""
    if record is None:
        return "preparation" if is_running else "not prepared"
    if is_running and record.status == "running" and total and len(finished) >= total:
        return f"{counts}, serving"
    active = [step for trial in trials if trial.status == "running" and (step := _step_of(trial.folder))]
    return ", ".join([counts, *(active if is_running else [])])


def _step_of(folder: Path) -> str:
    """The number of steps of a trial that is training, such as "40/120"."""
    with contextlib.suppress(UserError):
        if progress := RunProgress.read_if_present(folder / PROGRESS_FILE):
            return f"{progress.step}/{progress.total_steps} steps"
    return ""


def _num_trials(folder: Path) -> int | None:
    """`search.trials` of the space that the sweep was started with."""
    with contextlib.suppress(UserError, LookupError, TypeError, ValueError):
        return int(read_yaml(folder / "space.yaml")[0]["search"]["trials"])
    return None


def _best_scores(trials: list[Trial], metric: str) -> dict[str, float]:
    best: dict[str, float] = {}
    for trial in trials:
        score = trial.score(metric)
        if trial.scored and score is not None:
            best[trial.size] = max(score, best.get(trial.size, score))
    return best


def _search_seconds_left(finished: list[Trial], total: int | None) -> float | None:
    """Seconds until all trials are finished, from the ends of the trials of the last hours; None for lack of data.

    The ends of finished trials are evenly spaced on average, so pauses between commands would mislead: only trials
    that ended after the last gap of more than ten times the median gap count.
    """
    ends = sorted(_modified(trial.folder / RESULT_FILE) for trial in finished)
    if total is None or len(ends) < 3 or len(ends) >= total:
        return None
    gaps = [later - earlier for earlier, later in itertools.pairwise(ends)]
    typical = sorted(gaps)[len(gaps) // 2]
    recent: list[float] = []
    for gap in reversed(gaps):
        if gap > 10 * typical:
            break
        recent.append(gap)
    if len(recent) < 2:
        return None
    since_last = time.time() - ends[-1]
    return max(0.0, sum(recent) / len(recent) * (total - len(ends)) - since_last)


def _last_error(folder: Path) -> str:
    with contextlib.suppress(UserError):
        if record := LastError.read_if_present(folder / ERROR_FILE):
            return record.message
    return ""


def _folders(parent: Path, file: str) -> Iterator[Path]:
    """The folders that hold a file, without hidden ones, which are being written or deleted."""
    return (path.parent for path in sorted(parent.glob(f"[!.]*/{file}")))


def _label_folders(parent: Path) -> list[Path]:
    """The folders of complete label sets and of label jobs."""
    complete = set(_folders(parent, MANIFEST))
    working = {path.with_name(path.name.removeprefix(".").removesuffix(".work")) for path in parent.glob(".*.work")}
    return sorted(complete | working)


def _newest(paths: list[Path]) -> float:
    return max(map(_modified, paths), default=0.0)


def _modified(path: Path) -> float:
    """When a file was written, in seconds since the epoch; 0 if it does not exist."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
