"""`raydistill report SWEEP...`: the paper's tables and figures from sweeps, next to the published values."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raydistill._app import make_app, run_app
from raydistill.core.console import print_json, print_text
from raydistill.core.paths import raydistill_home

if TYPE_CHECKING:
    from raydistill.paper.tables import Table

FIGURE_CAPTIONS = {
    "figure1.png": "Figure 1: the best student of each size, test score against speed-up",
    "figure2.png": "Figure 2: validation loss by initialisation of the decoder",
}
INTRODUCTION = "Columns marked (paper) are the published values; an empty cell has no value."

app = make_app()


@app.command()
def report(
    sweeps: Annotated[list[str], typer.Argument(help="sweeps' folders, or their names under outputs/sweeps")],
    output: Annotated[
        Path | None, typer.Option(help="output folder; default: outputs/reports/NAMES, overwritten each time")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="end with one JSON object on stdout")] = False,
) -> None:
    """Print and write Tables 2 to 10 and Figures 1 and 2 of the paper from sweeps (Markdown, CSV, PNG).

    Every measured value is next to the published one; a cell without a value is empty. The report reads the trials'
    folders each time and includes all finished trials.

    Example: `raydistill report mini_table5 mini_table9 mini_table10`
    """
    from raydistill.cluster import snapshots
    from raydistill.paper.plots import plot_figure_1, plot_figure_2
    from raydistill.paper.seed_groups import load_seed_groups
    from raydistill.paper.tables import describe_sweeps, make_tables
    from raydistill.results.records import find_sweep

    snapshots.pull_records(*(raydistill_home() / "sweeps" / name for name in sweeps))
    folders = list(dict.fromkeys(find_sweep(name) for name in sweeps))
    loaded_sweeps, seed_groups = load_seed_groups(folders)
    tables = make_tables(loaded_sweeps, seed_groups)
    folder = output or raydistill_home() / "reports" / "-".join(folder.name for folder in folders)
    plot_figure_1(folder / "figure1.png", seed_groups)
    figures = ["figure1.png", *(["figure2.png"] if plot_figure_2(folder / "figure2.png", seed_groups) else [])]
    sweep_lines = describe_sweeps(loaded_sweeps)
    write_tables(folder, tables, figures, sweep_lines)
    print_text("\n".join(sweep_lines) + "\n", as_json)
    for table in tables:
        print_text(f"{render_markdown(table)}\n", as_json)
    print_text(f"report: {folder / 'report.md'}, a CSV file for each table, {', '.join(figures)}", as_json)
    table_records = {t.name: {"title": t.title, "header": t.header, "rows": t.rows} for t in tables}
    print_json({"folder": str(folder), "figures": figures, "tables": table_records}, as_json)


def write_tables(folder: Path, tables: "list[Table]", figures: list[str], sweep_lines: list[str]) -> None:
    """Write report.md, which describes the sweeps and shows all tables and figures, and one CSV file per table."""
    import csv
    import io

    from raydistill.core.files import write_atomic

    sections = [
        "# The tables of Pre-trained Summarization Distillation, from our sweeps",
        "\n".join(f"- {line}" for line in sweep_lines),
        INTRODUCTION,
        *map(render_markdown, tables),
        *(f"![{FIGURE_CAPTIONS[name]}]({name})" for name in figures),
    ]
    write_atomic(folder / "report.md", ("\n\n".join(sections) + "\n").encode())
    for table in tables:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([table.header, *table.rows])
        write_atomic(folder / f"{table.name}.csv", text.getvalue().encode())


def render_markdown(table: "Table") -> str:
    """A table in Markdown under its title, followed by its note."""
    from raydistill.results.tables import markdown_table

    note = f"\n\n{table.note}" if table.note else ""
    return f"## {table.title}\n\n{markdown_table(table.header, table.rows)}{note}"


def main() -> None:
    """Run the command."""
    run_app(app)


if __name__ == "__main__":
    from raydistill.report import main as entry

    entry()
