"""The batch plan of a pseudo-label job: which rows form a batch. It is written once, and a resumed job reads it again.

A plan is an artifact with a Parquet file per window of rows and a row group per batch. Rows are sorted by length within
a window only, so that memory is bounded by the window.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from pydantic import Field, model_validator

from raydistill.core import artifact
from raydistill.core.artifact import Manifest
from raydistill.core.files import corrupt_file_error
from raydistill.data.corpus import Row

BATCH_PLAN = "batch plan"  # the kind of artifact
# Rows in memory at a time. Twice as many rows do not make batches noticeably shorter.
WINDOW_ROWS = 10_000
# A batch is the unit of resume, some seconds of a teacher's work. It is measured in characters, since counting tokens
# would need a pass over all data before the job starts; the engine splits a batch by real tokens.
BATCH_CHARS = 32_000
BATCH_ROWS = 512

Count = Annotated[int, Field(ge=0, strict=True)]


class PlanManifest(Manifest):
    """The manifest of a plan, with the counts of a `BatchPlan`."""

    kind: str = BATCH_PLAN
    batch_rows: list[Count]
    batch_chars: list[Count]
    window_batches: list[Count]

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        if not len(self.batch_rows) == len(self.batch_chars) == sum(self.window_batches):
            raise ValueError(f"{sum(self.window_batches)} batches in windows, but {len(self.batch_rows)} row counts")
        return self


@dataclass(frozen=True)
class BatchPlan:
    """A complete plan: rows and source characters of every batch, and the number of batches of every window."""

    folder: Path
    batch_rows: list[int]
    batch_chars: list[int]
    window_batches: list[int]

    def __len__(self) -> int:
        return len(self.batch_rows)

    @property
    def num_windows(self) -> int:
        """The number of windows."""
        return len(self.window_batches)

    @cached_property
    def _window_offsets(self) -> list[int]:
        """The number of the first batch of each window, then the number of batches."""
        return [0, *accumulate(self.window_batches)]

    def manifest(self) -> PlanManifest:
        """The manifest of the plan."""
        return PlanManifest(
            batch_rows=self.batch_rows, batch_chars=self.batch_chars, window_batches=self.window_batches
        )

    def batches_in_window(self, window: int) -> range:
        """The numbers of the batches of a window."""
        return range(self._window_offsets[window], self._window_offsets[window + 1])

    def read_batch(self, number: int) -> dict[str, list[Any]]:
        """Read the columns of a batch, one entry per row.

        Returns:
            `ids`, `sources`, `targets` ("" for rows without a target), `positions` (of the row within its window).

        Raises:
            UserError: The file is missing or damaged.
        """
        import pyarrow.parquet as pq

        window = bisect_right(self._window_offsets, number) - 1
        path = _window_path(self.folder, window)
        with corrupt_file_error(path), pq.ParquetFile(path) as file:
            [batch] = file.read_row_group(number - self._window_offsets[window]).to_pylist()
            num_rows = self.batch_rows[number]
            if [len(batch[name]) for name in ("positions", "ids", "sources", "targets")] != [num_rows] * 4:
                raise ValueError(f"batch {number} does not have {num_rows} rows")
            return batch

    def read_order(self, window: int) -> tuple[Any, np.ndarray]:
        """Read the rows of a window without their texts.

        Returns:
            The ids of the rows, batch by batch, as a pyarrow array of strings; and the indices that put these rows into
            the order of the data.

        Raises:
            UserError: The file is missing or damaged.
        """
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        path = _window_path(self.folder, window)
        with corrupt_file_error(path):
            table = pq.read_table(path, columns=["positions", "ids"])
            ids, positions = (pc.list_flatten(table[name]).combine_chunks() for name in ("ids", "positions"))
            positions = positions.to_numpy(zero_copy_only=False)
            order = np.argsort(positions)
            num_rows = sum(self.batch_rows[number] for number in self.batches_in_window(window))
            if len(ids) != num_rows or not np.array_equal(positions[order], np.arange(num_rows)):
                raise ValueError(f"window {window} does not have each of {num_rows} rows once")
            return ids, order


def make_plan(
    rows: Iterator[Row],
    folder: Path,
    *,
    window_rows: int = WINDOW_ROWS,
    batch_chars: int = BATCH_CHARS,
    batch_rows: int = BATCH_ROWS,
    max_source_chars: int | None = None,
) -> BatchPlan:
    """Write the plan of all rows to `folder`. The caller holds the lock of the label set.

    Args:
        window_rows: Rows per window.
        batch_chars: Maximum source characters per batch of at least two rows.
        batch_rows: Maximum rows per batch.
        max_source_chars: Characters of a source that the teacher reads, approximately. More characters are not
            counted.
    """
    plan = BatchPlan(folder, [], [], [])
    with artifact.build(folder, plan.manifest) as temporary:
        while window := list(islice(rows, window_rows)):
            sizes = [min(len(row.source), max_source_chars or len(row.source)) for row in window]
            batches = list(_split_by_chars(sizes, batch_chars, batch_rows))
            _write_window(_window_path(temporary, plan.num_windows), window, batches)
            plan.window_batches.append(len(batches))
            plan.batch_rows.extend(map(len, batches))
            plan.batch_chars.extend(sum(sizes[i] for i in positions) for positions in batches)
            del window  # otherwise it would stay in memory while the next window is read
    return plan


def _write_window(path: Path, window: list[Row], batches: list[list[int]]) -> None:
    """Write the batches of a window, a row group each, so that an actor reads only its batch."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = [
        {
            "positions": positions,
            "ids": [window[i].id for i in positions],
            "sources": [window[i].source for i in positions],
            "targets": [window[i].target for i in positions],
        }
        for positions in batches
    ]
    pq.write_table(pa.Table.from_pylist(lines), path, row_group_size=1)


def open_plan(folder: Path) -> BatchPlan | None:
    """Open a complete plan. Returns None if the folder has none.

    Raises:
        UserError: The plan is damaged or of another schema version.
    """
    if not artifact.is_complete(folder):
        return None
    manifest = artifact.open_artifact(folder, PlanManifest, BATCH_PLAN)
    return BatchPlan(folder, manifest.batch_rows, manifest.batch_chars, manifest.window_batches)


def _split_by_chars(sizes: list[int], max_chars: int, max_rows: int) -> Iterator[list[int]]:
    """Yield batches of rows of similar length, longest first.

    A batch has at least one row, and at most `max_chars` characters and `max_rows` rows.
    """
    batch: list[int] = []
    total = 0
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if batch and (total + sizes[i] > max_chars or len(batch) == max_rows):
            yield batch
            batch, total = [], 0
        batch.append(i)
        total += sizes[i]
    if batch:
        yield batch


def _window_path(folder: Path, number: int) -> Path:
    return folder / f"window-{number:05d}.parquet"
