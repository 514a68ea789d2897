"""Rows to label, and who labelled how many of them when: what the benchmarks of the product's job share."""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class End:
    """A batch was done: by which process, at which second of the clock, and how many rows (how much work) it had."""

    worker: int
    at: float
    rows: float


class Stamps:
    """The product's hook for a second product of the same pass: here, a line when a batch is labelled."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.file = folder / f"{os.getpid()}.jsonl"

    def __call__(self, number: int, ids: list[str], sources: list[str], labels: list[str]) -> None:
        """Note who labelled how many rows when."""
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps([os.getpid(), time.time(), len(ids)]) + "\n")


def read_stamps(folder: Path) -> list[End]:
    """What all actors noted."""
    lines = [line for file in folder.iterdir() for line in file.read_text(encoding="utf-8").splitlines()]
    return [End(*json.loads(line)) for line in lines]


def rate(ends: list[End]) -> float:
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
