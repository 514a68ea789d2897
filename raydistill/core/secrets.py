"""Passwords and tokens are not seen: not in messages, not in MLflow, and never in a file of settings."""

import os
import re
from collections.abc import Iterator
from typing import Any

# user:password@ of an address, also where the password holds an unquoted slash; and parameters that are secret.
_USER = re.compile(r"(?<=://)(?:[^\s/?#@]*:\S*|[^\s/?#]*)@")
_PARAMETER = re.compile(
    r"(?<=[?&;])([\w-]*(?:password|passwd|secret|token|api_?key|access_?key|signature)=)[^\s&;#]+", re.IGNORECASE
)
_SECRET = re.compile(r".*(?:TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS|_KEY)$|.*SECRET.*", re.IGNORECASE)
_SHORTEST = 6  # of a value in the environment: a shorter one would be found in any text
MASK = "***"


def hidden(text: str) -> str:
    """A text with `***` for credentials in addresses and for the values of environment variables named like secrets."""
    values = {v for name, v in os.environ.items() if len(v) >= _SHORTEST and _SECRET.fullmatch(name)}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, MASK)
    return _without_credentials(text)


def hidden_in(data: Any) -> Any:
    """`hidden` for every text in nested lists and mappings."""
    if isinstance(data, str):
        return hidden(data)
    if isinstance(data, dict):
        return {key: hidden_in(value) for key, value in data.items()}
    return [hidden_in(value) for value in data] if isinstance(data, list | tuple) else data


def places_of_credentials(data: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The places in nested data whose text is an address with credentials."""
    if isinstance(data, str) and _without_credentials(data) != data:
        yield at
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in pairs:
        yield from places_of_credentials(value, (*at, key))


def _without_credentials(text: str) -> str:
    return _PARAMETER.sub(rf"\g<1>{MASK}", _USER.sub(f"{MASK}@", text))
