"""Which columns of a record are source, target and id, and whether what stands in them can be used."""

from collections.abc import Iterator
from typing import Any

from raydistill.config.run import Columns
from raydistill.core.errors import UserError
from raydistill.data.readers import Record, kind_of

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


def check_record(record: Record, columns: Columns, index: int, need_targets: bool) -> tuple[str, str, str] | str:
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
