"""Work in pieces: a call trains runs for some minutes, the next one resumes, and results are kept after a kill."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydistill.config.run import Run
from raydistill.core.records import Record
from raydistill.training.inputs import RunInputs
from raydistill.training.loop import Preempted, ReportFn
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


class PartialResults(Record):
    """The results that a benchmark has measured so far.

    Attributes:
        settings: the options that change the results, as JSON values.
        parts: the results, in the order of the measurement.
    """

    settings: dict[str, Any]
    parts: tuple[dict[str, Any], ...] = ()

    @classmethod
    def open(cls, path: Path, settings: dict[str, Any]) -> "PartialResults":
        """The results in a file, or none if there is no such file.

        Raises:
            SystemExit: the results in the file were measured with other settings.
        """
        results = cls.read_if_present(path) or cls(settings=settings)
        if results.settings != settings:
            raise SystemExit(
                f"{path}: measured with other settings ({results.settings}, now {settings}); delete it, or use another "
                f"working folder"
            )
        return results

    def find(self, **values: Any) -> dict[str, Any] | None:
        """The part with these values; None if it is not measured yet."""
        return next(
            (part for part in self.parts if all(part.get(name) == value for name, value in values.items())), None
        )

    def add(self, path: Path, part: dict[str, Any]) -> "PartialResults":
        """The results with another part, also written to the file."""
        results = self.model_copy(update={"parts": (*self.parts, part)})
        results.write(path)
        return results


def never_stop(_metrics: dict[str, Any], _folder: Path | None) -> None:
    """A report callback that stops no run."""


def train_piece(tasks: Sequence[TrainingTask], minutes: float, report: ReportFn = never_stop) -> int:
    """Train the tasks without a result, in their order, for about `minutes`.

    A run that the time interrupts saves its state, and the next call resumes the run from its step.

    Args:
        tasks: the tasks.
        minutes: the time of this call.
        report: called after every validation, see `training.run.train`.

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
            result = train(task.run, task.folder, report, task.inputs, worker)
        except Preempted:
            break
        if result is not None:
            print(f"{task.folder.name}: {result.status}, score {result.metrics.get('score')}", file=sys.stderr)
    return sum(not task.is_finished for task in tasks)
