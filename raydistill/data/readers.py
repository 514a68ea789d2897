"""Readers of JSON, CSV, TSV, Parquet and pairs of .source and .target files; all but Parquet also with gzip.

A reader yields `(row, record)`. The row is counted from 1; it is the line number if the format has lines. The record
is a mapping, or a string with the reason why the row cannot be read.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO

from raydistill.core.errors import UserError
from raydistill.core.files import PARSE_ERRORS, path_exists
from raydistill.core.suggestions import closest_name

RecordOrError = dict[str, Any] | str
NumberedRecords = Iterator[tuple[int, RecordOrError]]

UNCOMPRESSED_EXTENSIONS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".source", ".target")
EXTENSIONS = (*UNCOMPRESSED_EXTENSIONS, *(f"{e}.gz" for e in UNCOMPRESSED_EXTENSIONS if e != ".parquet"))
SPLIT_ALIASES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
INVALID_UTF8 = "invalid UTF-8"
# Limits that protect the memory from corrupt and malicious files: characters of a line or a CSV field, characters of an
# array of JSON objects, and the uncompressed bytes of a Parquet row group if its compression ratio is implausible.
MAX_LINE_CHARS, MAX_ARRAY_CHARS = 2**26, 2**30
MAX_ROW_GROUP_BYTES, MAX_COMPRESSION_RATIO = 2**32, 200
TOO_LONG = "longer than {:,} characters"


def known_extension(path: Path) -> str | None:
    """The supported extension of a file name, such as ".jsonl.gz"; None if there is none."""
    return next((e for e in sorted(EXTENSIONS, key=len, reverse=True) if path.name.endswith(e)), None)


def find_split_files(name: str, other_split: str | None = None) -> dict[str, list[Path]]:
    """The files of each split of a file or folder.

    A single file is one split: the one in its name (`test.jsonl`), else train. In a folder, `other_split` is a
    further split, whose files are named after it.

    Raises:
        UserError: There are no files, the file type is not supported, or several files could be the same split.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _find_split_files_in_folder(path, other_split)
    if not path_exists(path):
        raise UserError(f"{path}: no such file or folder{_similar_name_hint(path)}")
    if not path.is_file():
        raise UserError(f"{path}: neither a file nor a folder; write the rows to a file first")
    if known_extension(path) is None:
        raise UserError(
            f"{path}: unsupported file type; supported: {', '.join(UNCOMPRESSED_EXTENSIONS)}, "
            "all but .parquet also with .gz"
        )
    return {_split_from_name(path) or "train": [path]}


def read_records(path: Path) -> NumberedRecords:
    """Yield the rows of one file; UserError if the file is missing, truncated or in another format."""
    extension = (known_extension(path) or "").removesuffix(".gz")
    try:
        if extension == ".parquet":
            yield from _read_parquet(path)
        elif extension in (".csv", ".tsv"):
            yield from _read_csv(path, "," if extension == ".csv" else "\t")
        elif extension in (".source", ".target"):
            yield from _read_line_pairs(path)
        else:
            yield from _read_json(path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: corrupt or truncated ({error}); copy or download it again") from None
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file") from None


def _open_text(path: Path) -> TextIO:
    # Invalid bytes become lone surrogates, so that one bad row does not prevent the reading of others; see `is_utf8`.
    # Only "\n" ends a line: texts may contain other line breaks of Unicode.
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="\n")
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n")


def _read_lines(file: TextIO) -> Iterator[str]:
    """Yield the lines of a file; lines that are too long are cut to `MAX_LINE_CHARS` + 1 characters."""
    while line := file.readline(MAX_LINE_CHARS + 1):
        yield line
        while len(line) > MAX_LINE_CHARS and not line.endswith("\n"):
            line = file.readline(MAX_LINE_CHARS + 1)
            if not line:
                return


def _read_json(path: Path) -> NumberedRecords:
    with _open_text(path) as file:
        lines = _read_lines(file)
        first_line = next((line for line in lines if line.strip()), "")
        has_more_lines = any(line.strip() for line in lines)
    # A line with a complete array, followed by other lines, is a bad row of a file with one object per line.
    if first_line.lstrip().startswith("[") and not (has_more_lines and _is_valid_json(first_line)):
        yield from _read_json_array(path)
        return
    with _open_text(path) as file:
        for number, line in enumerate(_read_lines(file), 1):
            if line.strip():
                yield number, _parse_json_line(line)


def _is_valid_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parse_json_line(line: str) -> RecordOrError:
    if len(line) > MAX_LINE_CHARS:
        return TOO_LONG.format(MAX_LINE_CHARS)
    if not is_utf8(line):
        return INVALID_UTF8
    try:
        # Without its line end: otherwise an error at the end of the line is reported for the next line.
        record = json.loads(line.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        return f"invalid JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        return f"invalid JSON: {error}"
    return record if isinstance(record, dict) else f"expected a JSON object, got {describe_type(record)}"


def _read_json_array(path: Path) -> NumberedRecords:
    with _open_text(path) as file:
        text = file.read(MAX_ARRAY_CHARS + 1)
    if len(text) > MAX_ARRAY_CHARS:
        raise UserError(f"{path}: an array {TOO_LONG.format(MAX_ARRAY_CHARS)}; write one object per line")
    if not is_utf8(text):
        raise UserError(f"{path}: {INVALID_UTF8}; save the file as UTF-8")
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: invalid JSON: {error.msg}; expected one object per line or one array of objects"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: invalid JSON: {error}") from None
    for number, record in enumerate(records, 1):
        yield number, record if isinstance(record, dict) else f"expected a JSON object, got {describe_type(record)}"


def _read_csv(path: Path, delimiter: str) -> NumberedRecords:
    csv.field_size_limit(MAX_LINE_CHARS)  # the default of 128 KiB is too low for documents
    with _open_text(path) as file:
        reader = csv.reader(_read_lines(file), delimiter=delimiter, strict=True)
        line = 1
        try:
            header = next(reader, [])
            repeated = sorted({name for name in header if header.count(name) > 1})
            if repeated:
                raise UserError(f"{path}:1: duplicate columns: {', '.join(repeated)}")
            line = reader.line_num + 1
            for fields in reader:
                if fields:
                    yield line, _parse_csv_fields(header, fields)
                line = reader.line_num + 1
        except csv.Error as error:
            hint = 'a quote within a quoted field is written twice ("")'
            raise UserError(f"{path}:{line}: not valid CSV: {error}; {hint}") from None


def _parse_csv_fields(header: list[str], fields: list[str]) -> RecordOrError:
    if not all(map(is_utf8, fields)):
        return INVALID_UTF8
    if len(fields) != len(header):
        return f"{len(fields)} fields, but the header has {len(header)}"
    return dict(zip(header, fields, strict=True))


def _read_line_pairs(path: Path) -> NumberedRecords:
    stem = path.name.removesuffix(known_extension(path) or "")
    source, target = path.with_name(stem + ".source"), path.with_name(stem + ".target")
    source, target = (
        p if p.exists() or not (gz := p.with_name(p.name + ".gz")).exists() else gz for p in (source, target)
    )
    if not target.exists():
        yield from _read_source_lines(source)
        return
    counts = [0, 0]
    with _open_text(source) as sources, _open_text(target) as targets:
        for number, pair in enumerate(zip_longest(_read_lines(sources), _read_lines(targets)), 1):
            for side in (0, 1):
                counts[side] += pair[side] is not None
            if None in pair:
                continue
            texts = [text.rstrip("\r\n") for text in pair]
            yield number, _line_error(*texts) or dict(zip(("source", "target"), texts, strict=True))
    if counts[0] != counts[1]:
        raise UserError(
            f"{source} has {counts[0]} lines and {target} has {counts[1]}; the numbers must be equal, because lines "
            "are paired by number"
        )


def _read_source_lines(source: Path) -> NumberedRecords:
    with _open_text(source) as file:
        for number, line in enumerate(_read_lines(file), 1):
            yield number, _line_error(line) or {"source": line.rstrip("\r\n")}


def _line_error(*lines: str) -> str | None:
    if not all(map(is_utf8, lines)):
        return INVALID_UTF8
    return TOO_LONG.format(MAX_LINE_CHARS) if max(map(len, lines)) > MAX_LINE_CHARS else None


def _read_parquet(path: Path) -> NumberedRecords:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from None
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            _check_row_group_sizes(path, file.metadata)
            for batch in file.iter_batches(batch_size=1000):
                for record in _batch_records(batch):
                    number += 1
                    yield number, record
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (pa.ArrowException, *PARSE_ERRORS) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a complete Parquet file ({reason}); copy or download it again") from None


def _check_row_group_sizes(path: Path, metadata: Any) -> None:
    """UserError if a row group declares an uncompressed size that is implausible for text."""
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        compressed = sum(group.column(i).total_compressed_size for i in range(group.num_columns))
        if group.total_byte_size > max(MAX_ROW_GROUP_BYTES, MAX_COMPRESSION_RATIO * compressed):
            raise UserError(
                f"{path}: a row group of {compressed:,} bytes declares an uncompressed size of "
                f"{group.total_byte_size:,}; if this is correct, write the file with smaller row groups"
            )


def _batch_records(batch: Any) -> Iterator[RecordOrError]:
    try:
        yield from batch.to_pylist()
    except PARSE_ERRORS:
        for i in range(batch.num_rows):
            try:
                yield batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield INVALID_UTF8
            except PARSE_ERRORS as error:  # for example a date in the year 300,000
                yield f"a value that cannot be read ({error})"


def is_utf8(text: str) -> bool:
    """Whether a string can be encoded as UTF-8, that is, has no lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


_TYPE_NAMES = {
    **{bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "an array", dict: "an object"},
    type(None): "null",
}


def describe_type(value: Any) -> str:
    """The JSON type of a value, with an article, for messages."""
    return _TYPE_NAMES.get(type(value), type(value).__name__)


def _split_from_name(path: Path) -> str | None:
    stem = path.name.removesuffix(known_extension(path) or "")
    return _split_by_alias(re.split(r"[.\-_]", stem)[0])


def _split_by_alias(word: str, other_split: str | None = None) -> str | None:
    known = next((split for split, aliases in SPLIT_ALIASES.items() if word in aliases), None)
    return known or (word if word == other_split else None)


_SHARD_PATTERN = re.compile(r"^(?P<word>[a-z]+)(?:[.\-_](?P<number>\d+)(?:-of-(?P<count>\d+))?)?$")


def _find_split_files_in_folder(folder: Path, other_split: str | None) -> dict[str, list[Path]]:
    """The files of each split, shards in order of their numbers."""
    # split -> (name pattern, extension) -> numbered files. Files of one group belong together.
    groups: dict[str, dict[tuple[str, str], list[tuple[int, Path]]]] = {}
    for path in sorted(folder.iterdir()):
        extension = known_extension(path)
        match = _SHARD_PATTERN.match(path.name.removesuffix(extension or ""))
        split = _split_by_alias(match["word"], other_split) if match else None
        if extension is None or match is None or split is None or extension.startswith(".target"):
            continue
        pattern = match["word"] + bool(match["number"]) * "-*"
        groups.setdefault(split, {}).setdefault((pattern, extension), []).append((int(match["number"] or 0), path))
        _check_all_shards_exist(path, match["count"])
    if not groups:
        names = ", ".join(sorted(p.name for p in folder.iterdir() if p.name[0] != ".")[:8]) or "nothing"
        raise UserError(
            f"{folder}: no train, validation or test file in this folder (it contains {names}); "
            "expected names such as train.jsonl, validation.csv.gz, test.parquet or train.source with train.target"
        )
    for split, split_groups in groups.items():
        if len(split_groups) > 1:
            files = " and ".join(shards[0][1].name for shards in list(split_groups.values())[:2])
            raise UserError(f"{folder}: both {files} could be the {split} split; keep only one of them")
    return {
        split: [path for _, path in sorted(next(iter(groups[split].values())))]
        for split in (*SPLIT_ALIASES, *([other_split] if other_split else []))
        if split in groups
    }


def _check_all_shards_exist(path: Path, count: str | None) -> None:
    if count is None:
        return
    width = len(count)
    for number in range(int(count)):
        name = re.sub(r"\d+-of-", f"{number:0{width}d}-of-", path.name, count=1)
        if not path.with_name(name).exists():
            raise UserError(f"{path.parent}: {name} is missing ({int(count)} shards expected)")


def _similar_name_hint(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (there is no folder {path.parent})"
    similar = closest_name(path.name, (p.name for p in path.parent.iterdir()))
    return f"; did you mean {path.parent / similar}?" if similar else ""
