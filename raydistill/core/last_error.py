"""The error that ended the last command on a folder, error.json, for `raydistill status`."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from raydistill.core.errors import TransientError
from raydistill.core.records import Record
from raydistill.core.secrets import redact

ERROR_FILE = "error.json"
MAX_CHARS = 2000


class LastError(Record):
    """The error of a command.

    Attributes:
        message: The message, without secrets.
        failed_at: When the command ended, in seconds since the epoch.
    """

    message: str
    failed_at: float


@contextlib.contextmanager
def record_error(folder: Path) -> Iterator[None]:
    """Record an exception that ends the block in FOLDER/error.json; the record of an earlier command is removed."""
    (folder / ERROR_FILE).unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        cause = getattr(error, "cause", None) or error  # Ray wraps the exception of a task
        message = redact(str(cause) or type(cause).__name__)[:MAX_CHARS]
        # The disk may be full, or a lock lost: the exception that is raised says so
        with contextlib.suppress(OSError, TransientError):
            LastError(message=message, failed_at=time.time()).write(folder / ERROR_FILE)
        raise
