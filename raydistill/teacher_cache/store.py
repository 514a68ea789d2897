"""Ragged arrays on disk, in parts that appear whole: what the teacher cache is made of. Knows no model.

A store is a folder with `about.json` and a folder per array: `part-000000.bin` and so on, and last of all
`manifest.json`. A part holds the vectors of its rows one after another; which rows, `plan_parts` says from their
lengths, so the store's key must cover them.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from raydistill.core.errors import UserError
from raydistill.core.files import damage_told, read_json, write_atomic, write_json_atomic

# Part of every key: a store of another layout is another store.
FORMAT = 2
PART_TOKENS = 2**15
WINDOW_ROWS = 20_000
# numpy has no bfloat16: its bits are kept as int16.
KINDS: dict[str, type[np.generic]] = {"bf16": np.int16, "fp32": np.float32}


@dataclass(frozen=True)
class Kept:
    """A store on disk: its folder, what it says of itself, the arrays that are whole, its bytes and its last use."""

    folder: Path
    about: dict[str, Any]
    arrays: list[str]
    bytes: int
    used: float


def plan_parts(lengths: Sequence[int]) -> list[list[int]]:
    """Rows by part: neighbours in length, longest first, within windows of `WINDOW_ROWS`; `PART_TOKENS` each at most.

    A row longer than that is a part of its own.
    """
    parts: list[list[int]] = []
    for window in range(0, len(lengths), WINDOW_ROWS):
        rows = range(window, min(window + WINDOW_ROWS, len(lengths)))
        room = -1
        for row in sorted(rows, key=lambda i: -lengths[i]):
            if lengths[row] > room:
                parts.append([])
                room = PART_TOKENS
            parts[-1].append(row)
            room = max(0, room - lengths[row])
    return parts


def part_path(array: Path, number: int) -> Path:
    """The file of a part."""
    return array / f"part-{number:06d}.bin"


def write_part(array: Path, number: int, vectors: np.ndarray) -> None:
    """Write a part [vectors, width], whole or not at all."""
    write_atomic(part_path(array, number), vectors.tobytes())


def missing_parts(array: Path, count: int) -> list[int]:
    """The parts of an array that are still to be made; none once its manifest is there."""
    if is_whole(array):
        return []
    return [n for n in range(count) if not part_path(array, n).is_file()]


def bytes_of_parts(array: Path) -> int:
    """Bytes of the parts that are there."""
    return sum(path.stat().st_size for path in array.glob("part-*.bin"))


def write_time(array: Path, number: int, device_seconds: float) -> None:
    """Remember what a part took, so that a pass that was killed and taken up again tells the whole of it."""
    write_json_atomic(part_path(array, number).with_suffix(".json"), {"device_seconds": device_seconds})


def finish_array(array: Path, facts: dict[str, Any]) -> None:
    """Say that all parts are there, and what they took together."""
    times = list(array.glob("part-*.json"))
    seconds = sum(_device_seconds(path) for path in times)
    write_json_atomic(array / "manifest.json", {**facts, "device_seconds": seconds})
    for path in times:
        path.unlink()


def device_seconds(array: Path) -> float:
    """What making a finished array took, as `finish_array` said."""
    return _device_seconds(array / "manifest.json")


def _device_seconds(path: Path) -> float:
    found = read_json(path)
    with damage_told(path):
        return float(found["device_seconds"])


def is_whole(array: Path) -> bool:
    """Whether an array is finished."""
    return (array / "manifest.json").is_file()


def sweep_orphans(store: Path) -> None:
    """Delete what killed writers left; to be called by the only process that is at work on the store."""
    for orphan in store.rglob(".*.making"):
        orphan.unlink(missing_ok=True)


def mark_used(store: Path) -> None:
    """Remember that a store was read; one that others own keeps its date."""
    try:
        os.utime(store / "about.json")
    except OSError:
        return


def kept(root: Path) -> Iterator[Kept]:
    """The stores under `root`, last used last; a link that leads elsewhere is none. UserError for a damaged one."""
    found = []
    for path in root.glob("*/about.json"):
        folder = path.parent
        if folder.is_symlink():
            continue
        size = sum(p.stat().st_size for p in folder.rglob("*.bin"))
        arrays = sorted(p.parent.name for p in folder.glob("*/manifest.json"))
        about = read_json(path)
        with damage_told(path):
            if about["kept"] not in KINDS:
                raise ValueError(f"kept is {about['kept']!r}")
        found.append(Kept(folder, about, arrays, size, path.stat().st_mtime))
    yield from sorted(found, key=lambda store: store.used)


def lock(root: Path, group: str) -> FileLock:
    """Held by the one process that makes the stores under `root` whose about.json names `group`."""
    if Path(group).name != group:
        raise ValueError(f"group {group!r} is no name of a store")
    root.mkdir(parents=True, exist_ok=True)
    return FileLock(root / f".{group}.lock")


def remove(store: Kept) -> None:
    """Delete a store: what says that it is whole first. UserError where it is being made."""
    with damage_told(store.folder / "about.json"):
        held = lock(store.folder.parent, store.about.get("group", store.folder.name))
    try:
        with held.acquire(timeout=0):
            for manifest in store.folder.glob("*/manifest.json"):
                manifest.unlink()
            shutil.rmtree(store.folder)
    except Timeout:
        raise UserError(f"{store.folder}: is being made; wait for the run that makes it, or end that run") from None
