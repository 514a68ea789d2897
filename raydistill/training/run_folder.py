"""The folder of a run: its lock, its config, the fingerprints of its inputs, its checkpoints and its result.

FOLDER/run.json                 the run's config, written first
FOLDER/input_fingerprints.json  teacher and data that the run was started with
FOLDER/metrics.jsonl            the metrics of every validation
FOLDER/checkpoint-STEP/         the best checkpoint while the run is training; best/ afterwards
FOLDER/state.json               the saved state (state.py); removed when the run is finished
FOLDER/rows.npz                 per-row statistics of the scores
FOLDER/result.json              the result, written last: the run is finished
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from raydistill.config.run import RUNTIME_ONLY_FIELDS, Run
from raydistill.core.errors import TransientError, UserError
from raydistill.core.files import (
    SCHEMA_VERSION,
    atomic_path,
    check_schema,
    corrupt_file_error,
    read_json,
    write_json_atomic,
)
from raydistill.training.records import RESULT_FILE, RunResult

LOCK_TIMEOUT_S = 60.0
CONFIG_FILE = "run.json"
FINGERPRINTS_FILE = "input_fingerprints.json"


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, which one process at a time may hold.

    A worker may outlive its driver by some seconds, until Ray ends it; the worker of a retry waits for the lock.

    Raises:
        TransientError: The lock is not free after `LOCK_TIMEOUT_S`.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=LOCK_TIMEOUT_S)
    except Timeout:
        raise TransientError(f"{folder}: another process is training this run; wait for it or stop it") from None
    try:
        yield
    finally:
        lock.release()


def check_same_config(folder: Path, run: Run) -> None:
    """Write the run's config into a new folder; check that an existing folder belongs to the same config.

    Settings of memory (`RUNTIME_ONLY_FIELDS`) may differ. Settings missing from run.json have their defaults.

    Raises:
        UserError: The folder holds a run of another config, of another schema version, or run.json is damaged.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        write_json_atomic(path, {"schema": SCHEMA_VERSION, **run.model_dump(mode="json")})
        return
    record = read_json(path)
    check_schema(path, record)
    with corrupt_file_error(path):
        recorded = Run.model_validate({name: value for name, value in record.items() if name != "schema"})
    if recorded.model_dump(exclude=RUNTIME_ONLY_FIELDS) != run.model_dump(exclude=RUNTIME_ONLY_FIELDS):
        raise UserError(f"{folder}: holds a run with other settings; give this run another name, or delete the folder")


def check_same_inputs(folder: Path, current: dict[str, Any]) -> None:
    """Record the input fingerprints of a new run; check that they are unchanged when a run resumes.

    Args:
        folder: The run's folder.
        current: Fingerprints of teacher and data, as `tokenized_data.input_fingerprints` returns them.

    Raises:
        UserError: The teacher or a split changed since the run was started.
    """
    path = folder / FINGERPRINTS_FILE
    if not path.is_file():
        write_json_atomic(path, current)
    elif changed := changed_inputs(read_json(path), current):
        raise UserError(
            f"{folder}: inputs changed since this run was started: {', '.join(changed)}; "
            f"give this run another name, or delete the folder"
        )


def changed_inputs(recorded: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """The inputs whose fingerprints differ: "teacher", "train split" and so on."""
    changed = ["teacher"] if recorded.get("teacher") != current["teacher"] else []
    fingerprints = recorded.get("data") or {}
    return changed + [
        f"{split} split" for split, fingerprint in fingerprints.items() if current["data"].get(split) != fingerprint
    ]


def write_result(folder: Path, result: RunResult) -> None:
    """Write the result of a run, then delete what a finished run does not need."""
    result.write(folder / RESULT_FILE)
    delete_working_files(folder, result)


def delete_working_files(folder: Path, result: RunResult) -> None:
    """Delete the saved state of a finished run, and the checkpoints of a failed run."""
    for path in [*folder.glob("state*"), *folder.glob(".state*")]:
        path.unlink()
    if not result.scored:
        for checkpoint in [*folder.glob("checkpoint-*"), folder / "best"]:
            shutil.rmtree(checkpoint, ignore_errors=True)


def promote_best_checkpoint(folder: Path, best_step: int) -> Path:
    """Rename the checkpoint of the best step to best/, and return its path."""
    best, checkpoint = folder / "best", folder / f"checkpoint-{best_step}"
    if checkpoint.is_dir():  # otherwise an earlier call renamed it and was killed afterwards
        shutil.rmtree(best, ignore_errors=True)
        checkpoint.rename(best)
    return best


def write_row_statistics(path: Path, rows: dict[str, np.ndarray]) -> None:
    """Write per-row statistics of the scores, [rows] or [rows, 10] by split, as a compressed .npz file."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **rows)  # type: ignore[arg-type]
