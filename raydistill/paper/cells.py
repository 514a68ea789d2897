"""The tables of the report and the text of their cells; a missing value is an empty cell."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from raydistill.evaluation.metrics import Comparison
from raydistill.results.formatting import format_interval, format_number

SWEEP_COLUMN = "sweep"


@dataclass(frozen=True)
class Table:
    """A table of the paper with measured and published values side by side.

    `name` is the file name without extension. Cells are text, "" where there is no value.
    """

    name: str
    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""


def drop_sweep_column(table: Table) -> Table:
    """The table without the column that names the sweep, which a report on one sweep does not need."""
    if SWEEP_COLUMN not in table.header:
        return table
    i = table.header.index(SWEEP_COLUMN)
    return replace(table, header=_drop_cell(table.header, i), rows=[_drop_cell(row, i) for row in table.rows])


def format_cell(value: float | None, digits: int, sign: bool = False) -> str:
    """A number with a fixed number of decimals; "" for None."""
    return format_number(value, digits, missing="", sign=sign)


def format_difference(comparison: Comparison, num_seeds: int) -> str:
    """A difference, its interval and the number of seeds, such as "+3.00 [+2.10, +3.90], n = 1"."""
    interval = format_interval((comparison.low, comparison.high), sign=True)
    return f"{comparison.difference:+.2f} {interval}, n = {num_seeds}"


def paired_headers(*names: str) -> list[str]:
    """For each name the header of the measured column and of the paper's column."""
    return [header for name in names for header in (name, f"{name} (paper)")]


def _drop_cell(cells: Sequence[str], i: int) -> list[str]:
    return [*cells[:i], *cells[i + 1 :]]
