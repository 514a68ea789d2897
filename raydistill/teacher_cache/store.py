"""Ragged arrays on disk in parts, each written whole or not at all: the storage of the teacher cache.

A store is a folder with `about.json` and a folder per array: `part-000000.bin` and so on, then `manifest.json`. A part
holds the vectors of its rows one after another. `plan_parts` derives the rows of each part from the lengths of all
rows, so the key of a store must cover the lengths.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict

from raydistill.core.errors import UserError
from raydistill.core.files import (
    SCHEMA_VERSION,
    TEMPORARY_SUFFIX,
    check_schema,
    corrupt_file_error,
    read_json,
    write_atomic,
    write_json_atomic,
)

ABOUT_FILE = "about.json"
MANIFEST = "manifest.json"
# Part of every key: another layout gives another store.
FORMAT_VERSION = 2
PART_TOKENS = 2**15
WINDOW_ROWS = 20_000
MAX_GROUP_BYTES = 240  # a file name has at most 255, with the dot and the suffix of the lock
# numpy has no bfloat16, so the bits are stored as int16.
STORAGE_DTYPES: dict[str, type[np.generic]] = {"bf16": np.int16, "fp32": np.float32}


class StoreRecord(BaseModel):
    """The content of `about.json`: teacher and data of a store, its data types, and the lock of its builder.

    `width` is the size of a vector. `lock_group` names the lock that is held while the store is built.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    teacher: str
    data: str
    teacher_key: str
    storage_dtype: Literal["bf16", "fp32"]
    compute_dtype: Literal["bf16", "fp32"]
    width: int
    lock_group: str


@dataclass(frozen=True)
class StoreInfo:
    """A store on disk: its record, its complete arrays, and the time of its last use (seconds since the epoch)."""

    folder: Path
    record: StoreRecord
    arrays: list[str]
    size_bytes: int
    last_used: float


def plan_parts(lengths: Sequence[int]) -> list[list[int]]:
    """Divide rows into parts of at most `PART_TOKENS` tokens; a longer row is a single part.

    Rows of a part have similar lengths: within windows of `WINDOW_ROWS` rows, they are sorted longest first.
    """
    parts: list[list[int]] = []
    for window in range(0, len(lengths), WINDOW_ROWS):
        rows = range(window, min(window + WINDOW_ROWS, len(lengths)))
        free_tokens = -1
        for row in sorted(rows, key=lambda i: -lengths[i]):
            if lengths[row] > free_tokens:
                parts.append([])
                free_tokens = PART_TOKENS
            parts[-1].append(row)
            free_tokens = max(0, free_tokens - lengths[row])
    return parts


def part_path(array_dir: Path, number: int) -> Path:
    """The file of a part."""
    return array_dir / f"part-{number:06d}.bin"


def part_time_path(array_dir: Path, number: int) -> Path:
    """The file with the device-seconds of a part."""
    return part_path(array_dir, number).with_suffix(".json")


def write_part(array_dir: Path, number: int, vectors: np.ndarray) -> None:
    """Write a part [vectors, width], whole or not at all."""
    write_atomic(part_path(array_dir, number), vectors.tobytes())


def missing_parts(array_dir: Path, num_parts: int) -> list[int]:
    """The numbers of the parts that are missing; none if the array is complete."""
    if is_complete(array_dir):
        return []
    return [n for n in range(num_parts) if not part_path(array_dir, n).is_file()]


def parts_size_bytes(array_dir: Path) -> int:
    """Bytes of the finished parts of an array."""
    return sum(path.stat().st_size for path in array_dir.glob("part-*.bin"))


def write_part_time(array_dir: Path, number: int, device_seconds: float) -> None:
    """Record the device-seconds of a part, so that a resumed build reports the total."""
    write_json_atomic(part_time_path(array_dir, number), {"device_seconds": device_seconds})


def finish_array(array_dir: Path, num_parts: int, size_bytes: int) -> None:
    """Mark an array as complete: write its manifest with the device-seconds of all parts."""
    times = list(array_dir.glob("part-*.json"))
    device_seconds = sum(_device_seconds_of(read_json(path), path) for path in times)
    record = {"parts": num_parts, "bytes": size_bytes, "device_seconds": device_seconds}
    write_json_atomic(array_dir / MANIFEST, {"schema": SCHEMA_VERSION, **record})
    for path in times:
        path.unlink()


def read_device_seconds(array_dir: Path) -> float:
    """The device-seconds of a complete array.

    Raises:
        UserError: The manifest is damaged or of another schema version.
    """
    path = array_dir / MANIFEST
    record = read_json(path)
    check_schema(path, record)
    return _device_seconds_of(record, path)


def _device_seconds_of(record: dict[str, Any], path: Path) -> float:
    with corrupt_file_error(path):
        return float(record["device_seconds"])


def is_complete(array_dir: Path) -> bool:
    """Whether an array is complete: its manifest exists."""
    return (array_dir / MANIFEST).is_file()


def write_record(store: Path, record: StoreRecord) -> None:
    """Write `about.json`."""
    write_json_atomic(store / ABOUT_FILE, {"schema": SCHEMA_VERSION, **record.model_dump()})


def read_record(store: Path) -> StoreRecord:
    """Read `about.json`.

    Raises:
        UserError: The file is missing, damaged or of another schema version.
    """
    path = store / ABOUT_FILE
    record = read_json(path)
    check_schema(path, record)
    with corrupt_file_error(path):
        return StoreRecord.model_validate(record)


def remove_partial_files(store: Path) -> None:
    """Delete temporary files of killed writers. The caller holds the lock of the store."""
    for path in store.rglob(f".*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)


def mark_used(store: Path) -> None:
    """Set the time of the last use of a store, unless it belongs to another user."""
    try:
        os.utime(store / ABOUT_FILE)
    except OSError:
        return


def list_stores(root: Path) -> Iterator[StoreInfo]:
    """Yield the stores under `root`, least recently used first, without symbolic links.

    Raises:
        UserError: A record is damaged or of another schema version.
    """
    stores = []
    for path in root.glob(f"*/{ABOUT_FILE}"):
        folder = path.parent
        if folder.is_symlink():
            continue
        size_bytes = sum(p.stat().st_size for p in folder.rglob("*.bin"))
        arrays = sorted(p.parent.name for p in folder.glob(f"*/{MANIFEST}"))
        stores.append(StoreInfo(folder, read_record(folder), arrays, size_bytes, path.stat().st_mtime))
    yield from sorted(stores, key=lambda store: store.last_used)


def group_lock(root: Path, group: str) -> FileLock:
    """The lock of the process that builds the stores whose `lock_group` is `group`.

    Raises:
        ValueError: `group` is not a file name, or too long for one.
    """
    if Path(group).name != group or len(group.encode(errors="replace")) > MAX_GROUP_BYTES:
        raise ValueError(f"invalid lock group {group[:80]!r}")
    root.mkdir(parents=True, exist_ok=True)
    return FileLock(root / f".{group}.lock")


def remove(info: StoreInfo) -> None:
    """Delete a store, its manifests first.

    Raises:
        UserError: The store is being built.
    """
    with corrupt_file_error(info.folder / ABOUT_FILE):
        lock = group_lock(info.folder.parent, info.record.lock_group)
    try:
        with lock.acquire(timeout=0):
            for manifest in info.folder.glob(f"*/{MANIFEST}"):
                manifest.unlink()
            shutil.rmtree(info.folder)
    except Timeout:
        raise UserError(f"{info.folder}: is being built; wait for the run that builds it, or stop that run") from None
