"""A split of any size, row by row: checked once, then read again as often as needed, never held in memory."""

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from raydistill.config.run import Dataset
from raydistill.core.errors import UserError
from raydistill.data.corpus import BadRow, Fingerprint, Place, Row, check_rows, open_rows, repeated, row_limit

_KEPT = 1000  # bad rows that are kept to be told of; more are only counted


@dataclass(frozen=True)
class Scan:
    """What one reading of a split tells; `fingerprint` and `labelled` are those of `read_corpus`."""

    rows: int
    fingerprint: str
    labelled: bool
    skipped: int


def scan(dataset: Dataset, split: str) -> Scan:
    """Read and check every row, targets not needed; UserError as `read_corpus` raises it, in the same words.

    Ids are kept in a temporary file of SQLite's, so that memory does not grow with the data.
    """
    columns, rows = open_rows(dataset, split, need_targets=False)
    with_targets, without = Fingerprint(), Fingerprint()
    labelled, count, bad, repeats = columns.target is not None, 0, 0, 0
    skipped: list[BadRow] = []
    duplicates: list[BadRow] = []
    seen = _Ids()
    limit = row_limit(dataset, split)
    for row in rows:
        if count >= limit:
            break
        if isinstance(row, BadRow):
            bad += 1
            skipped += [row] if bad <= _KEPT else []
        elif (first := seen.add(row)) is not None:
            repeats += 1
            duplicates += [repeated(row, first)] if repeats <= _KEPT else []
        else:
            count += 1
            labelled = labelled and bool(row.target)
            with_targets.add(row.id, row.source, row.target)
            without.add(row.id, row.source, "")
    check_rows(dataset, split, count, skipped, duplicates, (bad, repeats))
    return Scan(count, (with_targets if labelled else without).value, labelled, bad)


def usable_rows(dataset: Dataset, split: str, found: Scan) -> Iterator[Row]:
    """The rows that `scan` counted; UserError where the data is not what it was then."""
    _, rows = open_rows(dataset, split, need_targets=False)
    good = (row for row in rows if isinstance(row, Row))
    fingerprint, count = Fingerprint(), 0
    for row in islice(good, found.rows):
        usable = row if found.labelled else row._replace(target="")
        fingerprint.add(usable.id, usable.source, usable.target)
        count += 1
        yield usable
    if (count, fingerprint.value) != (found.rows, found.fingerprint):
        raise UserError(f"{dataset.name}: the {split} split changed while it was read; run the command again")


class _Ids:
    """The ids that were seen, each with its first place, on disk."""

    def __init__(self) -> None:
        self._store = sqlite3.connect("")
        self._store.execute("pragma synchronous = off")
        self._store.execute("create table ids (id text primary key, file text, row integer) without rowid")

    def add(self, row: Row) -> Place | None:
        """None for a new id, else where it stood first."""
        new = self._store.execute("insert or ignore into ids values (?, ?, ?)", (row.id, *row.place)).rowcount
        if new:
            return None
        file, number = self._store.execute("select file, row from ids where id = ?", (row.id,)).fetchone()
        return file, number
