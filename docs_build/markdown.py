"""Markdown of generated pages."""

from collections.abc import Sequence


def code(text: str) -> str:
    """Text as code."""
    return f"`{text}`"


def cell(text: str) -> str:
    """Text as one cell of a table: on one line, with escaped bars."""
    return " ".join(text.split()).replace("|", "\\|")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
