"""`raydistill report SWEEP...`: the paper's tables and figures from sweeps, its own figures beside ours."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raydistill._app import make_app, run_app
from raydistill.core.console import print_json, print_text
from raydistill.core.paths import raydistill_home

if TYPE_CHECKING:
    from raydistill.paper.tables import Table

app = make_app()


@app.command()
def report(
    sweeps: Annotated[list[str], typer.Argument(help="sweeps' folders, or their names under outputs/sweeps")],
    output: Annotated[
        Path | None, typer.Option(help="the folder to write; default: outputs/reports/NAMES, written anew each time")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="end with one JSON object on stdout")] = False,
) -> None:
    """Print and write Tables 2 to 10 and Figures 1 and 2 of the paper from tracked runs (Markdown, CSV, PNG).

    The paper's own figure stands beside each of ours; a cell without a figure is empty. All is read from the trials'
    folders each time, so a finished trial shows at once.

    Example: `raydistill report mini_table5 mini_table9 mini_table10`
    """
    from raydistill.cluster import sync
    from raydistill.paper.plots import plot_figure_1, plot_figure_2
    from raydistill.paper.seed_groups import load_seed_groups
    from raydistill.paper.tables import describe_sweeps, make_tables
    from raydistill.results.records import find_sweep

    sync.pull(*(raydistill_home() / "sweeps" / name for name in sweeps), patterns=sync.RECORD_PATTERNS)
    folders = list(dict.fromkeys(find_sweep(name) for name in sweeps))
    found, settings = load_seed_groups(folders)
    made = make_tables(found, settings)
    place = output or raydistill_home() / "reports" / "-".join(folder.name for folder in folders)
    plot_figure_1(place / "figure1.png", settings)
    figures = ["figure1.png", *(["figure2.png"] if plot_figure_2(place / "figure2.png", settings) else [])]
    about = describe_sweeps(found)
    write_tables(place, made, figures, about)
    print_text("\n".join(about) + "\n", as_json)
    for table in made:
        print_text(f"{render_markdown(table)}\n", as_json)
    print_text(f"report: {place / 'report.md'}, a CSV file for each table, {', '.join(figures)}", as_json)
    print_json(
        {
            "folder": str(place),
            "figures": figures,
            "tables": {t.name: {"title": t.title, "header": t.header, "rows": t.rows} for t in made},
        },
        as_json,
    )


FIGURE_CAPTIONS = {
    "figure1.png": "Figure 1: the best student of each size, test score against speed-up",
    "figure2.png": "Figure 2: validation loss by what the decoder started from",
}


def write_tables(folder: Path, tables: "list[Table]", figures: list[str], sweep_lines: list[str]) -> None:
    """report.md with what is told `sweep_lines` the sweeps and all tables and pictures, and a CSV file for each
    table."""
    import csv
    import io

    from raydistill.core.files import write_atomic

    head = "# The tables of Pre-trained Summarization Distillation, from our sweeps\n\n"
    head += "".join(f"- {line}\n" for line in sweep_lines)
    head += "\nColumns marked (paper) are the paper's own figures; an empty cell has none.\n\n"
    pictures = "".join(f"\n![{FIGURE_CAPTIONS[name]}]({name})\n" for name in figures)
    write_atomic(folder / "report.md", (head + "\n\n".join(map(render_markdown, tables)) + "\n" + pictures).encode())
    for table in tables:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([table.header, *table.rows])
        write_atomic(folder / f"{table.name}.csv", text.getvalue().encode())


def render_markdown(table: "Table") -> str:
    """A table under its title, with its note."""
    from raydistill.results.tables import markdown_table

    note = f"\n\n{table.note}" if table.note else ""
    return f"## {table.title}\n\n{markdown_table(table.header, table.rows)}{note}"


def main() -> None:
    """The command."""
    run_app(app)


if __name__ == "__main__":
    from raydistill.report import main as entry

    entry()
