"""The known name that is most similar to a mistyped name, for error messages."""

import difflib
from collections.abc import Iterable

DEFAULT_CUTOFF = 0.6  # that of difflib


def closest_name(name: str, known: Iterable[str], cutoff: float = DEFAULT_CUTOFF) -> str | None:
    """The known name that is most similar to `name`; None if none of them is similar enough.

    Args:
        name: The name that is not known.
        known: The names to choose from.
        cutoff: The smallest similarity, from 0 to 1, by `difflib.SequenceMatcher.ratio`.
    """
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)
