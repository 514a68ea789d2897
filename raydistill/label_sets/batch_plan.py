"""The plan of a pseudo-label job: which rows go together, decided once and kept, so that a resumed job goes on with it.

A folder of Parquet files, one per window of rows, and in each a row group per batch; `plan.json` is written last. Rows
are sorted by length within a window only, so memory is bounded by the window, whatever the size of the data.
"""

import shutil
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from raydistill.core.files import damage_told, read_json, write_json_atomic
from raydistill.data.corpus import Row

# Rows in memory at once; twice as many bring no shorter batches worth having.
WINDOW_ROWS = 10_000
# A batch is the unit of resume: some seconds of a teacher's work. Characters, since tokens would cost the job's start
# a pass over all the data; the engine forms its own batches within one of these by real tokens.
BATCH_CHARS = 32_000
BATCH_ROWS = 512


@dataclass(frozen=True)
class Plan:
    """A finished plan: rows and source characters of every batch, and how many batches each window has."""

    folder: Path
    rows: list[int]
    chars: list[int]
    windows: list[int]

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def _firsts(self) -> list[int]:
        """The number of each window's first batch, and behind them the number of batches."""
        return [0, *accumulate(self.windows)]

    def batches_of(self, window: int) -> range:
        """The numbers of a window's batches."""
        return range(self._firsts[window], self._firsts[window + 1])

    def read_batch(self, number: int) -> dict[str, list[Any]]:
        """A batch's `ids`, `sources`, `targets` ("" where unlabelled) and `places` (each row's within its window)."""
        import pyarrow.parquet as pq

        window = bisect_right(self._firsts, number) - 1
        path = _window(self.folder, window)
        with damage_told(path), pq.ParquetFile(path) as file:
            [row] = file.read_row_group(number - self._firsts[window]).to_pylist()
            if [len(row[name]) for name in ("places", "ids", "sources", "targets")] != [self.rows[number]] * 4:
                raise ValueError(f"batch {number} does not hold {self.rows[number]} rows")
            return row

    def read_targets(self, window: int) -> list[tuple[str, str]]:
        """(id, target) of a window's rows, in the order of the data."""
        import pyarrow.parquet as pq

        found: list[tuple[int, tuple[str, str]]] = []
        path = _window(self.folder, window)
        with damage_told(path), pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                [batch] = file.read_row_group(group, columns=["places", "ids", "targets"]).to_pylist()
                found += zip(batch["places"], zip(batch["ids"], batch["targets"], strict=True), strict=True)
        return [row for _, row in sorted(found)]


def make_plan(
    rows: Iterator[Row],
    folder: Path,
    *,
    window_rows: int = WINDOW_ROWS,
    batch_chars: int = BATCH_CHARS,
    batch_rows: int = BATCH_ROWS,
    max_chars: int | None = None,
) -> Plan:
    """Plan all rows into `folder`; what an earlier attempt left there unfinished is removed.

    `max_chars`: about as much of a source as the teacher reads; what is beyond it costs nothing and is not counted.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    plan = Plan(folder, [], [], [])
    while window := list(islice(rows, window_rows)):
        sizes = [min(len(row.source), max_chars or len(row.source)) for row in window]
        batches = list(_batches(sizes, batch_chars, batch_rows))
        listed = [
            {
                "places": places,
                "ids": [window[i].id for i in places],
                "sources": [window[i].source for i in places],
                "targets": [window[i].target for i in places],
            }
            for places in batches
        ]
        # A row group per batch, so that an actor reads its batch and no more.
        pq.write_table(pa.Table.from_pylist(listed), _window(folder, len(plan.windows)), row_group_size=1)
        plan.windows.append(len(batches))
        plan.rows.extend(map(len, batches))
        plan.chars.extend(sum(sizes[i] for i in places) for places in batches)
        del listed, window  # or they would stay while the next window is read
    write_json_atomic(folder / "plan.json", {k: v for k, v in asdict(plan).items() if k != "folder"})
    return plan


def open_plan(folder: Path) -> Plan | None:
    """A finished plan, or None where there is none; UserError where it is damaged."""
    path = folder / "plan.json"
    if not path.is_file():
        return None
    found = read_json(path)
    with damage_told(path):
        plan = Plan(folder, **found)
        numbers = [*plan.rows, *plan.chars, *plan.windows]
        if not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise TypeError("rows, chars and windows must be counts")
        if not len(plan.rows) == len(plan.chars) == sum(plan.windows):
            raise ValueError(f"{sum(plan.windows)} batches in windows, {len(plan.rows)} with rows")
    return plan


def _batches(sizes: list[int], chars: int, rows: int) -> Iterator[list[int]]:
    """Neighbours in length, the longest first, at most `chars` characters and `rows` rows each (at least one row)."""
    batch: list[int] = []
    total = 0
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if batch and (total + sizes[i] > chars or len(batch) == rows):
            yield batch
            batch, total = [], 0
        batch.append(i)
        total += sizes[i]
    if batch:
        yield batch


def _window(folder: Path, number: int) -> Path:
    return folder / f"window-{number:05d}.parquet"
