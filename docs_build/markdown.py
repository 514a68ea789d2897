"""Markdown elements of generated pages."""

from collections.abc import Sequence


def code(text: str) -> str:
    """Inline code."""
    return f"`{text}`"


def cell(text: str) -> str:
    """The text of a table cell: one line, with escaped bars."""
    return " ".join(text.split()).replace("|", "\\|")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
