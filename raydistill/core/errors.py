"""The error that is the user's to mend."""


class UserError(Exception):
    """Bad input. The message says what was wrong, where, and what to do; commands exit with status 2."""


class PassingError(UserError):
    """One that may be gone when the same is tried again; trials are."""
