"""Numbers and 95 % intervals as the text of table cells."""

from collections.abc import Sequence


def describe_split(split: str) -> str:
    """The rows of a score for texts: "validation", "the selection rows" or "test"."""
    return "the selection rows" if split == "selection" else split


def format_number(value: float | None, digits: int, missing: str = "-", sign: bool = False) -> str:
    """A number with a fixed number of decimals; `missing` for None."""
    return missing if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def format_count(count: int, noun: str) -> str:
    """A number with its noun: "1 trial", "2 trials"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def format_interval(interval: Sequence[float], sign: bool = False) -> str:
    """An interval such as "[9.00, 11.00]"."""
    low, high = interval
    return f"[{format_number(low, 2, sign=sign)}, {format_number(high, 2, sign=sign)}]"


def format_score(value: float | None, interval: Sequence[float] | None) -> str:
    """A score and its interval, such as "10.00 [9.00, 11.00]"; "-" for None."""
    return format_number(value, 2) + (f" {format_interval(interval)}" if interval and value is not None else "")
