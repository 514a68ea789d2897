"""Files appear whole or not at all; what stands in them is read without trust, and paths stay in their folder."""

import json
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raydistill.core.errors import UserError

# What taking apart a file raises that is not as it was written.
UNFIT = (
    *(LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError),
    *(RecursionError, NotImplementedError, MemoryError, OSError),
)
CARD = "raydistill.json"  # beside a checkpoint's weights: where it comes from


def write_atomic(path: Path, content: bytes) -> None:
    """Write through a temporary file in the same folder, synced and then renamed into place."""
    with appearing(path) as place:
        place.write_bytes(content)


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file under, which is synced and takes `path`'s place at the end of the block.

    Nothing is left of it when the block fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process's number: on a folder that many machines share, two processes may have the same.
    making = path.with_name(f".{path.name}.{secrets.token_hex(4)}.making")
    try:
        yield making
        sync(making)
        os.replace(making, path)
    finally:
        making.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """To the disk: what a synced record names must not be less sure than the record."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json_atomic(path: Path, data: Any) -> None:
    """`write_atomic` of indented JSON; ValueError for NaN and infinity, which JSON does not have."""
    write_atomic(path, json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False, default=_plain).encode())


def _plain(value: Any) -> Any:
    """numpy's numbers and arrays, and paths, as JSON knows them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping, or a UserError that names the file.

    NaN, infinity and lone surrogates are refused: `write_json_atomic` writes none, and they would fail later.
    """
    with damage_told(path):
        text = path.read_text(encoding="utf-8")
        data = json.loads(text, parse_constant=_finite, parse_float=_finite)
        if not isinstance(data, dict):
            raise ValueError(f"a mapping was expected, found {type(data).__name__}")
        if "\\u" in text:
            json.dumps(data, ensure_ascii=False).encode()
    return data


@contextmanager
def damage_told(path: Path, remedy: str | None = None) -> Iterator[None]:
    """A block that takes apart what a file of ours holds: whatever is not as it was written becomes a UserError."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UNFIT as error:
        reason = f"{type(error).__name__} {error}" if isinstance(error, LookupError) else str(error)
        remedy = remedy or f"Delete {path.parent} to have it made again"
        raise UserError(f"{path}: damaged: {reason[:300]}. {remedy}") from None


def inside(folder: Path, name: str) -> Path:
    """`folder / name`; ValueError where that leads out of the folder, by `..`, as an absolute path or by a link."""
    path = folder / name
    if "\0" in name or not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name!r} leads out of {folder}")
    return path


def check_links(folder: Path, beside: Path | None = None) -> None:
    """UserError where a link in a folder leads out of it: what is handed on from there must be its own.

    `beside`: another folder that links may lead to.
    """
    allowed = [place.resolve() for place in (folder, beside) if place]
    for path in folder.rglob("*"):
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in allowed):
            raise UserError(f"{path}: a link that leads out of {folder}; put the file itself there")


def is_there(path: Path) -> bool:
    """Whether something is at a path; no for a name that no file can have, such as one of a thousand letters."""
    try:
        return path.exists()
    except OSError:
        return False


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number
