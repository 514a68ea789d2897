"""Files appear whole or not at all."""

import json
import os
import secrets
from pathlib import Path
from typing import Any

CARD = "raydistill.json"  # beside a checkpoint's weights: where it comes from


def write_atomic(path: Path, content: bytes) -> None:
    """Write through a temporary file in the same folder, synced and then renamed into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process's number: on a folder that many machines share, two processes may have the same.
    making = path.with_name(f".{path.name}.{secrets.token_hex(4)}.making")
    try:
        with making.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(making, path)
    finally:
        making.unlink(missing_ok=True)


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
