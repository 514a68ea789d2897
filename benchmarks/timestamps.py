"""Rows to label, and who labelled how many of them when: what the benchmarks of the product's job share."""

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
    """A batch was done: by which process, at which second of the clock, and how many rows (how much work) it had."""

    worker: int
    at: float
    rows: float


class RecordingEngine:
    """An engine that writes a line to `folder` whenever it has labelled a batch: process, time and number of rows."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._engine, self._file = engine, folder / f"{os.getpid()}.jsonl"

    def generate(self, texts: list[str], *args: Any, **options: Any) -> list[list[Hypothesis]]:
        """As Engine.generate."""
        hypotheses = self._engine.generate(texts, *args, **options)
        with self._file.open("a", encoding="utf-8") as out:
            out.write(json.dumps([os.getpid(), time.time(), len(texts)]) + "\n")
        return hypotheses

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def open_recording_engine(
    folder: Path, open_function: Callable[..., Any], *args: Any, **options: Any
) -> RecordingEngine:
    """The engine that `open_function` opens, with stamps in `folder`; for `pseudolabel(engine_factory=...)`."""
    return RecordingEngine(open_function(*args, **options), folder)


def read_ends(folder: Path) -> list[BatchEnd]:
    """What all actors noted."""
    lines = [line for file in folder.iterdir() for line in file.read_text(encoding="utf-8").splitlines()]
    return [BatchEnd(*json.loads(line)) for line in lines]


def rate(ends: list[BatchEnd]) -> float:
    """Rows per second of all workers: each one's rows after its first batch by the time since that one."""
    total = 0.0
    for worker in {end.worker for end in ends}:
        first, *rest = sorted((end for end in ends if end.worker == worker), key=lambda end: end.at)
        total += sum(end.rows for end in rest) / (rest[-1].at - first.at) if rest else 0.0
    return total


def write_jsonl(file: Path, pairs: Iterator[tuple[str, str]]) -> None:
    """A corpus of (source, target) pairs, ids counted from 0."""
    with file.open("w", encoding="utf-8") as out:
        for i, (source, target) in enumerate(pairs):
            out.write(json.dumps({"id": str(i), "source": source, "target": target}) + "\n")
