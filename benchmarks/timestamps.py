"""Corpora to label, and the times at which workers finish batches; shared by the benchmarks of the label job."""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydistill.inference.decoding import Engine, Hypothesis


@dataclass(frozen=True)
class BatchEnd:
    """The end of a batch.

    Attributes:
        worker: the process id or another number of the worker.
        time: seconds since the epoch.
        rows: the batch's rows, or another amount of work.
    """

    worker: int
    time: float
    rows: float


class RecordingEngine:
    """An engine that appends process id, time and number of rows to a file in `folder` after each batch."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._engine, self._file = engine, folder / f"{os.getpid()}.jsonl"

    def generate(self, texts: list[str], *args: Any, **options: Any) -> list[list[Hypothesis]]:
        """Generate as `Engine.generate` does, then record the end of the batch."""
        hypotheses = self._engine.generate(texts, *args, **options)
        with self._file.open("a", encoding="utf-8") as out:
            out.write(json.dumps([os.getpid(), time.time(), len(texts)]) + "\n")
        return hypotheses

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def open_recording_engine(
    folder: Path, open_function: Callable[..., Any], *args: Any, **options: Any
) -> RecordingEngine:
    """Open an engine with `open_function`, recording to `folder`; for `pseudolabel(engine_factory=...)`."""
    return RecordingEngine(open_function(*args, **options), folder)


def read_ends(folder: Path) -> list[BatchEnd]:
    """Read what the `RecordingEngine` of every process recorded in `folder`."""
    lines = [line for file in folder.iterdir() for line in file.read_text(encoding="utf-8").splitlines()]
    return [BatchEnd(*json.loads(line)) for line in lines]


def steady_rate(ends: list[BatchEnd]) -> float:
    """Rows per second, summed over workers: each worker's rows after its first batch, by the time since that batch.

    Start-up is thus not part of the rate.
    """
    total = 0.0
    for worker in {end.worker for end in ends}:
        first, *rest = sorted((end for end in ends if end.worker == worker), key=lambda end: end.time)
        total += sum(end.rows for end in rest) / (rest[-1].time - first.time) if rest else 0.0
    return total


def write_jsonl(file: Path, pairs: Iterator[tuple[str, str]]) -> None:
    """Write a corpus of (source, target) pairs with ids that count from 0."""
    with file.open("w", encoding="utf-8") as out:
        for i, (source, target) in enumerate(pairs):
            out.write(json.dumps({"id": str(i), "source": source, "target": target}) + "\n")
