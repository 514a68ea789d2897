"""`raydistill status`: every sweep, run and label job, and what is running."""

import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raydistill._app import make_app, run_app
from raydistill.core.console import print_json, print_text
from raydistill.core.paths import raydistill_home
from raydistill.results.status import JobStatus, format_statuses, read_statuses

if TYPE_CHECKING:
    import pandas as pd

app = make_app()
CLEAR_SCREEN = "\033[H\033[2J"


@dataclass(frozen=True)
class Statuses:
    """The result of `status`: the jobs, running ones first, then the newest first."""

    jobs: list[JobStatus]

    def to_pandas(self) -> "pd.DataFrame":
        """One row per job."""
        import pandas as pd

        return pd.DataFrame([job.model_dump(mode="json") for job in self.jobs])


def status(name: str | None = None) -> Statuses:
    """The state of every sweep, run and label job under the home, or of the jobs with a name.

    Args:
        name: Only jobs of this name.

    Raises:
        UserError: There is no job of this name.
    """
    return Statuses(read_statuses(raydistill_home(), name))


@app.command("status")
def status_command(
    name: Annotated[str | None, typer.Argument(help="only jobs of this name")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="print again until Ctrl-C")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="seconds between two prints of --watch")] = 5.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="print a JSON object on stdout, and with --watch one per line")
    ] = False,
) -> None:
    """Print the state of every sweep, run and label job under the home, running ones first.

    A job is running while its process exists. A job is interrupted if it has no process and is neither finished nor
    failed; the command that started the job resumes the job. Processes of other machines that share the folder are not
    checked.

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
    jobs = status(name).jobs
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
