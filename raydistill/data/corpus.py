"""A corpus: pairs of source and target text, read from any supported place, checked row by row, fingerprinted."""

import difflib
import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from raydistill.config.errors import UserError
from raydistill.config.presets import DATASETS
from raydistill.config.run import Columns, Dataset
from raydistill.data.files import EXTENSIONS, Record, kind_of, read_rows, splits_of

# In the order in which they are tried.
KNOWN_PAIRS = (
    ("document", "summary"),
    ("article", "highlights"),
    ("dialogue", "summary"),
    ("source", "target"),
    ("src", "tgt"),
    ("text", "summary"),
    ("input", "output"),
)
KNOWN_IDS = ("id", "fname")
_LOOK_AHEAD = 100  # objects that are looked at to find the columns

Place = tuple[str, int]  # file (or hub name) and row from 1


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: `row` counts from 1, and is the line where the format has lines."""

    file: str
    row: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.row}: {self.reason}"


@dataclass(frozen=True)
class Corpus:
    """Good rows of one split, in the file's order. Where not `labelled`, all `targets` are ""."""

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
        """16 hex digits of a SHA-256 over ids, sources and targets in order, whatever file they came from."""
        digest = hashlib.sha256()
        for row in zip(self.ids, self.sources, self.targets, strict=True):
            for text in row:
                data = text.encode("utf-8")
                digest.update(len(data).to_bytes(8, "big") + data)
        return digest.hexdigest()[:16]

    def head(self, n: int) -> "Corpus":
        """The first `n` rows."""
        return replace(self, ids=self.ids[:n], sources=self.sources[:n], targets=self.targets[:n])


def read_corpus(dataset: Dataset, split: str, *, need_targets: bool = True) -> Corpus:
    """Read and check one split.

    `dataset.name` is a name of `config.presets.DATASETS`, a file, a folder of train/validation/test files, or a
    hub name. A file alone is one split and answers to any split's name; compare `split_names` where that matters.
    Without `need_targets` a corpus whose targets are missing or unusable is read as unlabelled.
    UserError for anything wrong, bad rows too unless `dataset.skip_bad_rows`.
    """
    corpus, duplicates = inspect_corpus(dataset, split, need_targets=need_targets)
    if corpus.skipped and not dataset.skip_bad_rows:
        remedy = "correct them, or skip them with --skip-bad-rows (in YAML dataset: {skip_bad_rows: true})"
        raise UserError(_listed("rows that cannot be used", corpus.skipped, remedy))
    if duplicates:
        raise UserError(_listed("rows whose id is not unique", duplicates, DUPLICATES_REMEDY))
    if not len(corpus):
        raise UserError(f"{dataset.name}: no usable row in the {split} split")
    return corpus


DUPLICATES_REMEDY = (
    "remove the repeated rows, name a column of unique ids (columns.id), or number the rows (columns.id: '')"
)


def inspect_corpus(dataset: Dataset, split: str, *, need_targets: bool = True) -> tuple[Corpus, list[BadRow]]:
    """All good rows with the bad ones in `skipped`, and apart from them the rows that repeat an id.

    For reports: only what makes reading itself impossible is a UserError.
    """
    rows = _rows(dataset, split)
    ahead = _look_ahead(rows)
    objects = [record for _, record in ahead if isinstance(record, dict)]
    if not objects:
        raise UserError(_nothing_readable(dataset, split, ahead))
    columns = find_columns(_wanted(dataset), objects, dataset.name, need_targets)
    limit = getattr(dataset, f"{split}_rows", None) or math.inf
    ids: dict[str, Place] = {}
    sources: list[str] = []
    targets: list[str] = []
    skipped: list[BadRow] = []
    duplicates: list[BadRow] = []
    labelled = columns.target is not None
    for index, (place, record) in enumerate(chain(ahead, rows)):
        if len(ids) >= limit:
            break
        row = _checked(record, columns, index, need_targets)
        if isinstance(row, str):
            skipped.append(BadRow(*place, row))
        elif row[0] in ids:
            duplicates.append(BadRow(*place, f"id {row[0]!r} is also that of {':'.join(map(str, ids[row[0]]))}"))
        else:
            ids[row[0]] = place
            sources.append(row[1])
            targets.append(row[2])
            labelled = labelled and bool(row[2])
    if not labelled:
        targets = [""] * len(ids)
    corpus = Corpus(dataset.name, split, list(ids), sources, targets, columns, skipped, labelled)
    return corpus, duplicates


def split_names(dataset: Dataset) -> list[str]:
    """Which of train, validation and test exist. A file alone has one: what its name says, else train."""
    place = _where(dataset)
    if place == "demo":
        return ["train", "validation", "test"]
    if isinstance(place, Path):
        return list(splits_of(str(place)))
    from raydistill.data.hub import hub_splits

    there = hub_splits(*_hub(dataset))
    return [split for split in ("train", "validation", "test") if split in there]


def check_split(dataset: Dataset, split: str) -> None:
    """UserError where a data set does not have the split; a file alone answers to any."""
    names = split_names(dataset)
    if split not in names and not Path(dataset.name).is_file():
        raise UserError(f"{dataset.name}: there is no split {split!r}; it has {', '.join(names)}")


def statistics(corpus: Corpus) -> dict[str, Any]:
    """Rows, words (split at white space) of sources and targets, and the text's size in bytes of UTF-8.

    A percentile is the smallest count that so many per cent of the rows do not exceed.
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


def _look_ahead(rows: Iterator[tuple[Place, Record]]) -> list[tuple[Place, Record]]:
    """The first rows, as many as it takes for some objects: one that cannot be read tells nothing of the columns."""
    ahead = []
    objects = 0
    for place, record in rows:
        ahead.append((place, record))
        objects += isinstance(record, dict)
        if objects == _LOOK_AHEAD:
            break
    return ahead


def _nothing_readable(dataset: Dataset, split: str, rows: list[tuple[Place, Record]]) -> str:
    """What to say of a split without a single object; skipping its bad rows would leave nothing."""
    if not rows:
        return f"{dataset.name}: the {split} split is empty"
    bad = [BadRow(*place, str(record)) for place, record in rows]
    remedy = "correct them; the split has no other rows"
    if any("JSON" in row.reason for row in bad):
        remedy += " (expected one JSON object per line, or one array of objects)"
    return _listed("rows that cannot be used", bad, remedy)


def find_columns(
    wanted: Columns | None, objects: list[dict[str, Any]], name: str, need_targets: bool = True
) -> Columns:
    """The columns to read: those asked for, else known names, judged by some first records.

    The first record that has them decides. UserError lists the columns that exist and the YAML to write.
    """
    for record in objects:
        found = _columns_of(record, wanted, need_targets)
        if found:
            return found
    exist = list(dict.fromkeys(key for record in objects for key in _dotted(record)))
    missing = f"no column {_missing(wanted, objects, need_targets)}" if wanted else "no known pair of columns"
    guess = [*exist, "SOURCE", "TARGET"][:2] if len(exist) == 2 else ["SOURCE", "TARGET"]
    raise UserError(
        f"{name}: {missing}. Columns that exist: {', '.join(exist) or 'none'}. Name yours in the YAML file: "
        f"dataset: {{name: {name}, columns: {{source: {guess[0]}, target: {guess[1]}}}}} "
        "(on the command line --source and --target)"
    )


def _columns_of(record: dict[str, Any], wanted: Columns | None, need_targets: bool) -> Columns | None:
    known_id = next((name for name in KNOWN_IDS if name in record), None)
    if wanted:
        needed = [wanted.source, *([wanted.target] if wanted.target and need_targets else [])]
        needed += [wanted.id] if wanted.id else []
        target = wanted.target if wanted.target and _has(record, wanted.target) else None
        if need_targets and wanted.target is None:
            target = next((t for s, t in KNOWN_PAIRS if s == wanted.source and t in record), None)
            if target is None:
                return None
        row_id = known_id if wanted.id is None else wanted.id or None
        return Columns(source=wanted.source, target=target, id=row_id) if _all(record, needed) else None
    pair = record.get("translation")
    if isinstance(pair, dict) and len(pair) == 2:
        source, target = pair
        return Columns(source=f"translation.{source}", target=f"translation.{target}", id=known_id)
    for source, target in KNOWN_PAIRS:
        if source in record and target in record:
            return Columns(source=source, target=target, id=known_id)
    alone = next((source for source, _ in KNOWN_PAIRS if source in record), None)
    return Columns(source=alone, id=known_id) if alone and not need_targets else None


def _missing(wanted: Columns, objects: list[dict[str, Any]], need_targets: bool) -> str:
    names = [wanted.source, wanted.target if need_targets else None, wanted.id]
    absent = [name for name in names if name and not any(_has(record, name) for record in objects)]
    return " and no column ".join(repr(name) for name in absent) or "for the target"


def _checked(record: Record, columns: Columns, index: int, need_targets: bool) -> tuple[str, str, str] | str:
    """(id, source, target), or why the row is bad. The target is "" where it is missing and not needed."""
    if isinstance(record, str):
        return record
    row_id: Any = str(index) if columns.id is None else _get(record, columns.id)
    if isinstance(row_id, bool) or not isinstance(row_id, str | int) or row_id == "":
        return f"{columns.id}: expected an id (a text or a whole number), found {_found(row_id)}"
    texts = [str(row_id)]
    if not _encodes(texts[0]):
        return f"{columns.id}: a lone surrogate, which is no character"
    for name, needed in ((columns.source, True), (columns.target, need_targets)):
        value: Any = _get(record, name) if name else None
        reason = _text_fault(value)
        if reason and needed:
            return f"{name}: {reason}"
        texts.append("" if reason else value)
    return texts[0], texts[1], texts[2]


def _text_fault(value: Any) -> str | None:
    if not isinstance(value, str):
        return f"expected a text, found {_found(value)}"
    if not value.strip():
        return "empty"
    return None if _encodes(value) else "a lone surrogate, which is no character"


def _encodes(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


_ABSENT = object()


def _found(value: Any) -> str:
    return "no such field" if value is _ABSENT else "an empty text" if value == "" else kind_of(value)


def _get(record: dict[str, Any], name: str) -> Any:
    """A field by its name; where there is none, the dots of the name lead into nested objects."""
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return _ABSENT
        value = value[part]
    return value


def _has(record: dict[str, Any], name: str) -> bool:
    return _get(record, name) is not _ABSENT


def _all(record: dict[str, Any], names: list[str]) -> bool:
    return all(_has(record, name) for name in names)


def _dotted(record: dict[str, Any]) -> Iterator[str]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from (f"{key}.{inner}" for inner in value)
        else:
            yield str(key)


def _where(dataset: Dataset) -> Path | str:
    """`demo`, a path, or a hub name; UserError for a name that is none of these."""
    name = dataset.name
    if name in DATASETS:
        return DATASETS[name].hub
    path = Path(name).expanduser()
    if not name.strip():
        raise UserError(
            f"the data set's name is empty; give one of {', '.join(DATASETS)}, a file, a folder or a hub name"
        )
    # A mistyped path below a folder that exists is no hub name; asking the hub would only confuse.
    below = "/" in name and path.parent.is_dir()
    if below or path.exists() or name.endswith(EXTENSIONS) or name.startswith((".", "/", "~")):
        return path
    if re.fullmatch(r"[\w.\-]+/[\w.\-]+", name):
        return name
    near = difflib.get_close_matches(name, list(DATASETS), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known names: {', '.join(DATASETS)}"
    raise UserError(f"data set {name!r}: no such name, file or folder, and no hub name (owner/name); {hint}")


def _hub(dataset: Dataset) -> tuple[str, str | None, str | None]:
    preset = DATASETS.get(dataset.name)
    if preset is None:
        return dataset.name, dataset.config, None
    return preset.hub, dataset.config or preset.config, preset.revision


def _wanted(dataset: Dataset) -> Columns | None:
    if dataset.columns or dataset.name not in DATASETS:
        return dataset.columns
    return DATASETS[dataset.name].columns


def _rows(dataset: Dataset, split: str) -> Iterator[tuple[Place, Record]]:
    place = _where(dataset)
    if place == "demo":
        from raydistill.data.demo import SIZES, demo_rows

        if split not in SIZES:
            raise UserError(f"demo: no split {split!r}; it has {', '.join(SIZES)}")
        yield from ((("demo", i), dict(row)) for i, row in enumerate(demo_rows(split), 1))
    elif isinstance(place, Path):
        found = splits_of(str(place))
        if split not in found and place.is_dir():
            raise UserError(f"{place}: there is no {split} split; it has {', '.join(found)}")
        for path in found.get(split) or next(iter(found.values())):
            yield from (((str(path), number), record) for number, record in read_rows(path))
    else:
        from raydistill.data.hub import hub_rows

        hub, config, revision = _hub(dataset)
        yield from (((hub, number), record) for number, record in hub_rows(hub, config, split, revision))


def _percentile(ordered: list[int], percent: int) -> int:
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)] if ordered else 0


def _listed(what: str, rows: list[BadRow], remedy: str, shown: int = 5) -> str:
    lines = [str(row) for row in rows[:shown]]
    if len(rows) > shown:
        lines.append(f"... and {len(rows) - shown} more")
    return f"{len(rows)} {what}; {remedy}\n  " + "\n  ".join(lines)
