"""Console output: results on stdout, progress on stderr, secrets masked."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from raydistill.core.secrets import redact, redact_nested

_write_progress: Callable[[str], object] | None = None


def print_progress(text: str) -> None:
    """Print one line about work in progress on stderr; stdout is reserved for results."""
    line = redact(text)
    if _write_progress is None:
        print(line, file=sys.stderr, flush=True)
    else:
        _write_progress(line)


@contextmanager
def progress_to(write: Callable[[str], object]) -> Iterator[None]:
    """Context in which `print_progress` passes each line to `write`, in every thread of this process."""
    global _write_progress
    before, _write_progress = _write_progress, write
    try:
        yield
    finally:
        _write_progress = before


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

    Args:
        label: What is done.
        total: Amount of work.
        initial: Amount that was done before.
        delayed: Show nothing about work that ends within 5 s.
    """

    _bar_is_shown = False  # a terminal has one bar; work within this work prints lines

    def __init__(self, label: str, total: float, initial: float = 0, *, delayed: bool = False) -> None:
        self._label, self._total, self._done, self._initial = label, total, initial, initial
        self._start_time = time.monotonic()
        self._next_line = self._start_time + 5
        self._delayed = delayed
        self._rich_progress: Any = None
        self._on_terminal = sys.stderr.isatty() and _write_progress is None and not ProgressBar._bar_is_shown
        if self._on_terminal and not delayed:
            self._show_bar()

    def _show_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = ("[progress.description]{task.description}", BarColumn(), TextColumn("{task.fields[note]}"))
        self._rich_progress = Progress(*columns, console=Console(stderr=True))
        self._rich_progress.start()
        self._task = self._rich_progress.add_task(self._label, total=self._total, completed=self._initial, note="")
        ProgressBar._bar_is_shown = True

    @property
    def seconds_left(self) -> float:
        """Estimated seconds until completion at the mean speed so far; 0 before the first advance."""
        done = self._done - self._initial
        return (self._total - self._done) * (time.monotonic() - self._start_time) / done if done else 0.0

    def advance(self, amount: float, note: str) -> None:
        """Record completed work; lines are printed after 5 s, then at intervals that grow to 60 s, and at the end."""
        self._done += amount
        note = f"{note}, {format_duration(self.seconds_left)} left"
        now = time.monotonic()
        if now >= self._next_line:
            self._delayed = False
            if self._on_terminal and self._rich_progress is None:
                self._show_bar()
        if self._rich_progress is not None:
            self._rich_progress.update(self._task, completed=self._done, note=note)
        elif now >= self._next_line or (self._done >= self._total and not self._delayed):
            print_progress(f"  {self._label}: {note}")
            self._next_line = now + min(60, 5 + (now - self._start_time) / 10)

    def close(self) -> None:
        """Restore the terminal."""
        if self._rich_progress is not None:
            self._rich_progress.stop()
            self._rich_progress, ProgressBar._bar_is_shown = None, False


def format_duration(seconds: float) -> str:
    """A duration such as "1 h 02 min", "3 min 05 s" or "7 s"; "less than 1 s" where it would be zero."""
    if 0 < seconds < 0.5:
        return "less than 1 s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
