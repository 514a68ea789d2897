"""The texts behind the scores of served checkpoints, for reading: the page shows them side by side.

SWEEP/texts-SPLIT.jsonl has the sources and the references, FOLDER/outputs-SPLIT-SERVING.jsonl the outputs of a
checkpoint with a serving configuration, in the same order. Both have the first `MAX_ROWS` rows only.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from raydistill.config.serving import ServingConfig
from raydistill.core.files import corrupt_file_error, write_atomic

MAX_ROWS = 1000
REMEDY = "Delete this file; the page then shows no outputs"


class TextRow(BaseModel):
    """A row of the data: its id, its source and its reference."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    source: str
    reference: str


def texts_filename(split: str) -> str:
    """The file of a split's sources and references, in the sweep's folder."""
    return f"texts-{split}.jsonl"


def outputs_filename(split: str, serving: ServingConfig) -> str:
    """The file of a checkpoint's outputs, next to the file of their scores."""
    return f"outputs-{split}-{serving.key}.jsonl"


def write_texts(path: Path, rows: Iterable[tuple[str, str, str]]) -> None:
    """Write the ids, sources and references of a split."""
    names = ("id", "source", "reference")
    _write_lines(path, [dict(zip(names, row, strict=True)) for row, _ in zip(rows, range(MAX_ROWS), strict=False)])


def write_outputs(path: Path, outputs: Sequence[str]) -> None:
    """Write the outputs of a checkpoint, in the order of the split's rows."""
    _write_lines(path, outputs[:MAX_ROWS])


def read_texts(path: Path) -> list[TextRow] | None:
    """The sources and references of a split; None if the file is missing.

    Raises:
        UserError: The file is damaged.
    """
    lines = _read_lines(path)
    with corrupt_file_error(path, REMEDY):
        return None if lines is None else [TextRow.model_validate(line) for line in lines]


def read_outputs(path: Path) -> list[str] | None:
    """The outputs of a checkpoint; None if the file is missing.

    Raises:
        UserError: The file is damaged.
    """
    lines = _read_lines(path)
    with corrupt_file_error(path, REMEDY):
        if lines is not None and not all(isinstance(line, str) for line in lines):
            raise ValueError("expected one text per line")
        return lines


def _write_lines(path: Path, values: Iterable[Any]) -> None:
    write_atomic(path, "".join(f"{json.dumps(value, ensure_ascii=False)}\n" for value in values).encode())


def _read_lines(path: Path) -> list[Any] | None:
    if not path.is_file():
        return None
    with corrupt_file_error(path, REMEDY):
        return [json.loads(line) for line in path.read_bytes().decode("utf-8").split("\n") if line]
