"""The folder of a run: its lock, its config, the fingerprints of its inputs, its checkpoints and its result.

FOLDER/run.json                 the run's config, written first
FOLDER/input_fingerprints.json  teacher and data that the run was started with
FOLDER/student.json             layers and units that the student copies, where rows decide (student_choice.py)
FOLDER/metrics.jsonl            the metrics of every validation
FOLDER/progress.json            the step of a run that is training; removed when the run is finished
FOLDER/checkpoint-STEP/         the best checkpoint while the run is training; best/ afterwards
FOLDER/state/                   the saved state (state.py); removed when the run is finished
FOLDER/.engine/                 the converted checkpoint during a validation
FOLDER/rows.npz                 per-row statistics of the scores
FOLDER/result.json              the result, written last: the run is finished

The checkpoints and the state are artifacts. One process at a time holds the lock of the folder.
"""

import os
import shutil
from pathlib import Path

import numpy as np

from raydistill.config.run import RUNTIME_ONLY_FIELDS, Run
from raydistill.core import artifact
from raydistill.core.errors import UserError
from raydistill.core.files import atomic_path, fsync_folder, remove_temporary_files
from raydistill.training.records import (
    FINGERPRINTS_FILE,
    PROGRESS_FILE,
    RESULT_FILE,
    RUN_FILE,
    InputFingerprints,
    RunResult,
    read_run,
    write_run,
)
from raydistill.training.state import STATE_FOLDER

CONVERSION_FOLDER = ".engine"


def check_same_config(folder: Path, run: Run) -> None:
    """Write the run's config into a new folder; check that an existing folder belongs to the same config.

    Settings of memory (`RUNTIME_ONLY_FIELDS`) may differ. Settings missing from run.json have their defaults.

    Raises:
        UserError: The folder holds a run of another config, of another schema version, or run.json is damaged.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        write_run(path, run)
    elif read_run(path).model_dump(exclude=RUNTIME_ONLY_FIELDS) != run.model_dump(exclude=RUNTIME_ONLY_FIELDS):
        raise UserError(f"{folder}: holds a run with other settings; give this run another name, or delete the folder")


def check_same_inputs(folder: Path, current: InputFingerprints) -> None:
    """Record the input fingerprints of a new run; check that they are unchanged when a run resumes.

    Raises:
        UserError: The teacher or a split changed since the run was started.
    """
    path = folder / FINGERPRINTS_FILE
    if not path.is_file():
        current.write(path)
    elif changed := InputFingerprints.read(path).changes(current):
        raise UserError(
            f"{folder}: inputs changed since this run was started: {', '.join(changed)}; "
            f"give this run another name, or delete the folder"
        )


def write_result(folder: Path, result: RunResult) -> None:
    """Write the result of a run, then delete what a finished run does not need."""
    result.write(folder / RESULT_FILE)
    delete_working_files(folder, result)


def delete_working_files(folder: Path, result: RunResult) -> None:
    """Delete the saved state of a finished run, the checkpoints of a failed run, and the files that kills left."""
    artifact.remove(folder / STATE_FOLDER)
    (folder / PROGRESS_FILE).unlink(missing_ok=True)
    delete_checkpoints(folder)
    if not result.scored:
        artifact.remove(folder / "best")
    shutil.rmtree(folder / CONVERSION_FOLDER, ignore_errors=True)
    remove_temporary_files(folder)


def delete_checkpoints(folder: Path, keep_step: int | None = None) -> None:
    """Delete the checkpoints of validations except that of `keep_step`, and the folders that kills left.

    Raises:
        TransientError: Another process took over, so this process has lost its lock.
    """
    for path in artifact.artifacts_with_leftovers(folder):
        artifact.remove_leftovers(path)
    for path in folder.glob("checkpoint-*"):
        if path.name != f"checkpoint-{keep_step}":
            artifact.remove(path)


def promote_best_checkpoint(folder: Path, best_step: int) -> Path:
    """Rename the checkpoint of the best step to best/, and return its path.

    After a kill at any moment the checkpoint is whole under one of the two names, and the next call completes the
    renaming.
    """
    best, checkpoint = folder / "best", folder / f"checkpoint-{best_step}"
    if artifact.is_complete(checkpoint):  # otherwise an earlier call renamed it and was killed afterwards
        artifact.remove(best)
        os.rename(checkpoint, best)
        fsync_folder(folder)
    return best


def write_row_statistics(path: Path, rows: dict[str, np.ndarray]) -> None:
    """Write per-row statistics of the scores, [rows] or [rows, statistics] by split, as a compressed .npz file."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **rows)  # type: ignore[arg-type]
