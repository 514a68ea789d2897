"""Rows out of files: JSON, CSV, TSV, Parquet and pairs of .source/.target, most of them also gzipped.

A reader yields `(row, record)`: the row is counted from 1 as an editor does (the line, where there are lines),
and the record is an object, or a text that says why the row cannot be read.
"""

import csv
import difflib
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO

from raydistill.core.errors import UserError
from raydistill.core.files import UNFIT, is_there

Record = dict[str, Any] | str
Rows = Iterator[tuple[int, Record]]

PLAIN = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".source", ".target")
EXTENSIONS = (*PLAIN, *(f"{e}.gz" for e in PLAIN if e != ".parquet"))
SPLIT_NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
BAD_UTF8 = "invalid UTF-8"
# Bounds on what is held at once, so that a damaged or malicious file cannot take the memory: characters of a line or a
# CSV field, of an array of JSON objects, and bytes of a Parquet row group that unpacks to so many times its size.
MOST_LINE, MOST_ARRAY = 2**26, 2**30
MOST_GROUP, MOST_TIMES = 2**32, 200
TOO_LONG = "longer than {:,} characters"


def extension(path: Path) -> str | None:
    """The known extension that a file name ends in (".jsonl.gz"), or None."""
    return next((e for e in sorted(EXTENSIONS, key=len, reverse=True) if path.name.endswith(e)), None)


def splits_of(name: str) -> dict[str, list[Path]]:
    """The files of each split of a file or folder; UserError where there are none or two sorts of one split.

    A file alone is one split: the one that its name says (`test.jsonl`), else train.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _splits_of_folder(path)
    if not is_there(path):
        raise UserError(f"{path}: no such file or folder{_near(path)}")
    if not path.is_file():
        raise UserError(f"{path}: neither a file nor a folder; write the rows into a file first")
    if extension(path) is None:
        raise UserError(f"{path}: unknown kind of file; known are {', '.join(PLAIN)}, all but Parquet also .gz")
    return {_split_in_name(path) or "train": [path]}


def read_rows(path: Path) -> Rows:
    """The rows of one file. UserError if it is missing, empty of text, cut short or not what its name says."""
    kind = (extension(path) or "").removesuffix(".gz")
    try:
        if kind == ".parquet":
            yield from _parquet(path)
        elif kind in (".csv", ".tsv"):
            yield from _csv(path, "," if kind == ".csv" else "\t")
        elif kind in (".source", ".target"):
            yield from _line_pairs(path)
        else:
            yield from _json(path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged or cut short ({error}); copy or download it again") from None
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file") from None


def _open(path: Path) -> TextIO:
    # Wrong bytes become lone surrogates, so that one bad row does not hide the others; see `_is_utf8`.
    # Only "\n" ends a line: other line breaks of Unicode may stand inside a text.
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="\n")
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n")


def _lines(file: TextIO) -> Iterator[str]:
    """The lines of a file; of one that is too long only the beginning, and more of it than is allowed."""
    while line := file.readline(MOST_LINE + 1):
        yield line
        while len(line) > MOST_LINE and not line.endswith("\n"):
            line = file.readline(MOST_LINE + 1)
            if not line:
                return


def _is_utf8(line: str) -> bool:
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _json(path: Path) -> Rows:
    with _open(path) as file:
        lines = _lines(file)
        first = next((line for line in lines if line.strip()), "")
        more = any(line.strip() for line in lines)
    # A line that is a whole array, with other lines after it, is a bad row of a file of lines.
    if first.lstrip().startswith("[") and not (more and _is_json(first)):
        yield from _json_array(path)
        return
    with _open(path) as file:
        for number, line in enumerate(_lines(file), 1):
            if line.strip():
                yield number, _json_line(line)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _json_line(line: str) -> Record:
    if len(line) > MOST_LINE:
        return TOO_LONG.format(MOST_LINE)
    if not _is_utf8(line):
        return BAD_UTF8
    try:
        # with its line end, an error at the end of the line would be placed at the start of the next
        record = json.loads(line.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        return f"invalid JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        return f"invalid JSON: {error}"
    return record if isinstance(record, dict) else f"not a JSON object but {kind_of(record)}"


def _json_array(path: Path) -> Rows:
    with _open(path) as file:
        text = file.read(MOST_ARRAY + 1)
    if len(text) > MOST_ARRAY:
        raise UserError(f"{path}: an array {TOO_LONG.format(MOST_ARRAY)}; write one object per line")
    if not _is_utf8(text):
        raise UserError(f"{path}: {BAD_UTF8}; save the file as UTF-8")
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: invalid JSON: {error.msg}; expected one object per line or one array of objects"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: invalid JSON: {error}") from None
    for number, record in enumerate(records, 1):
        yield number, record if isinstance(record, dict) else f"not a JSON object but {kind_of(record)}"


def _csv(path: Path, delimiter: str) -> Rows:
    csv.field_size_limit(MOST_LINE)  # the default refuses documents over 128 KiB
    with _open(path) as file:
        reader = csv.reader(_lines(file), delimiter=delimiter, strict=True)
        at = 1
        try:
            header = next(reader, [])
            repeated = sorted({name for name in header if header.count(name) > 1})
            if repeated:
                raise UserError(f"{path}:1: columns named twice: {', '.join(repeated)}")
            at = reader.line_num + 1
            for fields in reader:
                if fields:
                    yield at, _csv_record(header, fields)
                at = reader.line_num + 1
        except csv.Error as error:
            hint = 'a quote within a quoted field is written twice ("")'
            raise UserError(f"{path}:{at}: not valid CSV: {error}; {hint}") from None


def _csv_record(header: list[str], fields: list[str]) -> Record:
    if not all(map(_is_utf8, fields)):
        return BAD_UTF8
    if len(fields) != len(header):
        return f"{len(fields)} fields where the header has {len(header)}"
    return dict(zip(header, fields, strict=True))


def _line_pairs(path: Path) -> Rows:
    kind = extension(path) or ""
    stem = path.name.removesuffix(kind)
    source, target = path.with_name(stem + ".source"), path.with_name(stem + ".target")
    source, target = (
        p if p.exists() or not (gz := p.with_name(p.name + ".gz")).exists() else gz for p in (source, target)
    )
    if not target.exists():
        yield from _lines_alone(source)
        return
    counts = [0, 0]
    with _open(source) as sources, _open(target) as targets:
        for number, pair in enumerate(zip_longest(_lines(sources), _lines(targets)), 1):
            for side in (0, 1):
                counts[side] += pair[side] is not None
            if None in pair:
                continue
            texts = [text.rstrip("\r\n") for text in pair]
            yield number, _fault_of(*texts) or dict(zip(("source", "target"), texts, strict=True))
    if counts[0] != counts[1]:
        raise UserError(
            f"{source} has {counts[0]} lines and {target} has {counts[1]}; line n of one belongs to line n of "
            "the other, so the counts must be equal"
        )


def _lines_alone(source: Path) -> Rows:
    with _open(source) as file:
        for number, line in enumerate(_lines(file), 1):
            yield number, _fault_of(line) or {"source": line.rstrip("\r\n")}


def _fault_of(*lines: str) -> str | None:
    if not all(map(_is_utf8, lines)):
        return BAD_UTF8
    return TOO_LONG.format(MOST_LINE) if max(map(len, lines)) > MOST_LINE else None


def _parquet(path: Path) -> Rows:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from None
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            _check_groups(path, file.metadata)
            for batch in file.iter_batches(batch_size=1000):
                for record in _batch_rows(batch):
                    number += 1
                    yield number, record
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (pa.ArrowException, *UNFIT) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a whole Parquet file ({reason}); copy or download it again") from None


def _check_groups(path: Path, about: Any) -> None:
    """UserError where a row group says that it unpacks to far more than text ever does."""
    for group in map(about.row_group, range(about.num_row_groups)):
        packed = sum(group.column(i).total_compressed_size for i in range(group.num_columns))
        if group.total_byte_size > max(MOST_GROUP, MOST_TIMES * packed):
            raise UserError(
                f"{path}: a row group of {packed:,} bytes says that it unpacks to {group.total_byte_size:,}; if that "
                f"is right, write the file with smaller row groups"
            )


def _batch_rows(batch: Any) -> Iterator[Record]:
    try:
        yield from batch.to_pylist()
    except UNFIT:
        for i in range(batch.num_rows):
            try:
                yield batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield BAD_UTF8
            except UNFIT as error:  # such as a date in the year 300,000
                yield f"a value that cannot be read ({error})"


def kind_of(value: Any) -> str:
    """What a value is, in words for a user."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), "a text" if isinstance(value, str) else type(value).__name__)


def _split_in_name(path: Path) -> str | None:
    stem = path.name.removesuffix(extension(path) or "")
    word = re.split(r"[.\-_]", stem)[0]
    return next((split for split, names in SPLIT_NAMES.items() if word in names), None)


_SHARD = re.compile(r"^(?P<word>[a-z]+)(?:[.\-_](?P<number>\d+)(?:-of-(?P<count>\d+))?)?$")


def _splits_of_folder(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, dict[tuple[str, str], list[tuple[int, Path]]]] = {}
    for path in sorted(folder.iterdir()):
        kind = extension(path)
        match = _SHARD.match(path.name.removesuffix(kind or ""))
        split = next((s for s, names in SPLIT_NAMES.items() if match and match["word"] in names), None)
        if kind is None or match is None or split is None or kind.startswith(".target"):
            continue
        # Whole files and shards of one name and kind belong together; two such groups are ambiguous.
        shards = found.setdefault(split, {}).setdefault((match["word"] + bool(match["number"]) * "-*", kind), [])
        shards.append((int(match["number"] or 0), path))
        _check_shard_count(path, match["count"])
    if not found:
        names = ", ".join(sorted(p.name for p in folder.iterdir() if p.name[0] != ".")[:8]) or "nothing"
        raise UserError(
            f"{folder}: no train, validation or test file here (it holds {names}); "
            "expected names such as train.jsonl, validation.csv.gz, test.parquet or train.source with train.target"
        )
    for split, groups in found.items():
        if len(groups) > 1:
            files = " and ".join(shards[0][1].name for shards in list(groups.values())[:2])
            raise UserError(f"{folder}: {files} both look like the {split} split; leave only one here")
    return {
        split: [path for _, path in sorted(next(iter(found[split].values())))]
        for split in SPLIT_NAMES
        if split in found
    }


def _check_shard_count(path: Path, count: str | None) -> None:
    if count is None:
        return
    width = len(count)
    for number in range(int(count)):
        other = re.sub(r"\d+-of-", f"{number:0{width}d}-of-", path.name, count=1)
        if not path.with_name(other).exists():
            raise UserError(f"{path.parent}: {other} is missing (of {int(count)} parts)")


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (there is no folder {path.parent})"
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
