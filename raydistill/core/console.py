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
from raydistill.core.secrets import redact, redact_nested

if TYPE_CHECKING:
    import typer


def raydistill_home() -> Path:
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
        print(f"error: {redact(str(getattr(error, 'cause', error)))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        print(f"error: {redact(describe_os_error(getattr(error, 'cause', error)))}", file=sys.stderr)
        sys.exit(1)


def describe_os_error(error: OSError) -> str:
    """What the system says, and of a full disk which one it is and that nothing is lost."""
    if error.errno != errno.ENOSPC:
        return str(error)
    return (
        f"{error}: the disk of {error.filename or raydistill_home()} is full. Nothing is lost: free some of it, and "
        f"run the same "
        f"command again"
    )


def print_progress(text: str) -> None:
    """One calm line about work under way, to stderr, so that `--json` leaves stdout to the result."""
    print(redact(text), file=sys.stderr, flush=True)


class ProgressBar:
    """How far long work is, on stderr: a bar on a terminal, elsewhere a calm line now and then.

    `total` and `advance` are in units of work, which need not be what `note` tells of.
    """

    def __init__(self, label: str, total: float, initial: float = 0) -> None:
        self._label, self._total, self._done, self._initial = label, total, initial, initial
        self._start_time = time.monotonic()
        self._next_line = self._start_time + 5
        self._rich_progress: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = ("[progress.description]{task.description}", BarColumn(), TextColumn("{task.fields[note]}"))
            self._rich_progress = Progress(*columns, console=Console(stderr=True))
            self._rich_progress.start()
            self._task = self._rich_progress.add_task(label, total=total, completed=initial, note="")

    @property
    def seconds_left(self) -> float:
        """At the speed so far; 0 before anything is done."""
        done = self._done - self._initial
        return (self._total - self._done) * (time.monotonic() - self._start_time) / done if done else 0.0

    def advance(self, amount: float, note: str) -> None:
        """Some more work is done; lines come after 5 s and then ever more seldom, and at the end."""
        self._done += amount
        note = f"{note}, {_format_duration(self.seconds_left)} left"
        if self._rich_progress is not None:
            self._rich_progress.update(self._task, completed=self._done, note=note)
            return
        now = time.monotonic()
        if now >= self._next_line or self._done >= self._total:
            print_progress(f"  {self._label}: {note}")
            self._next_line = now + min(60, 5 + (now - self._start_time) / 10)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._rich_progress is not None:
            self._rich_progress.stop()


def _format_duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def print_text(text: str, as_json: bool = False) -> None:
    """A result for a person: on stdout, or on stderr where stdout is kept for JSON."""
    print(redact(text), file=sys.stderr if as_json else sys.stdout, flush=True)


def print_json(result: dict[str, Any], as_json: bool) -> None:
    """Print the command's result as one JSON object if `--json` was given."""
    if as_json:
        print(json.dumps(redact_nested(result), default=str, allow_nan=False), flush=True)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain aligned table: the first column to the left, numbers to the right; calm in a log file."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)
