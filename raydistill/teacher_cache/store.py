"""Ragged arrays on disk in parts, each written whole or not at all: the storage of the teacher cache.

A store is a folder with `about.json` and a folder per array: `part-000000.bin` and so on. Several processes write the
parts of an array, and the manifest seals the array as an artifact. A part holds the vectors of its rows one after
another. `plan_parts` derives the rows of each part from the lengths of all rows, so the key of a store must cover the
lengths.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ConfigDict, field_validator

from raydistill.core import artifact
from raydistill.core.artifact import MANIFEST, Manifest
from raydistill.core.files import remove_temporary_files, write_atomic
from raydistill.core.records import Record

ABOUT_FILE = "about.json"
KIND = "teacher cache"
# Part of every key: another layout gives another store.
FORMAT_VERSION = 3
PART_TOKENS = 2**15
WINDOW_ROWS = 20_000
MAX_GROUP_BYTES = 240  # a file name has at most 255, with the dot and the suffix of the lock
ComputeDtype = Literal["bf16", "fp32"]
StorageDtype = Literal["int8", "bf16", "fp32"]


class StoreRecord(Record):
    """The content of `about.json`: teacher and data of a store, its data types, and the lock of its builder.

    `width` is the size of a vector. `lock_group` names the store whose lock is held while this store is built.
    """

    model_config = ConfigDict(strict=True)

    teacher: str
    data: str
    teacher_key: str
    storage_dtype: StorageDtype
    compute_dtype: ComputeDtype
    width: int
    lock_group: str

    @field_validator("lock_group")
    @classmethod
    def _check_lock_group(cls, group: str) -> str:
        if Path(group).name != group or len(group.encode(errors="replace")) > MAX_GROUP_BYTES:
            raise ValueError(f"invalid lock group {group[:80]!r}")
        return group


class CacheManifest(Manifest):
    """The manifest of an array: the number and the bytes of its parts, and the device-seconds of building them."""

    parts: int
    bytes: int
    device_seconds: float


class PartTime(Record):
    """The device-seconds of building a part, so that a resumed build reports the total."""

    device_seconds: float


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
    """Write a part [vectors, stored width], whole or not at all."""
    write_atomic(part_path(array_dir, number), vectors.tobytes())


def missing_parts(array_dir: Path, num_parts: int) -> list[int]:
    """The numbers of the parts that are missing; none if the array is complete."""
    if artifact.is_complete(array_dir):
        return []
    return [n for n in range(num_parts) if not part_path(array_dir, n).is_file()]


def parts_size_bytes(array_dir: Path) -> int:
    """Bytes of the finished parts of an array."""
    return sum(path.stat().st_size for path in array_dir.glob("part-*.bin"))


def write_part_time(array_dir: Path, number: int, device_seconds: float) -> None:
    """Record the device-seconds of a part."""
    PartTime(device_seconds=device_seconds).write(part_time_path(array_dir, number))


def finish_array(array_dir: Path, num_parts: int, size_bytes: int) -> None:
    """Mark an array as complete: write its manifest with the device-seconds of all parts."""
    device_seconds = sum(PartTime.read(path).device_seconds for path in array_dir.glob("part-*.json"))
    key = f"{array_dir.parent.name}/{array_dir.name}"
    artifact.seal(
        array_dir,
        CacheManifest(kind=KIND, key=key, parts=num_parts, bytes=size_bytes, device_seconds=device_seconds),
    )


def open_array(array_dir: Path) -> CacheManifest:
    """Read the manifest of an array and check the size of every part.

    Raises:
        UserError: The array is incomplete, damaged or of another schema version.
    """
    return artifact.open_artifact(array_dir, CacheManifest, KIND)


def read_device_seconds(array_dir: Path) -> float:
    """The device-seconds of a complete array, whose parts may be on other machines.

    Raises:
        UserError: The manifest is damaged or of another schema version.
    """
    return CacheManifest.read(array_dir / MANIFEST).device_seconds


def remove_partial_files(store: Path) -> None:
    """Delete what killed writers and an interrupted removal left. The caller holds the lock of the store."""
    artifact.remove_leftovers(store)
    remove_temporary_files(store)


def list_stores(root: Path) -> Iterator[StoreInfo]:
    """Yield the stores under `root`, least recently used first, without symbolic links and hidden folders.

    Raises:
        UserError: A record is damaged or of another schema version.
    """
    stores = []
    for path in root.glob(f"*/{ABOUT_FILE}"):
        folder = path.parent
        if folder.is_symlink() or folder.name.startswith("."):
            continue
        size_bytes = sum(p.stat().st_size for p in folder.rglob("*.bin"))
        arrays = sorted(p.parent.name for p in folder.glob(f"*/{MANIFEST}"))
        stores.append(StoreInfo(folder, StoreRecord.read(path), arrays, size_bytes, path.stat().st_mtime))
    yield from sorted(stores, key=lambda store: store.last_used)


def remove(info: StoreInfo) -> None:
    """Delete a store.

    Raises:
        LockHeld: The store is being built.
    """
    with artifact.lock(info.folder.with_name(info.record.lock_group), display_path=info.folder):
        artifact.remove(info.folder)
