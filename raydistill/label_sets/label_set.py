"""Label sets: what teachers wrote for the sources of a corpus, kept apart from the corpus and never mixed up.

A folder: Parquet parts with a line per candidate (`id`, `target`, `rank`, `score`; rank 0 is the best, the candidates
of a row stand together, rows in the order of the data), in a curated set `dropped.parquet` (`id`, `reason`), and last
of all `manifest.json`.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from raydistill.config.label_sources import LabelSource
from raydistill.core.errors import UserError
from raydistill.core.files import corrupt_file_error, read_json, write_json_atomic

MANIFEST = "manifest.json"
PART_ROWS = 50_000
WRITE_BUFFER_ROWS = 2_000  # held until they are written, so that memory does not grow with a part
REQUIRED_COLUMNS = ("id", "target", "rank")  # what training reads
DROPPED_FILE = "dropped.parquet"
CORRUPT_SET_REMEDY = "delete the folder and make it again"
# What a set that `raydistill pseudolabel` made says of itself. Training reads `rows` alone, and so takes others too.
PSEUDOLABEL_KEYS = (
    "teacher.name",
    "teacher.fingerprint",
    "decoding",
    "metric",
    "engine",
    "device_hours",
    "empty",
    "target_words_mean",
    "quality",
)
# What these are, and what else commands read where it is there.
NUMBER_TYPES = (int, float)
MANIFEST_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("teacher.name", "teacher.fingerprint", "metric", "engine", "data.split"), str),
    **dict.fromkeys(("device_hours", "empty", "target_words_mean"), NUMBER_TYPES),
    **dict.fromkeys(("decoding", "data.dataset"), dict),
    **dict.fromkeys(("dropped", "curation"), dict),
    "quality": (dict, type(None)),
    "engine_why": (str, type(None)),
}


@dataclass(frozen=True)
class LabelSet:
    """A finished label set: manifest, `targets` by row id (the best candidate, rank 0), ids that curation dropped."""

    folder: Path
    manifest: dict[str, Any]
    targets: dict[str, str]
    dropped_ids: frozenset[str] = frozenset()

    @property
    def fingerprint(self) -> str:
        """Short sha256 of what students would be trained on."""
        digest = hashlib.sha256()
        for key in sorted(self.targets):
            digest.update(f"{key}\0{self.targets[key]}\0".encode())
        return digest.hexdigest()[:16]


def label_set_key(teacher: str, data: str, decoding: dict[str, Any]) -> str:
    """The folder name of a label set: another teacher, input or decoding is another label set."""
    text = json.dumps({"teacher": teacher, "data": data, "decoding": decoding}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Candidate(NamedTuple):
    """One text that a teacher wrote for a row, and its score (log-probability by length to the penalty)."""

    target: str
    score: float


def write_label_set(
    folder: Path,
    rows: Iterable[tuple[str, Sequence[Candidate] | str]],
    make_manifest: Callable[[], dict[str, Any]],
) -> None:
    """Write each row's candidates, the best first, as Parquet parts, and then the manifest: whole or not at all.

    In the candidates' place a text says why curation dropped the row. `rows` is read once and not held; `manifest()` is
    asked when all are written, and so may count them. The caller holds the lock of the set. A finished set is left as
    it is.
    """
    import pyarrow as pa

    making = folder.with_name(f".{folder.name}.making")
    shutil.rmtree(making, ignore_errors=True)  # of a process that was killed
    making.mkdir(parents=True)
    lines = pa.schema([("id", pa.string()), ("target", pa.string()), ("rank", pa.int32()), ("score", pa.float64())])
    reasons = pa.schema([("id", pa.string()), ("reason", pa.string())])
    try:
        with (
            _PartWriter(making, "part-{:05d}.parquet", lines, PART_ROWS) as parts,
            _PartWriter(making, DROPPED_FILE, reasons) as dropped,
        ):
            for row_id, found in rows:
                if isinstance(found, str):
                    dropped.add(row_id, found)
                    continue
                for rank, (target, score) in enumerate(found):
                    parts.add(row_id, target, rank, score)
        write_json_atomic(making / MANIFEST, make_manifest())
        if not is_complete(folder):  # else somebody may be reading it
            shutil.rmtree(folder, ignore_errors=True)
            making.rename(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)


class _PartWriter:
    """Lines into Parquet files of `most` lines each, or into one; written as they come, and no file without a line."""

    def __init__(self, folder: Path, name_pattern: str, schema: Any, max_rows: int | None = None) -> None:
        self._folder, self._name_pattern, self._schema, self._max_rows = folder, name_pattern, schema, max_rows
        self._writer: Any = None
        self._num_files = self._rows_in_file = 0
        self._buffer: list[tuple[Any, ...]] = []

    def __enter__(self) -> "_PartWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._close_file()

    def add(self, *line: Any) -> None:
        self._buffer.append(line)
        if len(self._buffer) == WRITE_BUFFER_ROWS:
            self._flush()
        if self._rows_in_file + len(self._buffer) == self._max_rows:
            self._close_file()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._writer is None:
            self._writer = pq.ParquetWriter(self._folder / self._name_pattern.format(self._num_files), self._schema)
        lines = [dict(zip(self._schema.names, line, strict=True)) for line in self._buffer]
        self._writer.write_table(pa.Table.from_pylist(lines, schema=self._schema))
        self._rows_in_file += len(self._buffer)
        self._buffer.clear()

    def _close_file(self) -> None:
        if self._buffer:
            self._flush()
        if self._writer is not None:
            self._writer.close()
            self._num_files += 1
        self._writer, self._rows_in_file = None, 0


def is_complete(folder: Path) -> bool:
    """A label set is there as soon as its manifest is."""
    return (folder / MANIFEST).is_file()


def read_label_set(folder: Path) -> LabelSet:
    """Read a finished label set; UserError where it is missing, unfinished or damaged."""
    manifest = read_manifest(folder)
    targets = {row_id: candidates[0].target for row_id, candidates in read_candidates(folder)}
    if len(targets) != manifest["rows"]:
        raise UserError(
            f"{folder}: the manifest counts {manifest['rows']} rows but the parts hold {len(targets)}; "
            f"delete the folder and make it again"
        )
    return LabelSet(folder, manifest, targets, frozenset(row_id for row_id, _ in read_dropped(folder)))


def read_manifest(folder: Path, required_keys: Sequence[str] = ()) -> dict[str, Any]:
    """The manifest of a finished label set; UserError where it is missing, damaged or lacks a `required_keys` key.

    `data.split` is the key `split` of what stands under `data`.
    """
    if not is_complete(folder):
        raise UserError(
            f"{folder}: no finished label set here (no {MANIFEST}); make one with `raydistill pseudolabel`, "
            f"or run its command again to finish it"
        )
    manifest = read_json(folder / MANIFEST)
    with corrupt_file_error(folder / MANIFEST, CORRUPT_SET_REMEDY):
        if not isinstance(manifest["rows"], int) or manifest["rows"] < 0:
            raise TypeError(f"rows is {manifest['rows']!r}, which counts nothing")
    if missing := [key for key in required_keys if not _has_key(manifest, key)]:
        raise UserError(
            f"{folder}: its {MANIFEST} lacks {', '.join(missing)}, which `raydistill pseudolabel` writes; such a set "
            f"can be trained on, and no more"
        )
    with corrupt_file_error(folder / MANIFEST, CORRUPT_SET_REMEDY):
        for key in filter(lambda key: required_keys and _has_key(manifest, key), MANIFEST_TYPES):
            if not isinstance(_get_key(manifest, key), MANIFEST_TYPES[key]):
                raise TypeError(f"{key} is {_get_key(manifest, key)!r}")
        if required_keys and not all(isinstance(v, NUMBER_TYPES) for v in (manifest.get("quality") or {}).values()):
            raise TypeError("quality holds more than numbers")
    return manifest


def _has_key(manifest: Any, key: str) -> bool:
    first, _, rest = key.partition(".")
    return isinstance(manifest, dict) and first in manifest and (not rest or _has_key(manifest[first], rest))


def _get_key(manifest: dict[str, Any], key: str) -> Any:
    first, _, rest = key.partition(".")
    return _get_key(manifest[first], rest) if rest else manifest[first]


def read_candidates(folder: Path) -> Iterator[tuple[str, list[Candidate]]]:
    """Each row's id and candidates, the best first, one row after the other; UserError where a part is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def rows() -> Iterator[tuple[str, str, int, float]]:
        for part in sorted(folder.glob("part-*.parquet")):
            with pq.ParquetFile(part) as file:
                for batch in file.iter_batches(columns=[*REQUIRED_COLUMNS, "score"]):
                    yield from zip(*(batch.column(c).to_pylist() for c in (*REQUIRED_COLUMNS, "score")), strict=True)

    try:
        for row_id, group in groupby(rows(), key=lambda row: row[0]):
            ranked = sorted(group, key=lambda row: row[2])
            if not all(isinstance(text, str) for line in ranked for text in line[:2]):
                raise TypeError(f"row {row_id!r}: id and target must be texts")
            if [rank for _, _, rank, _ in ranked] != list(range(len(ranked))):
                raise ValueError(f"row {row_id!r} does not have its candidates once each")
            yield row_id, [Candidate(target, float(score)) for _, target, _, score in ranked]
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise _corrupt_label_set_error(folder, error) from None


def read_dropped(folder: Path) -> list[tuple[str, str]]:
    """(id, reason) of the rows that curation left out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not (folder / DROPPED_FILE).is_file():
        return []
    try:
        found = pq.read_table(folder / DROPPED_FILE, columns=["id", "reason"])
        rows = list(zip(found["id"].to_pylist(), found["reason"].to_pylist(), strict=True))
        if not all(isinstance(text, str) for row in rows for text in row):
            raise TypeError(f"{DROPPED_FILE}: ids and reasons must be texts")
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise _corrupt_label_set_error(folder, error) from None
    return rows


def find_label_set_folders(root: Path) -> list[Path]:
    """The finished label sets under a folder, by name; a name that begins with a dot is none, but one in the making."""
    return sorted(path.parent for path in root.glob(f"[!.]*/{MANIFEST}"))


def list_label_sets(root: Path) -> tuple[list[tuple[Path, dict[str, Any]]], list[UserError]]:
    """The finished label sets under a folder with their manifests, by name; and what is wrong with those left out."""
    found, wrong = [], []
    for folder in find_label_set_folders(root):
        try:
            found.append((folder, read_manifest(folder, PSEUDOLABEL_KEYS)))
        except UserError as error:
            wrong.append(error)
    return found, wrong


def _corrupt_label_set_error(folder: Path, error: Exception) -> UserError:
    return UserError(f"{folder}: the label set is damaged ({error}); {CORRUPT_SET_REMEDY}")


def select_targets(
    ids: list[str], originals: list[str], labels: Sequence[LabelSource], label_sets: Mapping[str, LabelSet]
) -> tuple[list[int], list[str]]:
    """Row numbers and targets of the training examples, one source of labels after the other.

    `describe_label_sets` holds the label set of each source but `original`. A weight says how often an epoch reads a
    source's rows:
    2 reads all of them twice, 0.5 a half of them, the same half whenever source and ids are the same. A row whose
    pseudo-label is empty or was dropped is left out of that source.
    """
    rows: list[int] = []
    targets: list[str] = []
    for source, weight in labels:
        if source == "original":
            usable, texts = list(range(len(ids))), originals
        elif source in label_sets:
            usable, texts = _rows_with_pseudo_labels(ids, label_sets[source])
        else:
            raise UserError(f"labels: {source!r} needs a label set; make one with `raydistill pseudolabel`")
        picked = [i for i in usable for _ in range(_repeat_count(source, ids[i], weight))]
        rows += picked
        targets += [texts[i] for i in picked]
    if not rows:
        raise UserError(f"labels: a weight of {min(weight for _, weight in labels)} leaves no row of {len(ids)}")
    return rows, targets


def _rows_with_pseudo_labels(ids: list[str], label_set: LabelSet) -> tuple[list[int], list[str]]:
    """The numbers of the rows that have a pseudo-label, and each row's ("" for the others)."""
    missing = [row_id for row_id in ids if row_id not in label_set.targets and row_id not in label_set.dropped_ids]
    if missing:
        raise UserError(
            f"{label_set.folder}: {len(missing)} of {len(ids)} training rows have no pseudo-label "
            f"(first: {missing[0]!r}); it was made for other data: make one for this data set with "
            f"`raydistill pseudolabel`"
        )
    texts = [label_set.targets.get(row_id, "") for row_id in ids]
    kept = [i for i, text in enumerate(texts) if text.strip()]
    if not kept:
        raise UserError(
            f"{label_set.folder}: every pseudo-label is empty or was dropped; look at the teacher's decoding and the "
            f"curation"
        )
    return kept, texts


def _repeat_count(source: str, row_id: str, weight: float) -> int:
    """How often a row is read: the weight's whole part, and once more for its fraction of all rows.

    Each source has a fraction of its own, or halves of two sources would be of the same rows.
    """
    whole, fraction = divmod(weight, 1)
    draw = int.from_bytes(hashlib.sha256(f"{source}\0{row_id}".encode()).digest()[:8], "big") / 2**64
    return int(whole) + (draw < fraction)
