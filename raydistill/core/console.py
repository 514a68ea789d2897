"""What every command shares: errors become exit statuses, progress goes to stderr, results to stdout, no secret."""

import errno
import io
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydistill.core.errors import UserError
from raydistill.core.secrets import hidden, hidden_in

if TYPE_CHECKING:
    import typer


def home() -> Path:
    """The folder under which everything is written: $RAYDISTILL_HOME, else ./outputs."""
    return Path(os.environ.get("RAYDISTILL_HOME", "outputs")).absolute()


def make_app() -> "typer.Typer":
    """A typer application as every command uses it."""
    import typer

    return typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)


def run_app(app: "typer.Typer") -> None:
    """Run a command; a `UserError` is printed without a traceback and ends with status 2.

    An `OSError` such as a full disk or a missing permission is the user's to mend too, with status 1.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be UTF-8; stderr is so by itself
    try:
        app()
    except UserError as error:
        # Raised in a Ray task it comes wrapped, with that task's traceback in its text.
        print(f"error: {hidden(str(getattr(error, 'cause', error)))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        print(f"error: {hidden(explained(getattr(error, 'cause', error)))}", file=sys.stderr)
        sys.exit(1)


def explained(error: OSError) -> str:
    """What the system says, and of a full disk which one it is and that nothing is lost."""
    if error.errno != errno.ENOSPC:
        return str(error)
    return (
        f"{error}: the disk of {error.filename or home()} is full. Nothing is lost: free some of it, and run the same "
        f"command again"
    )


def progress(text: str) -> None:
    """One calm line about work under way, to stderr, so that `--json` leaves stdout to the result."""
    print(hidden(text), file=sys.stderr, flush=True)


class Bar:
    """How far long work is, on stderr: a bar on a terminal, elsewhere a calm line now and then.

    `total` and `advance` are in units of work, which need not be what `note` tells of.
    """

    def __init__(self, what: str, total: float, done: float = 0) -> None:
        self._what, self._total, self._done, self._began = what, total, done, done
        self._started = time.monotonic()
        self._next_line = self._started + 5
        self._bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = ("[progress.description]{task.description}", BarColumn(), TextColumn("{task.fields[note]}"))
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(what, total=total, completed=done, note="")

    @property
    def seconds_left(self) -> float:
        """At the speed so far; 0 before anything is done."""
        done = self._done - self._began
        return (self._total - self._done) * (time.monotonic() - self._started) / done if done else 0.0

    def advance(self, work: float, note: str) -> None:
        """Some more work is done; lines come after 5 s and then ever more seldom, and at the end."""
        self._done += work
        note = f"{note}, {_duration(self.seconds_left)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, note=note)
            return
        now = time.monotonic()
        if now >= self._next_line or self._done >= self._total:
            progress(f"  {self._what}: {note}")
            self._next_line = now + min(60, 5 + (now - self._started) / 10)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def show(text: str, as_json: bool = False) -> None:
    """A result for a person: on stdout, or on stderr where stdout is kept for JSON."""
    print(hidden(text), file=sys.stderr if as_json else sys.stdout, flush=True)


def finish(result: dict[str, Any], as_json: bool) -> None:
    """Print the command's result as one JSON object if `--json` was given."""
    if as_json:
        print(json.dumps(hidden_in(result), default=str, allow_nan=False), flush=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain aligned table: the first column to the left, numbers to the right; calm in a log file."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)
