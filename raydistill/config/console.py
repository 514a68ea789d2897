"""What every command shares: errors become exit statuses, progress goes to stderr, results to stdout."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydistill.config.errors import UserError

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
    try:
        app()
    except UserError as error:
        # Raised in a Ray task it comes wrapped, with that task's traceback in its text.
        print(f"error: {getattr(error, 'cause', error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        print(f"error: {getattr(error, 'cause', error)}", file=sys.stderr)
        sys.exit(1)


def progress(text: str) -> None:
    """One calm line about work under way, to stderr, so that `--json` leaves stdout to the result."""
    print(text, file=sys.stderr, flush=True)


def show(text: str, as_json: bool = False) -> None:
    """A result for a person: on stdout, or on stderr where stdout is kept for JSON."""
    print(text, file=sys.stderr if as_json else sys.stdout, flush=True)


def finish(result: dict[str, Any], as_json: bool) -> None:
    """Print the command's result as one JSON object if `--json` was given."""
    if as_json:
        print(json.dumps(result, default=str, allow_nan=False), flush=True)


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
