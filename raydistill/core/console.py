"""Console output: results on stdout, progress on stderr, secrets masked."""

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from raydistill.core.secrets import redact, redact_nested


def print_progress(text: str) -> None:
    """Print one line about work in progress on stderr; stdout is reserved for results."""
    print(redact(text), file=sys.stderr, flush=True)


def print_text(text: str, as_json: bool = False) -> None:
    """Print a result as text: on stdout, or on stderr if stdout is reserved for JSON (`as_json`)."""
    print(redact(text), file=sys.stderr if as_json else sys.stdout, flush=True)


def print_json(result: dict[str, Any], as_json: bool) -> None:
    """Print the result of a command as one JSON object if `as_json`; ValueError for NaN and infinity."""
    if as_json:
        print(json.dumps(redact_nested(result), default=str, allow_nan=False), flush=True)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table: the first column aligned left, the others right."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


class ProgressBar:
    """Progress of long work on stderr: a bar on a terminal, elsewhere a line from time to time.

    `total` and the amounts passed to `advance` are in one unit of work; the notes may count in other units.
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
        """Estimated seconds until completion at the mean speed so far; 0 before the first advance."""
        done = self._done - self._initial
        return (self._total - self._done) * (time.monotonic() - self._start_time) / done if done else 0.0

    def advance(self, amount: float, note: str) -> None:
        """Record completed work; lines are printed after 5 s, then at intervals that grow to 60 s, and at the end."""
        self._done += amount
        note = f"{note}, {format_duration(self.seconds_left)} left"
        if self._rich_progress is not None:
            self._rich_progress.update(self._task, completed=self._done, note=note)
            return
        now = time.monotonic()
        if now >= self._next_line or self._done >= self._total:
            print_progress(f"  {self._label}: {note}")
            self._next_line = now + min(60, 5 + (now - self._start_time) / 10)

    def close(self) -> None:
        """Restore the terminal."""
        if self._rich_progress is not None:
            self._rich_progress.stop()


def format_duration(seconds: float) -> str:
    """A duration such as "1 h 02 min", "3 min 05 s" or "7 s"; "less than 1 s" where it would be zero."""
    if 0 < seconds < 0.5:
        return "less than 1 s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
