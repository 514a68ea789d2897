"""Checkpoints of trials that another machine trained."""

from dataclasses import replace

from raydistill.cluster import snapshots
from raydistill.results.records import Trial


def download_checkpoint(trial: Trial) -> Trial:
    """The trial or student with its checkpoint, which is downloaded if the machines share no folder.

    The folder of a trial whose records alone were downloaded has no checkpoint.
    """
    snapshots.pull(trial.folder)
    checkpoint = trial.folder / "best"
    return replace(trial, checkpoint=checkpoint if trial.scored and checkpoint.is_dir() else None)
