"""Which columns of a record are source, target and id, and whether what stands in them can be used."""

from collections.abc import Iterator
from typing import Any

from raydistill.config.run import Columns
from raydistill.core.errors import UserError
from raydistill.data.readers import RecordOrError, describe_type

# In the order in which they are tried.
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


def resolve_columns(
    requested: Columns | None, records: list[dict[str, Any]], dataset_name: str, need_targets: bool = True
) -> Columns:
    """The columns to read: those asked for, else known names, judged by some first records.

    The first record that has them decides. UserError lists the columns that exist and the YAML to write.
    """
    for record in records:
        found = _match_columns(record, requested, need_targets)
        if found:
            return found
    exist = list(dict.fromkeys(key for record in records for key in _field_names(record)))
    missing = (
        f"no column {_describe_missing(requested, records, need_targets)}" if requested else "no known pair of columns"
    )
    guess = [*exist, "SOURCE", "TARGET"][:2] if len(exist) == 2 else ["SOURCE", "TARGET"]
    raise UserError(
        f"{dataset_name}: {missing}. Columns that exist: {', '.join(exist) or 'none'}. Name yours in the YAML file: "
        f"dataset: {{name: {dataset_name}, columns: {{source: {guess[0]}, target: {guess[1]}}}}} "
        "(on the command line --source and --target)"
    )


def parse_record(record: RecordOrError, columns: Columns, index: int, need_targets: bool) -> tuple[str, str, str] | str:
    """(id, source, target), or why the row is bad. The target is "" where it is missing and not needed."""
    if isinstance(record, str):
        return record
    row_id: Any = str(index) if columns.id is None else _get_field(record, columns.id)
    if isinstance(row_id, bool) or not isinstance(row_id, str | int) or row_id == "":
        return f"{columns.id}: expected an id (a text or a whole number), found {_describe_value(row_id)}"
    texts = [str(row_id)]
    if not _is_utf8(texts[0]):
        return f"{columns.id}: a lone surrogate, which is no character"
    for name, needed in ((columns.source, True), (columns.target, need_targets)):
        value: Any = _get_field(record, name) if name else None
        reason = _text_error(value)
        if reason and needed:
            return f"{name}: {reason}"
        texts.append("" if reason else value)
    return texts[0], texts[1], texts[2]


def _match_columns(record: dict[str, Any], requested: Columns | None, need_targets: bool) -> Columns | None:
    known_id = next((name for name in KNOWN_ID_COLUMNS if name in record), None)
    if requested:
        needed = [requested.source, *([requested.target] if requested.target and need_targets else [])]
        needed += [requested.id] if requested.id else []
        target = requested.target if requested.target and _has_field(record, requested.target) else None
        if need_targets and requested.target is None:
            target = next((t for s, t in KNOWN_COLUMN_PAIRS if s == requested.source and t in record), None)
            if target is None:
                return None
        row_id = known_id if requested.id is None else requested.id or None
        return Columns(source=requested.source, target=target, id=row_id) if _has_all_fields(record, needed) else None
    pair = record.get("translation")
    if isinstance(pair, dict) and len(pair) == 2:
        source, target = pair
        return Columns(source=f"translation.{source}", target=f"translation.{target}", id=known_id)
    for source, target in KNOWN_COLUMN_PAIRS:
        if source in record and target in record:
            return Columns(source=source, target=target, id=known_id)
    alone = next((source for source, _ in KNOWN_COLUMN_PAIRS if source in record), None)
    return Columns(source=alone, id=known_id) if alone and not need_targets else None


def _describe_missing(requested: Columns, records: list[dict[str, Any]], need_targets: bool) -> str:
    names = [requested.source, requested.target if need_targets else None, requested.id]
    absent = [name for name in names if name and not any(_has_field(record, name) for record in records)]
    return " and no column ".join(repr(name) for name in absent) or "for the target"


def _text_error(value: Any) -> str | None:
    if not isinstance(value, str):
        return f"expected a text, found {_describe_value(value)}"
    if not value.strip():
        return "empty"
    return None if _is_utf8(value) else "a lone surrogate, which is no character"


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


_ABSENT = object()


def _describe_value(value: Any) -> str:
    return "no such field" if value is _ABSENT else "an empty text" if value == "" else describe_type(value)


def _get_field(record: dict[str, Any], name: str) -> Any:
    """A field by its name; where there is none, the dots of the name lead into nested objects."""
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


def _has_all_fields(record: dict[str, Any], names: list[str]) -> bool:
    return all(_has_field(record, name) for name in names)


def _field_names(record: dict[str, Any]) -> Iterator[str]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from (f"{key}.{inner}" for inner in value)
        else:
            yield str(key)
