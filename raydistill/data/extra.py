"""Extra sources: texts without targets that a teacher labels, so that students train on more than the training split.

The rows of the file are checked once. A row whose source equals that of the training split or of an earlier row is left
out. A row that is a near duplicate (data/overlap.py) of the validation, selection or test split would make scores too
high: such rows are an error, or are left out. What remains is an artifact:

    NAME.parquet           `id` ("extra:" and the id in the file) and `source` of each row, in the order of the file
    dropped_rows.parquet   `file`, `row` and `reason` of each row that was left out
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from raydistill.config.run import Dataset, ExtraSources
from raydistill.core import artifact
from raydistill.core.artifact import Manifest
from raydistill.core.console import print_progress
from raydistill.core.errors import UserError
from raydistill.core.hashing import content_hash
from raydistill.data.corpus import Corpus, Row, RowLocation, read_corpus
from raydistill.data.overlap import BAND_ROWS, BANDS, MIN_SIMILARITY, NGRAM_CHARS, NearDuplicateIndex, normalize_text
from raydistill.data.readers import known_extension
from raydistill.data.selection import SELECTION, read_part
from raydistill.data.streaming import SplitScan, scan_split, usable_rows

KIND = "extra sources"
ID_PREFIX = "extra:"  # ids of training rows may be row numbers, as the ids of rows of the file are
DROPPED_FILE = "dropped_rows.parquet"  # no name of a file of rows has an underscore
FORMAT = 1  # part of the key; raise it when the code selects other rows
HELD_OUT_SPLITS = ("validation", SELECTION, "test")
MAX_SHOWN = 5
BATCH_ROWS = 10_000  # rows that are written at a time

OverlapPolicy = Literal["reject", "drop"]


class ExtraManifest(Manifest):
    """The manifest of extra sources.

    Attributes:
        name: The file or data set, as the configuration names it.
        rows: Rows that remain.
        fingerprint: The fingerprint of all usable rows of the file.
        skipped: Rows of the file that cannot be used.
        dropped: Rows that were left out, by split of the near duplicate, and "train" for equal sources.
    """

    kind: str = KIND
    name: str
    rows: int = Field(ge=0)
    fingerprint: str
    skipped: int = 0
    dropped: dict[str, int] = Field(default_factory=dict)


@dataclass(frozen=True)
class DroppedRow:
    """A row that is left out, the split of the row that it repeats ("train" also for rows of the file), and why."""

    location: RowLocation
    split: str
    reason: str

    def __str__(self) -> str:
        return f"{self.location[0]}:{self.location[1]}: {self.reason}"


@dataclass(frozen=True)
class ComparedSplits:
    """The splits of a data set that exist, with which extra sources are compared."""

    corpora: dict[str, Corpus]

    @classmethod
    def of(cls, dataset: Dataset) -> "ComparedSplits":
        """Read the splits of a data set; the validation split includes rows that `selection_share` keeps apart."""
        whole = dataset.model_copy(update={"selection_share": None})
        corpora = {split: read_part(whole, split) for split in ("train", *HELD_OUT_SPLITS)}
        return cls({split: corpus for split, corpus in corpora.items() if corpus is not None})

    @property
    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of each split."""
        return {split: corpus.fingerprint for split, corpus in self.corpora.items()}

    def divide(self, rows: Iterator[Row]) -> Iterator[Row | DroppedRow]:
        """Yield each row, or the reason for which the row is left out."""
        train = self.corpora.get("train")
        seen = {normalize_text(source) for source in (train.sources if train else [])}
        held_out = {split: corpus for split, corpus in self.corpora.items() if split != "train"}
        index = NearDuplicateIndex(
            (split, row_id, source)
            for split, corpus in held_out.items()
            for row_id, source in zip(corpus.ids, corpus.sources, strict=True)
        )
        for row in rows:
            text = normalize_text(row.source)
            if text in seen:
                yield DroppedRow(row.location, "train", "the source occurs in the training split or in an earlier row")
            elif match := index.find(row.source):
                yield DroppedRow(row.location, match.split, str(match))
            else:
                seen.add(text)
                yield row


@dataclass
class ExtraReport:
    """Counts of extra sources, collected while their rows are read."""

    name: str
    scan: SplitScan
    num_kept: int = 0
    dropped: list[DroppedRow] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """The number of dropped rows by split."""
        splits = [row.split for row in self.dropped]
        return {split: splits.count(split) for split in ("train", *HELD_OUT_SPLITS) if split in splits}

    @property
    def overlaps(self) -> list[DroppedRow]:
        """The rows that are near duplicates of rows of validation, selection or test split."""
        return [row for row in self.dropped if row.split != "train"]

    def manifest(self, key: str) -> ExtraManifest:
        """The manifest, once all rows are counted."""
        return ExtraManifest(
            key=key,
            name=self.name,
            rows=self.num_kept,
            fingerprint=self.scan.fingerprint,
            skipped=self.scan.skipped,
            dropped=self.counts,
        )


def describe_extra(dataset: Dataset, extra: ExtraSources) -> ExtraReport:
    """Compare all rows of extra sources with the splits of a data set; nothing is written.

    Raises:
        UserError: A file cannot be read, or a row cannot be used.
    """
    report = ExtraReport(extra.name, scan_split(extra.as_dataset(), extra.split))
    rows = usable_rows(extra.as_dataset(), extra.split, report.scan)
    for _ in _count_rows(ComparedSplits.of(dataset).divide(rows), report):
        pass
    return report


def ensure_extra(
    dataset: Dataset, extra: ExtraSources, root: Path, *, max_rows: int | None = None, overlap: OverlapPolicy = "reject"
) -> Path:
    """Make the artifact of extra sources in a folder below `root`, unless it exists; returns the folder.

    Args:
        dataset: The data set of the runs.
        extra: The file.
        root: The folder of all extra sources.
        max_rows: The number of rows at which the file is cut, after rows were left out; None for all rows.
        overlap: What happens to near duplicates of validation, selection and test split.

    Raises:
        UserError: A file cannot be read, a row cannot be used, no row remains, or rows overlap and `overlap` is
            "reject".
    """
    scan = scan_split(extra.as_dataset(), extra.split)
    texts = ComparedSplits.of(dataset)
    key = content_hash(
        {
            "format": FORMAT,
            "ngrams": [NGRAM_CHARS, MIN_SIMILARITY, BANDS, BAND_ROWS],
            "extra": scan.fingerprint,
            "data": texts.fingerprints,
            "max_rows": max_rows,
            "overlap": overlap,
        }
    )
    folder = root.absolute() / f"{_stem(extra.name)}-{key}"
    with artifact.lock(folder, math.inf, print_progress):
        if not artifact.is_complete(folder):
            report = ExtraReport(extra.name, scan)
            rows = usable_rows(extra.as_dataset(), extra.split, scan)
            with artifact.build(folder, lambda: report.manifest(key)) as temporary:
                kept = _count_rows(texts.divide(rows), report)
                _write_rows(temporary / f"{_stem(extra.name)}.parquet", islice(kept, max_rows))
                _write_dropped(temporary / DROPPED_FILE, report.dropped)
                _check_report(report, overlap)
            print_progress(format_extra(report))
    return folder


def read_extra(folder: Path) -> Corpus:
    """Read the rows of extra sources; the targets are ""."""
    return read_corpus(extra_dataset(folder), "train", need_targets=False)


def extra_dataset(folder: Path) -> Dataset:
    """The rows of extra sources as a data set of one file."""
    [file] = [path for path in folder.glob("*.parquet") if path.name != DROPPED_FILE]
    return Dataset(name=str(file))


def read_extra_manifest(folder: Path) -> ExtraManifest:
    """Read the manifest of extra sources."""
    return artifact.open_artifact(folder, ExtraManifest, KIND)


def format_extra(report: ExtraReport) -> str:
    """What remains of extra sources and what was left out, on one line."""
    counts = report.counts
    left_out = [f"{counts.pop('train')} equal to rows of train or to earlier rows"] if "train" in counts else []
    left_out += [f"{count} near duplicates of {split}" for split, count in counts.items()]
    kept = f"extra sources {report.name}: {report.num_kept} rows"
    return f"{kept}; left out: {', '.join(left_out)}" if left_out else kept


def overlap_message(report: ExtraReport) -> str:
    """Which rows overlap with the evaluation splits, and what to do."""
    overlaps = report.overlaps
    lines = [str(row) for row in overlaps[:MAX_SHOWN]]
    lines += [f"... and {len(overlaps) - MAX_SHOWN} more"] if len(overlaps) > MAX_SHOWN else []
    return (
        f"{report.name}: {len(overlaps)} rows are near duplicates of rows that scores are measured on, so that scores "
        f"would be too high; remove them from the file, or leave them out with pseudo.extra_overlap: drop (on the "
        f"command line --extra-overlap drop)\n  " + "\n  ".join(lines)
    )


def _check_report(report: ExtraReport, overlap: OverlapPolicy) -> None:
    if report.overlaps and overlap == "reject":
        raise UserError(overlap_message(report))
    if not report.num_kept:
        raise UserError(f"{report.name}: no row remains ({format_extra(report)}); give other texts")


def _count_rows(rows: Iterator[Row | DroppedRow], report: ExtraReport) -> Iterator[Row]:
    """Yield the rows that remain, and count all in the report."""
    for row in rows:
        if isinstance(row, DroppedRow):
            report.dropped.append(row)
        else:
            report.num_kept += 1
            yield row


def _write_rows(path: Path, rows: Iterator[Row]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("id", pa.string()), ("source", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        while batch := list(islice(rows, BATCH_ROWS)):
            lines: list[dict[str, Any]] = [{"id": f"{ID_PREFIX}{row.id}", "source": row.source} for row in batch]
            writer.write_table(pa.Table.from_pylist(lines, schema=schema))


def _write_dropped(path: Path, rows: list[DroppedRow]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("file", pa.string()), ("row", pa.int64()), ("reason", pa.string())])
    lines = [{"file": row.location[0], "row": row.location[1], "reason": row.reason} for row in rows]
    pq.write_table(pa.Table.from_pylist(lines, schema=schema), path)


def _stem(name: str) -> str:
    """The name of a file without extensions, as part of a file name."""
    stem = Path(name).name.removesuffix(known_extension(Path(name)) or "")
    return "".join(c if c.isalnum() else "-" for c in stem) or "extra"
