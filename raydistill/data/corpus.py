"""A corpus: pairs of source and target text, read from any supported place, checked row by row, fingerprinted."""

import difflib
import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from raydistill.config.presets import DATASETS
from raydistill.config.run import Columns, Dataset
from raydistill.core.errors import UserError
from raydistill.data.columns import check_record, find_columns
from raydistill.data.readers import EXTENSIONS, Record, read_rows, splits_of

_LOOK_AHEAD = 100  # objects that are looked at to find the columns

Place = tuple[str, int]  # file (or hub name) and row from 1


class Row(NamedTuple):
    """A usable row and where it stands; `target` is "" where it is missing and not needed."""

    place: Place
    id: str
    source: str
    target: str


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: `row` counts from 1, and is the line where the format has lines."""

    file: str
    row: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.row}: {self.reason}"


class Fingerprint:
    """What a corpus is known by, row after row: see `Corpus.fingerprint`."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, *texts: str) -> None:
        """One row: its id, source and target."""
        for text in texts:
            data = text.encode("utf-8")
            self._digest.update(len(data).to_bytes(8, "big") + data)

    @property
    def value(self) -> str:
        return self._digest.hexdigest()[:16]


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
        digest = Fingerprint()
        for row in zip(self.ids, self.sources, self.targets, strict=True):
            digest.add(*row)
        return digest.value

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
    check_rows(dataset, split, len(corpus), corpus.skipped, duplicates)
    return corpus


def check_rows(
    dataset: Dataset,
    split: str,
    usable: int,
    skipped: Sequence[BadRow],
    duplicates: Sequence[BadRow],
    counts: tuple[int, int] | None = None,
) -> None:
    """UserError where a split has bad rows that are not to be skipped, repeated ids, or no usable row.

    `counts`: how many bad and repeated rows there are where only the first of them were kept.
    """
    bad, repeats = counts or (len(skipped), len(duplicates))
    if skipped and not dataset.skip_bad_rows:
        remedy = "correct them, or skip them with --skip-bad-rows (in YAML dataset: {skip_bad_rows: true})"
        raise UserError(_listed("rows that cannot be used", skipped, bad, remedy))
    if duplicates:
        raise UserError(_listed("rows whose id is not unique", duplicates, repeats, DUPLICATES_REMEDY))
    if not usable:
        raise UserError(f"{dataset.name}: no usable row in the {split} split")


DUPLICATES_REMEDY = (
    "remove the repeated rows, name a column of unique ids (columns.id), or number the rows (columns.id: '')"
)


def inspect_corpus(dataset: Dataset, split: str, *, need_targets: bool = True) -> tuple[Corpus, list[BadRow]]:
    """All good rows with the bad ones in `skipped`, and apart from them the rows that repeat an id.

    For reports: only what makes reading itself impossible is a UserError.
    """
    columns, rows = open_rows(dataset, split, need_targets=need_targets)
    ids: dict[str, Place] = {}
    sources: list[str] = []
    targets: list[str] = []
    skipped: list[BadRow] = []
    duplicates: list[BadRow] = []
    labelled = columns.target is not None
    for row in rows:
        if len(ids) >= row_limit(dataset, split):
            break
        if isinstance(row, BadRow):
            skipped.append(row)
        elif row.id in ids:
            duplicates.append(repeated(row, ids[row.id]))
        else:
            ids[row.id] = row.place
            sources.append(row.source)
            targets.append(row.target)
            labelled = labelled and bool(row.target)
    if not labelled:
        targets = [""] * len(ids)
    corpus = Corpus(dataset.name, split, list(ids), sources, targets, columns, skipped, labelled)
    return corpus, duplicates


def open_rows(dataset: Dataset, split: str, *, need_targets: bool = True) -> tuple[Columns, Iterator[Row | BadRow]]:
    """The columns that are read, and the rows of a split one by one, good and bad, in the file's order."""
    rows = _rows(dataset, split)
    ahead = _look_ahead(rows)
    objects = [record for _, record in ahead if isinstance(record, dict)]
    if not objects:
        raise UserError(_nothing_readable(dataset, split, ahead))
    columns = find_columns(_wanted(dataset), objects, dataset.name, need_targets)

    def checked() -> Iterator[Row | BadRow]:
        for index, (place, record) in enumerate(chain(ahead, rows)):
            row = check_record(record, columns, index, need_targets)
            yield BadRow(*place, row) if isinstance(row, str) else Row(place, *row)

    return columns, checked()


def row_limit(dataset: Dataset, split: str) -> float:
    """How many usable rows of a split are read: as `train_rows` and its like say, else all."""
    return getattr(dataset, f"{split}_rows", None) or math.inf


def repeated(row: Row, first: Place) -> BadRow:
    """A row whose id stood at `first` already."""
    return BadRow(*row.place, f"id {row.id!r} is also that of {':'.join(map(str, first))}")


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
    return _listed("rows that cannot be used", bad, len(bad), remedy)


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


def _listed(what: str, rows: Sequence[BadRow], count: int, remedy: str, shown: int = 5) -> str:
    lines = [str(row) for row in rows[:shown]]
    if count > shown:
        lines.append(f"... and {count - shown} more")
    return f"{count} {what}; {remedy}\n  " + "\n  ".join(lines)
