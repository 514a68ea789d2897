"""Atomic writes, validated reads and checks of paths."""

import json
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from raydistill.core.errors import UserError
from raydistill.core.locks import check_locks

# Exceptions that parsers of JSON, Parquet, NumPy and tensor files raise for corrupt input.
PARSE_ERRORS = (
    *(LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError),
    *(RecursionError, NotImplementedError, MemoryError, OSError),
)
# Version of the records in sweeps, runs, label sets and caches. Version 1 was written before the first release.
SCHEMA_VERSION = 2
TEMPORARY_SUFFIX = ".tmp"  # of files and folders that are being written; they are not synced to a bucket
OLD_SUFFIX = ".old"  # of folders that are being replaced or deleted; they are not synced either


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file through a temporary file in the same folder, which is synced and then renamed."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; at the end of the block the file is synced and renamed to `path`.

    The folder is synced too, so that the new name outlives a power failure. If the block raises, the temporary file is
    removed and `path` is unchanged.

    Raises:
        TransientError: Another process took over before or during the block, so this process has lost a lock.
        OSError: The disk is full, for example.
    """
    check_locks()
    make_folder(path.parent)
    # A random suffix and not the process ID: on a shared folder, processes of two machines may have equal IDs.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        yield temporary
        fsync(temporary)
        check_locks()
        os.replace(temporary, path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporary_files(folder: Path, *, recursive: bool = True) -> None:
    """Delete the temporary files that killed processes left in a folder, with `recursive` also in its subfolders.

    The caller holds the locks of all who write these files.
    """
    pattern = f".*{TEMPORARY_SUFFIX}"
    for path in folder.rglob(pattern) if recursive else folder.glob(pattern):
        if path.is_file():
            path.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents if they are missing, and flush every new name to disk."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync_folder(folder.parent)


def fsync(path: Path) -> None:
    """Flush a file to disk, so that no record on disk can refer to content that is not."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Flush a folder's list of names to disk: without it, a power failure may undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def mark_used(path: Path) -> None:
    """Set the time of the last use of a file, unless the file belongs to another user."""
    with suppress(OSError):
        os.utime(path)


def write_json_atomic(path: Path, data: Any, indent: int | None = 1) -> None:
    """Write JSON with `write_atomic`; ValueError for NaN and infinity, which JSON does not have.

    Args:
        path: The file.
        data: The content.
        indent: Spaces per level; None writes a single line, which json encodes about ten times faster.
    """
    text = json.dumps(data, indent=indent, allow_nan=False, ensure_ascii=False, default=_json_default)
    write_atomic(path, text.encode())


def _json_default(value: Any) -> Any:
    """Convert NumPy scalars, NumPy arrays and paths for `json.dumps`."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def read_json(path: Path, remedy: str | None = None) -> dict[str, Any]:
    """Read a JSON object; UserError that names the file and the remedy if its content is anything else.

    NaN, infinity and lone surrogates are rejected: `write_json_atomic` writes none, and they would fail later.
    """
    with corrupt_file_error(path, remedy):
        text = path.read_text(encoding="utf-8")
        data = json.loads(text, parse_constant=_parse_finite, parse_float=_parse_finite)
        if not isinstance(data, dict):
            raise ValueError(f"expected a JSON object, got {type(data).__name__}")
        if "\\u" in text:
            json.dumps(data, ensure_ascii=False).encode()  # UnicodeEncodeError for a lone surrogate
    return data


@contextmanager
def corrupt_file_error(path: Path, remedy: str | None = None) -> Iterator[None]:
    """Turn every error of a block that parses a file into a UserError.

    Args:
        path: The file, named in the message.
        remedy: What the user can do; default: delete the folder of the file and run the command again.
    """
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except PARSE_ERRORS as error:
        reason = f"{type(error).__name__} {error}" if isinstance(error, LookupError) else str(error)
        remedy = remedy or f"Delete {path.parent} and run the command again"
        raise UserError(f"{path}: damaged: {reason[:300]}. {remedy}") from None


def check_schema(path: Path, record: dict[str, Any], remedy: str | None = None) -> None:
    """Check that a record was written by this version of raydistill.

    `path` names the file in the message. `remedy` replaces the default advice to delete the folder of the file.

    Raises:
        UserError: The record has another schema version.
    """
    if record.get("schema") != SCHEMA_VERSION:
        remedy = remedy or f"Move {path.parent} away or delete it, and run the command again to create it"
        raise UserError(
            f"{path}: schema version {record.get('schema', 1)}, but this version of raydistill reads {SCHEMA_VERSION}. "
            f"{remedy}"
        )


def safe_join(folder: Path, name: str) -> Path:
    """`folder / name`; ValueError if the result is outside `folder`: by `..`, an absolute path or a symbolic link."""
    path = folder / name
    if "\0" in name or not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name!r} is outside {folder}")
    return path


def check_symlinks(folder: Path, also_allowed: Path | None = None) -> None:
    """UserError if a symbolic link in `folder` points outside it: files that are exported must be in the folder.

    Links may also point into `also_allowed`.
    """
    allowed = [root.resolve() for root in (folder, also_allowed) if root]
    for path in folder.rglob("*"):
        if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in allowed):
            raise UserError(f"{path}: symbolic link to a file outside {folder}; replace it by the file itself")


def path_exists(path: Path) -> bool:
    """Whether a path exists; False for a name that no file can have, for example a name of a thousand characters."""
    try:
        return path.exists()
    except OSError:
        return False


def _parse_finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number
