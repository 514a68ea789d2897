"""Tables of the report, and how a figure becomes a cell of one: nothing is printed that was not measured."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from raydistill.evaluation.metrics import Comparison

SWEEP = "sweep"


@dataclass(frozen=True)
class Table:
    """A table of the paper, ours and its figures side by side. Cells are text, "" where there is no figure."""

    name: str
    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""


def without_sweep(table: Table) -> Table:
    """The table less its column of sweeps: where there is only one, it says nothing."""
    if SWEEP not in table.header:
        return table
    i = table.header.index(SWEEP)
    return replace(table, header=_less(table.header, i), rows=[_less(row, i) for row in table.rows])


def number(value: float | None, digits: int, sign: bool = False) -> str:
    """A cell: the figure, or nothing."""
    return "" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def interval(found: Comparison, seeds: int) -> str:
    """A difference with its interval and the number of seeds behind it."""
    return f"{found.difference:+.2f} [{found.low:+.2f}, {found.high:+.2f}], n = {seeds}"


def beside(*names: str) -> list[str]:
    """Our column and the paper's for each name."""
    return [header for name in names for header in (name, f"{name} (paper)")]


def _less(cells: Sequence[str], i: int) -> list[str]:
    return [*cells[:i], *cells[i + 1 :]]
