"""`raydistill report SWEEP...`: the paper's tables and figures from sweeps, its own figures beside ours."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raydistill.core.console import finish, home, make_app, run_app, show

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
    from raydistill.paper.plots import figure_1, figure_2
    from raydistill.paper.settings import read_settings
    from raydistill.paper.tables import heads, tables
    from raydistill.results.records import open_sweep

    sync.fetch(*(home() / "sweeps" / name for name in sweeps), names=sync.RECORDS)
    folders = list(dict.fromkeys(open_sweep(name) for name in sweeps))
    found, settings = read_settings(folders)
    made = tables(found, settings)
    place = output or home() / "reports" / "-".join(folder.name for folder in folders)
    figure_1(place / "figure1.png", settings)
    figures = ["figure1.png", *(["figure2.png"] if figure_2(place / "figure2.png", settings) else [])]
    about = heads(found)
    write_tables(place, made, figures, about)
    show("\n".join(about) + "\n", as_json)
    for table in made:
        show(f"{as_markdown(table)}\n", as_json)
    show(f"report: {place / 'report.md'}, a CSV file for each table, {', '.join(figures)}", as_json)
    finish(
        {
            "folder": str(place),
            "figures": figures,
            "tables": {t.name: {"title": t.title, "header": t.header, "rows": t.rows} for t in made},
        },
        as_json,
    )


FIGURES = {
    "figure1.png": "Figure 1: the best student of each size, test score against speed-up",
    "figure2.png": "Figure 2: validation loss by what the decoder started from",
}


def write_tables(place: Path, made: "list[Table]", figures: list[str], about: list[str]) -> None:
    """report.md with what is told `about` the sweeps and all tables and pictures, and a CSV file for each table."""
    import csv
    import io

    from raydistill.core.files import write_atomic

    head = "# The tables of Pre-trained Summarization Distillation, from our sweeps\n\n"
    head += "".join(f"- {line}\n" for line in about)
    head += "\nColumns marked (paper) are the paper's own figures; an empty cell has none.\n\n"
    pictures = "".join(f"\n![{FIGURES[name]}]({name})\n" for name in figures)
    write_atomic(place / "report.md", (head + "\n\n".join(map(as_markdown, made)) + "\n" + pictures).encode())
    for table in made:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([table.header, *table.rows])
        write_atomic(place / f"{table.name}.csv", text.getvalue().encode())


def as_markdown(table: "Table") -> str:
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
