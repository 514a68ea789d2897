"""Label sets on disk: the texts that a teacher wrote for the rows of a data split.

A label set is an artifact. Parquet parts hold one line per candidate (`id`, `target`, `rank`, `score`); rank 0 is the
best candidate, the candidates of a row are adjacent, and rows keep the order of the data. A curated set also has
`dropped.parquet` (`id`, `reason`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from raydistill.core import artifact
from raydistill.core.artifact import MANIFEST
from raydistill.core.errors import UserError
from raydistill.core.files import corrupt_file_error
from raydistill.core.hashing import content_hash
from raydistill.label_sets.manifest import LABEL_SET, LabelManifest, PseudolabelManifest

PART_ROWS = 50_000
WRITE_BUFFER_ROWS = 2_000  # rows in memory before they are written, so that memory does not grow with a part
COLUMNS = ("id", "target", "rank", "score")
PART_PATTERN = "part-{:05d}.parquet"
DROPPED_FILE = "dropped.parquet"
CORRUPT_SET_REMEDY = "delete the folder and make the label set again"


@dataclass(frozen=True)
class LabelSet:
    """A complete label set.

    `targets` holds the best candidate by row id, `dropped_ids` the ids of the rows that curation dropped.
    """

    folder: Path
    manifest: LabelManifest
    targets: dict[str, str]
    dropped_ids: frozenset[str] = frozenset()


def label_set_key(teacher: str, data: str, decoding: dict[str, Any]) -> str:
    """The content key in the folder name of a label set: a hash of teacher, data and decoding settings."""
    return content_hash({"teacher": teacher, "data": data, "decoding": decoding})


class Candidate(NamedTuple):
    """A text that a teacher wrote for a row.

    `score` is the log-probability divided by the length to the power of the length penalty.
    """

    target: str
    score: float


def write_label_set(
    folder: Path,
    rows: Iterable[tuple[str, Sequence[Candidate] | str]],
    make_manifest: Callable[[], LabelManifest],
) -> None:
    """Write a label set. The caller holds the lock of the set. A complete set in `folder` is left unchanged.

    Args:
        rows: A row id with the candidates of the row, best first, or with the reason why curation dropped the row.
            Rows are read once and are not kept in memory.
        make_manifest: Called after the last row, so that the manifest may count rows.
    """
    import pyarrow as pa

    if artifact.is_complete(folder):  # another process may be reading the set
        return
    dropped_schema = pa.schema([("id", pa.string()), ("reason", pa.string())])
    with (
        artifact.build(folder, make_manifest) as temporary,
        _PartWriter(temporary, PART_PATTERN, part_schema(), PART_ROWS) as parts,
        _PartWriter(temporary, DROPPED_FILE, dropped_schema) as dropped,
    ):
        for row_id, candidates_or_reason in rows:
            if isinstance(candidates_or_reason, str):
                dropped.add(row_id, candidates_or_reason)
                continue
            for rank, (target, score) in enumerate(candidates_or_reason):
                parts.add(row_id, target, rank, score)


def write_label_tables(folder: Path, tables: Iterable[Any], make_manifest: Callable[[], LabelManifest]) -> None:
    """Write a label set from pyarrow tables of `part_schema`, one after another, otherwise as `write_label_set`."""
    if artifact.is_complete(folder):  # another process may be reading the set
        return
    with (
        artifact.build(folder, make_manifest) as temporary,
        _PartWriter(temporary, PART_PATTERN, part_schema(), PART_ROWS) as parts,
    ):
        for table in tables:
            parts.add_table(table)


def part_schema() -> Any:
    """The pyarrow schema of the parts: a line per candidate."""
    import pyarrow as pa

    return pa.schema(zip(COLUMNS, (pa.string(), pa.string(), pa.int32(), pa.float64()), strict=True))


class _PartWriter:
    """Write lines to Parquet files of `max_rows` lines each, or to a single file. No file is empty."""

    def __init__(self, folder: Path, name_pattern: str, schema: Any, max_rows: int | None = None) -> None:
        self._folder, self._name_pattern, self._schema, self._max_rows = folder, name_pattern, schema, max_rows
        self._writer: Any = None
        self._num_files = self._rows_in_file = 0
        self._buffer: list[tuple[Any, ...]] = []

    def __enter__(self) -> "_PartWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._close_file()

    def add(self, *line: Any) -> None:
        self._buffer.append(line)
        if len(self._buffer) == WRITE_BUFFER_ROWS or self._rows_in_file + len(self._buffer) == self._max_rows:
            self._flush()

    def add_table(self, table: Any) -> None:
        while len(table):
            space = len(table) if self._max_rows is None else self._max_rows - self._rows_in_file
            self._write(table.slice(0, space))
            table = table.slice(space)

    def _flush(self) -> None:
        import pyarrow as pa

        lines = [dict(zip(self._schema.names, line, strict=True)) for line in self._buffer]
        self._buffer.clear()
        self.add_table(pa.Table.from_pylist(lines, schema=self._schema))

    def _write(self, table: Any) -> None:
        import pyarrow.parquet as pq

        if self._writer is None:
            self._writer = pq.ParquetWriter(self._folder / self._name_pattern.format(self._num_files), self._schema)
        self._writer.write_table(table)
        self._rows_in_file += len(table)
        if self._rows_in_file == self._max_rows:
            self._close_file()

    def _close_file(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._num_files += 1
        self._writer, self._rows_in_file = None, 0


def read_label_set(folder: Path) -> LabelSet:
    """Read a complete label set.

    Raises:
        UserError: The set is missing, incomplete, damaged or of another schema version.
    """
    manifest = read_manifest(folder)
    targets = {row_id: candidates[0].target for row_id, candidates in read_candidates(folder)}
    if len(targets) != manifest.rows:
        raise UserError(
            f"{folder}: the manifest counts {manifest.rows} rows but the parts hold {len(targets)}; "
            f"{CORRUPT_SET_REMEDY}"
        )
    return LabelSet(folder, manifest, targets, frozenset(row_id for row_id, _ in read_dropped(folder)))


def read_manifest(folder: Path) -> LabelManifest:
    """Read the manifest of any complete label set.

    Raises:
        UserError: The set is missing, incomplete, damaged or of another schema version.
    """
    if not artifact.is_complete(folder):
        raise UserError(
            f"{folder}: no complete label set (no {MANIFEST}); make one with `raydistill pseudolabel`, or "
            f"run the command that started this label set again"
        )
    return artifact.open_artifact(folder, LabelManifest, LABEL_SET)


def read_pseudolabel_manifest(folder: Path) -> PseudolabelManifest:
    """Read the manifest of a label set that `raydistill pseudolabel` or a curation wrote.

    Raises:
        UserError: As `read_manifest`, or the manifest lacks keys that `raydistill pseudolabel` writes.
    """
    manifest = read_manifest(folder)
    with corrupt_file_error(folder / MANIFEST, CORRUPT_SET_REMEDY):
        try:
            return PseudolabelManifest.model_validate(manifest.model_dump(exclude_unset=True))
        except ValidationError as error:
            missing = [".".join(map(str, e["loc"])) for e in error.errors() if e["type"] == "missing"]
            if not missing:
                raise
    raise UserError(
        f"{folder}: {MANIFEST} lacks {', '.join(missing)}, which `raydistill pseudolabel` writes; this label set is "
        f"usable for training only"
    )


def read_candidates(folder: Path) -> Iterator[tuple[str, list[Candidate]]]:
    """Yield the id and the candidates of each row, best first, in the order of the data.

    Raises:
        UserError: A part is damaged.
    """
    import pyarrow.parquet as pq

    def iter_lines() -> Iterator[tuple[str, str, int, float]]:
        for part in sorted(folder.glob("part-*.parquet")):
            with pq.ParquetFile(part) as file:
                for batch in file.iter_batches(columns=list(COLUMNS)):
                    yield from zip(*(batch.column(name).to_pylist() for name in COLUMNS), strict=True)

    with _corrupt_label_set_error(folder):
        for row_id, lines in groupby(iter_lines(), key=lambda line: line[0]):
            ranked = sorted(lines, key=lambda line: line[2])
            if not all(isinstance(text, str) for line in ranked for text in line[:2]):
                raise TypeError(f"row {row_id!r}: id and target must be strings")
            if [rank for _, _, rank, _ in ranked] != list(range(len(ranked))):
                raise ValueError(f"row {row_id!r} does not have each candidate once")
            yield row_id, [Candidate(target, float(score)) for _, target, _, score in ranked]


def read_dropped(folder: Path) -> list[tuple[str, str]]:
    """Read (id, reason) of the rows that curation dropped.

    Raises:
        UserError: The file is damaged.
    """
    import pyarrow.parquet as pq

    if not (folder / DROPPED_FILE).is_file():
        return []
    with _corrupt_label_set_error(folder):
        table = pq.read_table(folder / DROPPED_FILE, columns=["id", "reason"])
        rows = list(zip(table["id"].to_pylist(), table["reason"].to_pylist(), strict=True))
        if not all(isinstance(text, str) for row in rows for text in row):
            raise TypeError(f"{DROPPED_FILE}: ids and reasons must be strings")
        return rows


def find_label_set_folders(root: Path) -> list[Path]:
    """List the complete label sets in a folder by name, without temporary folders (their names start with a dot)."""
    return sorted(path.parent for path in root.glob(f"[!.]*/{MANIFEST}"))


def list_label_sets(root: Path) -> tuple[list[tuple[Path, PseudolabelManifest]], list[UserError]]:
    """Return the complete label sets in a folder with their manifests, and the errors of sets that are skipped."""
    label_sets, errors = [], []
    for folder in find_label_set_folders(root):
        try:
            label_sets.append((folder, read_pseudolabel_manifest(folder)))
        except UserError as error:
            errors.append(error)
    return label_sets, errors


@contextmanager
def _corrupt_label_set_error(folder: Path) -> Iterator[None]:
    """Turn every error of a block that reads Parquet files of a label set into a UserError with the remedy."""
    import pyarrow as pa

    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(f"{folder}: the label set is damaged ({error}); {CORRUPT_SET_REMEDY}") from None
