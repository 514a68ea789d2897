"""Training of many runs in one process and in pieces: a call trains for some minutes, the next one resumes."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydistill.config.run import Run
from raydistill.training.inputs import RunInputs
from raydistill.training.loop import Preempted
from raydistill.training.records import RESULT_FILE
from raydistill.training.run import train
from raydistill.training.workers import Worker


@dataclass(frozen=True)
class TrainingTask:
    """A run to train in a folder, with the inputs that were prepared for it."""

    run: Run
    folder: Path
    inputs: RunInputs

    @property
    def is_finished(self) -> bool:
        """Whether the run has its result."""
        return (self.folder / RESULT_FILE).is_file()


def train_piece(tasks: Sequence[TrainingTask], minutes: float) -> int:
    """Train the tasks without a result, in their order, for about `minutes`.

    A run that the time interrupts saves its state, and the next call resumes the run from its step.

    Returns:
        The number of tasks that still have no result.
    """
    deadline = time.monotonic() + 60 * minutes
    worker = Worker(is_draining=lambda: time.monotonic() >= deadline)
    for task in tasks:
        if task.is_finished:
            continue
        if time.monotonic() >= deadline:
            break
        try:
            result = train(task.run, task.folder, _never_stop, task.inputs, worker)
        except Preempted:
            break
        if result is not None:
            print(f"{task.folder.name}: {result.status}, score {result.metrics.get('score')}", file=sys.stderr)
    return sum(not task.is_finished for task in tasks)


def _never_stop(_metrics: dict[str, Any], _folder: Path | None) -> None:
    """A report callback that stops no run."""
