"""What the commands share: the typer application, and exit statuses for errors."""

import io
import os
import signal
import sys

import typer

from raydistill.core.errors import TransientError, UserError, describe_os_error
from raydistill.core.secrets import redact

INTERRUPTED = 128 + signal.SIGINT


def make_app() -> typer.Typer:
    """The typer application of a command."""
    return typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)


def run_app(app: typer.Typer) -> None:
    """Run a command, and turn errors that the user can correct into a message and an exit status.

    UserError: status 2. TransientError: status 75, EX_TEMPFAIL of sysexits.h, after which a scheduler can run the same
    command again. OSError, such as a full disk: status 1. Ctrl-C: status 130. Other exceptions keep their traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # File names need not be UTF-8. Python sets this error handler for stderr only.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except UserError as error:
        # Ray wraps an exception of a task, with the task's traceback in the text of the wrapper.
        cause = getattr(error, "cause", error)
        print(f"error: {redact(str(cause))}", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL if isinstance(cause, TransientError) else 2)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer's status after Ctrl-C, which typer reports without a message
            print("interrupted; run the same command again to resume", file=sys.stderr)
        raise
    except OSError as error:
        print(f"error: {redact(describe_os_error(getattr(error, 'cause', error)))}", file=sys.stderr)
        sys.exit(1)
