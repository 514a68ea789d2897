"""The source, target and id columns of a record: detection, and validation of their values."""

from collections.abc import Iterator
from typing import Any

from raydistill.config.run import Columns
from raydistill.core.errors import UserError
from raydistill.data.readers import RecordOrError, describe_type, is_utf8

# Pairs of source and target columns, in the order in which they are tried.
KNOWN_COLUMN_PAIRS = (
    ("document", "summary"),
    ("article", "highlights"),
    ("dialogue", "summary"),
    ("source", "target"),
    ("src", "tgt"),
    ("text", "summary"),
    ("input", "output"),
)
KNOWN_ID_COLUMNS = ("id", "fname")
LONE_SURROGATE = "invalid Unicode (lone surrogate)"


def resolve_columns(
    requested: Columns | None, records: list[dict[str, Any]], dataset_name: str, need_targets: bool = True
) -> Columns:
    """Determine the columns to read, from the first of `records` that has them.

    Args:
        requested: Columns from the configuration; None: detect known names.
        records: The first records of the data set.
        dataset_name: Named in the message.
        need_targets: Whether a target column is required.

    Raises:
        UserError: No record has the columns. The message lists the existing columns and the YAML that names columns.
    """
    for record in records:
        columns = _match_requested(record, requested, need_targets) if requested else _match_known(record, need_targets)
        if columns:
            return columns
    existing = list(dict.fromkeys(name for record in records for name in _field_names(record)))
    missing = (
        f"no column {_describe_missing(requested, records, need_targets)}" if requested else "no known pair of columns"
    )
    guess = existing if len(existing) == 2 else ["SOURCE", "TARGET"]
    raise UserError(
        f"{dataset_name}: {missing}. Columns that exist: {', '.join(existing) or 'none'}. Name yours in the YAML file: "
        f"dataset: {{name: {dataset_name}, columns: {{source: {guess[0]}, target: {guess[1]}}}}} "
        "(on the command line --source and --target)"
    )


def parse_record(record: RecordOrError, columns: Columns, index: int, need_targets: bool) -> tuple[str, str, str] | str:
    """The `(id, source, target)` of a record, or the reason why the record cannot be used.

    Args:
        record: A record, or an error of the reader, which is returned.
        columns: The columns to read.
        index: The id if there is no id column.
        need_targets: If False, an unusable target becomes "".
    """
    if isinstance(record, str):
        return record
    row_id: Any = str(index) if columns.id is None else _get_field(record, columns.id)
    if isinstance(row_id, bool) or not isinstance(row_id, str | int) or row_id == "":
        return f"{columns.id}: expected an id (a string or an integer), got {_describe_value(row_id)}"
    texts = [str(row_id)]
    if not is_utf8(texts[0]):
        return f"{columns.id}: {LONE_SURROGATE}"
    for name, is_needed in ((columns.source, True), (columns.target, need_targets)):
        value: Any = _get_field(record, name) if name else None
        reason = _text_error(value)
        if reason and is_needed:
            return f"{name}: {reason}"
        texts.append("" if reason else value)
    return texts[0], texts[1], texts[2]


def is_blank(record: RecordOrError, columns: Columns) -> bool:
    """Whether the source or the target of a record is a string of white space."""
    if isinstance(record, str):
        return False
    values = [_get_field(record, name) for name in (columns.source, columns.target) if name]
    return any(isinstance(value, str) and not value.strip() for value in values)


def _match_requested(record: dict[str, Any], requested: Columns, need_targets: bool) -> Columns | None:
    """The requested columns if the record has them; absent names are completed with known ones."""
    target = requested.target
    if need_targets and target is None:
        target = next((t for s, t in KNOWN_COLUMN_PAIRS if s == requested.source and t in record), None)
        if target is None:
            return None
    needed = [requested.source, target if need_targets else None, requested.id]
    if not all(_has_field(record, name) for name in needed if name):
        return None
    if target and not _has_field(record, target):
        target = None
    row_id = _known_id(record) if requested.id is None else requested.id or None
    return Columns(source=requested.source, target=target, id=row_id)


def _match_known(record: dict[str, Any], need_targets: bool) -> Columns | None:
    """Known columns of a record: a `translation` object of two languages, or a pair of `KNOWN_COLUMN_PAIRS`."""
    translation = record.get("translation")
    if isinstance(translation, dict) and len(translation) == 2:
        source, target = translation
        return Columns(source=f"translation.{source}", target=f"translation.{target}", id=_known_id(record))
    for source, target in KNOWN_COLUMN_PAIRS:
        if source in record and target in record:
            return Columns(source=source, target=target, id=_known_id(record))
    if need_targets:
        return None
    source = next((source for source, _ in KNOWN_COLUMN_PAIRS if source in record), None)
    return Columns(source=source, id=_known_id(record)) if source else None


def _known_id(record: dict[str, Any]) -> str | None:
    return next((name for name in KNOWN_ID_COLUMNS if name in record), None)


def _describe_missing(requested: Columns, records: list[dict[str, Any]], need_targets: bool) -> str:
    names = [requested.source, requested.target if need_targets else None, requested.id]
    absent = [name for name in names if name and not any(_has_field(record, name) for record in records)]
    return " and no column ".join(repr(name) for name in absent) or "for the target"


def _text_error(value: Any) -> str | None:
    if not isinstance(value, str):
        return "missing field" if value is _ABSENT else f"expected a string, got {_describe_value(value)}"
    if not value.strip():
        return "empty"
    return None if is_utf8(value) else LONE_SURROGATE


_ABSENT = object()


def _describe_value(value: Any) -> str:
    return "no such field" if value is _ABSENT else "an empty string" if value == "" else describe_type(value)


def _get_field(record: dict[str, Any], name: str) -> Any:
    """The value of a field, else of nested objects by the dots in its name; `_ABSENT` if there is none."""
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return _ABSENT
        value = value[part]
    return value


def _has_field(record: dict[str, Any], name: str) -> bool:
    return _get_field(record, name) is not _ABSENT


def _field_names(record: dict[str, Any]) -> Iterator[str]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from (f"{key}.{nested}" for nested in value)
        else:
            yield str(key)
