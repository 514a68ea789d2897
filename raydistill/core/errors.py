"""Exceptions that commands show to the user without a traceback."""

import errno

from raydistill.core.paths import raydistill_home


class UserError(Exception):
    """Invalid input or state that the user can correct; commands exit with status 2.

    The message says what is wrong, where, and what to do.
    """


class TransientError(UserError):
    """A UserError that a retry may resolve: a trial is retried, and commands exit with status 75."""


def describe_os_error(error: OSError) -> str:
    """The system's message; for a full disk also its path and how to continue."""
    if error.errno != errno.ENOSPC:
        return str(error)
    return (
        f"{error}: the disk of {error.filename or raydistill_home()} is full; no data is lost. "
        f"Free some space and run the same command again"
    )
