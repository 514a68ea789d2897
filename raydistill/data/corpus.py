"""Corpora of source and target texts: read from files, folders, the hub or the demo, with every row checked."""

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from raydistill.config.presets import DATASETS, joins_lines
from raydistill.config.run import Columns, Dataset
from raydistill.core.console import print_progress
from raydistill.core.errors import UserError
from raydistill.core.suggestions import closest_name
from raydistill.data.columns import is_blank, parse_record, resolve_columns
from raydistill.data.readers import EXTENSIONS, RecordOrError, find_split_files, read_records

_LOOK_AHEAD = 100  # records from which the columns are detected

RowLocation = tuple[str, int]  # file (or hub name), and row number from 1
DUPLICATES_REMEDY = (
    "remove the repeated rows, name a column of unique ids (columns.id), or number the rows (columns.id: '')"
)


class Row(NamedTuple):
    """A usable row. `target` is "" if it is missing and not needed."""

    location: RowLocation
    id: str
    source: str
    target: str


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used. `row` is counted from 1; it is the line number if the format has lines."""

    file: str
    row: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.row}: {self.reason}"


class DuplicateRow(BadRow):
    """A row whose id occurs in an earlier row."""


class Fingerprint:
    """Incremental computation of `Corpus.fingerprint`."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, *texts: str) -> None:
        """Add the id, source and target of a row."""
        for text in texts:
            data = text.encode("utf-8")
            self._digest.update(len(data).to_bytes(8, "big") + data)

    @property
    def value(self) -> str:
        """16 hex digits."""
        return self._digest.hexdigest()[:16]


@dataclass(frozen=True)
class Corpus:
    """The usable rows of one split, in the order of the file.

    Attributes:
        name: Name of the data set.
        split: "train", "validation" or "test".
        ids, sources, targets: The texts of row i.
        columns: The columns that were read.
        skipped: The rows that cannot be used.
        labelled: Whether all rows have targets; if not, all `targets` are "".
    """

    name: str
    split: str
    ids: list[str]
    sources: list[str]
    targets: list[str]
    columns: Columns
    skipped: list[BadRow] = field(default_factory=list)
    labelled: bool = True

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of a SHA-256 over ids, sources and targets in order; independent of the file format."""
        digest = Fingerprint()
        for row in zip(self.ids, self.sources, self.targets, strict=True):
            digest.add(*row)
        return digest.value

    def head(self, n: int) -> "Corpus":
        """The first `n` rows."""
        return replace(self, ids=self.ids[:n], sources=self.sources[:n], targets=self.targets[:n])


def read_corpus(dataset: Dataset, split: str, *, need_targets: bool = True) -> Corpus:
    """Read and check one split.

    Args:
        dataset: Its name is one of `config.presets.DATASETS`, a file, a folder of train, validation and test files,
            or a hub name.
        split: "train", "validation" or "test". A single file is returned for any split; see `split_names`.
        need_targets: If False, a corpus with missing or unusable targets is read as unlabelled.

    Raises:
        UserError: The data cannot be read, an id is repeated, or a row cannot be used (unless
            `dataset.skip_bad_rows`).
    """
    corpus, duplicates = inspect_corpus(dataset, split, need_targets=need_targets)
    check_rows(dataset, split, len(corpus), corpus.skipped, duplicates)
    return corpus


def check_rows(
    dataset: Dataset,
    split: str,
    num_usable: int,
    skipped: Sequence[BadRow],
    duplicates: Sequence[BadRow],
    total_counts: tuple[int, int] | None = None,
) -> None:
    """Raise UserError if a split has bad rows that must not be skipped, repeated ids, or no usable row.

    Args:
        dataset: The data set, for its name and `skip_bad_rows`.
        split: The split.
        num_usable: Number of usable rows.
        skipped: Rows that cannot be used.
        duplicates: Rows with repeated ids.
        total_counts: Numbers of bad and of duplicate rows, if the two lists hold only the first ones.
    """
    num_skipped, num_duplicates = total_counts or (len(skipped), len(duplicates))
    if skipped and not dataset.skip_bad_rows:
        remedy = "correct them, or skip them with --skip-bad-rows (in YAML dataset: {skip_bad_rows: true})"
        raise UserError(_format_bad_rows("rows that cannot be used", skipped, num_skipped, remedy))
    if duplicates:
        raise UserError(_format_bad_rows("rows whose id is not unique", duplicates, num_duplicates, DUPLICATES_REMEDY))
    if not num_usable:
        raise UserError(f"{dataset.name}: no usable row in the {split} split")


def inspect_corpus(dataset: Dataset, split: str, *, need_targets: bool = True) -> tuple[Corpus, list[BadRow]]:
    """Read a split without an error for bad rows.

    Returns:
        The corpus, with unusable rows in `skipped`, and the rows with repeated ids.

    Raises:
        UserError: The file cannot be read at all.
    """
    columns, rows = open_rows(dataset, split, need_targets=need_targets)
    ids: dict[str, RowLocation] = {}
    sources: list[str] = []
    targets: list[str] = []
    skipped: list[BadRow] = []
    duplicates: list[BadRow] = []
    for row in classify_rows(rows, row_limit(dataset, split), lambda row: ids.setdefault(row.id, row.location)):
        if isinstance(row, DuplicateRow):
            duplicates.append(row)
        elif isinstance(row, BadRow):
            skipped.append(row)
        else:
            sources.append(row.source)
            targets.append(row.target)
    labelled = columns.target is not None and all(targets)
    if not labelled:
        targets = [""] * len(ids)
    corpus = Corpus(dataset.name, split, list(ids), sources, targets, columns, skipped, labelled)
    return corpus, duplicates


def classify_rows(
    rows: Iterator[Row | BadRow], limit: float, first_location: Callable[[Row], RowLocation]
) -> Iterator[Row | BadRow]:
    """Yield rows up to `limit` usable ones; a usable row with a repeated id becomes a `DuplicateRow`.

    Args:
        rows: Usable and bad rows.
        limit: Maximum number of usable rows.
        first_location: Records a row, and returns the location of the first row with its id.
    """
    count = 0
    for row in rows:
        if count >= limit:
            return
        if isinstance(row, Row):
            first = first_location(row)
            if first != row.location:
                yield DuplicateRow(*row.location, f"duplicate id {row.id!r}, first seen at {first[0]}:{first[1]}")
                continue
            count += 1
        yield row


def open_rows(dataset: Dataset, split: str, *, need_targets: bool = True) -> tuple[Columns, Iterator[Row | BadRow]]:
    """The columns of a split, and an iterator over its rows, usable and bad, in the order of the file."""
    records = _read_split_records(dataset, split)
    first_records = _look_ahead(records)
    objects = [record for _, record in first_records if isinstance(record, dict)]
    if not objects:
        raise UserError(_unreadable_split_message(dataset, split, first_records))
    columns = resolve_columns(_requested_columns(dataset), objects, dataset.name, need_targets)
    preset = DATASETS.get(dataset.name)
    skips_blank_rows = preset is not None and preset.skip_blank_rows
    normalizes_lines = joins_lines(dataset.name)

    def parsed_rows() -> Iterator[Row | BadRow]:
        num_blank = 0
        try:
            for index, (location, record) in enumerate(chain(first_records, records)):
                if skips_blank_rows and is_blank(record, columns):
                    num_blank += 1
                    continue
                texts = parse_record(record, columns, index, need_targets)
                if isinstance(texts, str):
                    yield BadRow(*location, texts)
                else:
                    row = Row(location, *texts)
                    yield _normalize_lines(row) if normalizes_lines else row
        finally:  # also if a reader needs no more rows
            if num_blank:
                _report_blank_rows(dataset.name, split, num_blank)

    return columns, parsed_rows()


def _normalize_lines(row: Row) -> Row:
    """The row with a target whose lines are separated by single line breaks, without space around them."""
    lines = (line.strip() for line in row.target.splitlines())
    return row._replace(target="\n".join(line for line in lines if line))


@lru_cache(maxsize=64)
def _report_blank_rows(name: str, split: str, count: int) -> None:
    """Print once per process that blank rows of a named data set are left out."""
    rows = "1 row" if count == 1 else f"{count:,} rows"
    print_progress(f"{name}: {rows} of the {split} split without a source or a target left out")


def row_limit(dataset: Dataset, split: str) -> float:
    """Maximum number of usable rows of a split: `train_rows` and its equivalents, else infinity."""
    return getattr(dataset, f"{split}_rows", None) or math.inf


def split_names(dataset: Dataset) -> list[str]:
    """The existing splits among train, validation, test and `dataset.selection_split`.

    A single file is one split: the one in its name (`test.jsonl`), else train.
    """
    source = _resolve_dataset(dataset)
    if source == "demo":
        return ["train", "validation", "test"]
    if isinstance(source, Path):
        return list(find_split_files(str(source), dataset.selection_split))
    from raydistill.data.hub import hub_splits

    available = hub_splits(*_hub_arguments(dataset))
    return [split for split in ("train", "validation", "test", dataset.selection_split) if split in available]


def check_split(dataset: Dataset, split: str) -> None:
    """UserError if a data set does not have the split; a single file is accepted for any split."""
    names = split_names(dataset)
    if split not in names and not Path(dataset.name).is_file():
        raise UserError(f"{dataset.name}: no split {split!r}; available: {', '.join(names)}")


def corpus_statistics(corpus: Corpus) -> dict[str, Any]:
    """Number of rows, words per row (split at white space) and bytes of UTF-8 text.

    Percentiles use the nearest-rank method.
    """
    result: dict[str, Any] = {"rows": len(corpus)}
    sides = {"source": corpus.sources} | ({"target": corpus.targets} if corpus.labelled else {})
    for side, texts in sides.items():
        words = sorted(len(text.split()) for text in texts)
        result |= {
            f"{side}_words_mean": sum(words) / max(len(words), 1),
            f"{side}_words_p50": _percentile(words, 50),
            f"{side}_words_p95": _percentile(words, 95),
            f"{side}_words_max": words[-1] if words else 0,
        }
    size = sum(len(text.encode()) for texts in (corpus.sources, corpus.targets) for text in texts)
    return result | {"bytes": size}


def _look_ahead(records: Iterator[tuple[RowLocation, RecordOrError]]) -> list[tuple[RowLocation, RecordOrError]]:
    """The first records, up to `_LOOK_AHEAD` that are objects: records that cannot be parsed have no columns."""
    first_records = []
    num_objects = 0
    for location, record in records:
        first_records.append((location, record))
        num_objects += isinstance(record, dict)
        if num_objects == _LOOK_AHEAD:
            break
    return first_records


def _unreadable_split_message(dataset: Dataset, split: str, rows: list[tuple[RowLocation, RecordOrError]]) -> str:
    """The message for a split without a single object."""
    if not rows:
        return f"{dataset.name}: the {split} split is empty"
    bad = [BadRow(*location, str(record)) for location, record in rows]
    remedy = "correct them; the split has no other rows"
    if any("JSON" in row.reason for row in bad):
        remedy += " (expected one JSON object per line, or one array of objects)"
    return _format_bad_rows("rows that cannot be used", bad, len(bad), remedy)


def _resolve_dataset(dataset: Dataset) -> Path | str:
    """The string "demo", the path of a file or folder, or a hub name; UserError for any other name."""
    name = dataset.name
    if name in DATASETS:
        return DATASETS[name].hub
    path = Path(name).expanduser()
    if not name.strip():
        raise UserError(
            f"the name of the data set is empty; use one of {', '.join(DATASETS)}, a file, a folder or a hub name"
        )
    # A name below an existing folder is a mistyped path rather than a hub name.
    has_parent_folder = "/" in name and path.parent.is_dir()
    if has_parent_folder or path.exists() or name.endswith(EXTENSIONS) or name.startswith((".", "/", "~")):
        return path
    if re.fullmatch(r"[\w.\-]+/[\w.\-]+", name):
        return name
    similar = closest_name(name, DATASETS)
    hint = f"did you mean {similar!r}?" if similar else f"known names: {', '.join(DATASETS)}"
    raise UserError(f"data set {name!r}: not a named data set, file, folder or hub name (owner/name); {hint}")


def _hub_arguments(dataset: Dataset) -> tuple[str, str | None, str | None]:
    preset = DATASETS.get(dataset.name)
    if preset is None:
        return dataset.name, dataset.config, None
    return preset.hub, dataset.config or preset.config, preset.revision


def _requested_columns(dataset: Dataset) -> Columns | None:
    if dataset.columns or dataset.name not in DATASETS:
        return dataset.columns
    return DATASETS[dataset.name].columns


def _read_split_records(dataset: Dataset, split: str) -> Iterator[tuple[RowLocation, RecordOrError]]:
    source = _resolve_dataset(dataset)
    if source == "demo":
        from raydistill.data.demo import SPLIT_SIZES, demo_rows

        if split not in SPLIT_SIZES:
            raise UserError(f"demo: no split {split!r}; available: {', '.join(SPLIT_SIZES)}")
        yield from ((("demo", i), dict(row)) for i, row in enumerate(demo_rows(split), 1))
    elif isinstance(source, Path):
        files = find_split_files(str(source), dataset.selection_split)
        if split not in files and source.is_dir():
            raise UserError(f"{source}: no split {split!r}; available: {', '.join(files)}")
        for path in files.get(split) or next(iter(files.values())):
            yield from (((str(path), number), record) for number, record in read_records(path))
    else:
        from raydistill.data.hub import hub_rows

        hub, config, revision = _hub_arguments(dataset)
        yield from (((hub, number), record) for number, record in hub_rows(hub, config, split, revision))


def _percentile(ordered: list[int], percent: int) -> int:
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)] if ordered else 0


def _format_bad_rows(problem: str, rows: Sequence[BadRow], total: int, remedy: str, max_shown: int = 5) -> str:
    lines = [str(row) for row in rows[:max_shown]]
    if total > max_shown:
        lines.append(f"... and {total - max_shown} more")
    return f"{total} {problem}; {remedy}\n  " + "\n  ".join(lines)
