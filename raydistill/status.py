"""`raydistill status`: every sweep, run and label job, and what is running."""

import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from raydistill._app import make_app, run_app
from raydistill.core.console import print_json, print_text
from raydistill.core.paths import raydistill_home
from raydistill.results.status import format_statuses, read_statuses

app = make_app()
CLEAR_SCREEN = "\033[H\033[2J"


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(help="only jobs of this name")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="print again until Ctrl-C")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="seconds between two prints of --watch")] = 5.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="print a JSON object on stdout, and with --watch one per line")
    ] = False,
) -> None:
    """Print the state of every sweep, run and label job under the home, running ones first.

    A job is running while its process exists, and interrupted if nobody works on it and it is not finished: the same
    command resumes it. Processes of other machines that share the folder are not checked.

    Examples:

        raydistill status

        raydistill status my-news --watch
    """
    home = raydistill_home()
    try:
        while True:
            _print(home, name, as_json, clear=watch and sys.stdout.isatty())
            if not watch:
                return
            time.sleep(interval)
    except KeyboardInterrupt:
        if not watch:
            raise


def _print(home: Path, name: str | None, as_json: bool, clear: bool) -> None:
    jobs = read_statuses(home, name)
    if as_json:
        print_json({"home": str(home), "jobs": [job.model_dump(mode="json") for job in jobs]}, True)
        return
    title = f"{home}, {datetime.now():%H:%M:%S}\n\n" if clear else ""
    print_text(f"{CLEAR_SCREEN if clear else ''}{title}{format_statuses(jobs, home)}")


def main() -> None:
    """Run the command."""
    run_app(app)


if __name__ == "__main__":
    from raydistill.status import main as entry

    entry()
