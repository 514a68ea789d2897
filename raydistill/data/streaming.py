"""Splits that need not fit into memory: rows are checked in a first pass and read again in later passes."""

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from raydistill.config.run import Columns, Dataset
from raydistill.core.errors import UserError
from raydistill.data.corpus import (
    BadRow,
    DuplicateRow,
    Fingerprint,
    Row,
    RowLocation,
    check_rows,
    classify_rows,
    open_rows,
    row_limit,
)

_MAX_REPORTED_ROWS = 1000  # bad rows to keep for the error message; further ones are only counted


@dataclass(frozen=True)
class SplitScan:
    """Result of the first pass over a split.

    Attributes:
        rows: Number of usable rows.
        fingerprint: As `Corpus.fingerprint`.
        labelled: Whether all usable rows have targets.
        skipped: Number of rows that cannot be used.
        columns: The columns that were read.
    """

    rows: int
    fingerprint: str
    labelled: bool
    skipped: int
    columns: Columns


def scan_split(dataset: Dataset, split: str) -> SplitScan:
    """Read and check every row of a split; targets are not needed.

    Ids are stored in a temporary SQLite file, so that memory does not grow with the data.

    Raises:
        UserError: As `read_corpus` without `need_targets`.
    """
    columns, rows = open_rows(dataset, split, need_targets=False)
    with_targets, without_targets = Fingerprint(), Fingerprint()
    labelled, num_usable = columns.target is not None, 0
    skipped: list[BadRow] = []
    duplicates: list[BadRow] = []
    num_skipped = num_duplicates = 0
    for row in classify_rows(rows, row_limit(dataset, split), _DiskIds().first_location):
        if isinstance(row, DuplicateRow):
            num_duplicates += 1
            duplicates += [row] if num_duplicates <= _MAX_REPORTED_ROWS else []
        elif isinstance(row, BadRow):
            num_skipped += 1
            skipped += [row] if num_skipped <= _MAX_REPORTED_ROWS else []
        else:
            num_usable += 1
            labelled = labelled and bool(row.target)
            with_targets.add(row.id, row.source, row.target)
            without_targets.add(row.id, row.source, "")
    check_rows(dataset, split, num_usable, skipped, duplicates, (num_skipped, num_duplicates))
    fingerprint = with_targets if labelled else without_targets
    return SplitScan(num_usable, fingerprint.value, labelled, num_skipped, columns)


def usable_rows(dataset: Dataset, split: str, scan: SplitScan) -> Iterator[Row]:
    """Yield the usable rows of a split in a later pass; UserError if the data has changed since the scan."""
    _, rows = open_rows(dataset, split, need_targets=False)
    good = (row for row in rows if isinstance(row, Row))
    fingerprint, count = Fingerprint(), 0
    for row in islice(good, scan.rows):
        usable = row if scan.labelled else row._replace(target="")
        fingerprint.add(usable.id, usable.source, usable.target)
        count += 1
        yield usable
    if (count, fingerprint.value) != (scan.rows, scan.fingerprint):
        raise UserError(f"{dataset.name}: the {split} split changed while it was read; run the command again")


class _DiskIds:
    """The ids of rows with the location of their first occurrence, on disk."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("")  # an empty name makes a temporary file
        self._database.execute("pragma synchronous = off")
        self._database.execute("create table ids (id text primary key, file text, row integer) without rowid")

    def first_location(self, row: Row) -> RowLocation:
        """Add the id of a row; the location of the first row with this id, which may be `row` itself."""
        insert = "insert or ignore into ids values (?, ?, ?)"
        if self._database.execute(insert, (row.id, *row.location)).rowcount:
            return row.location
        file, number = self._database.execute("select file, row from ids where id = ?", (row.id,)).fetchone()
        return file, number
