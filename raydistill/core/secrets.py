"""Passwords and tokens are not seen: not in messages, not in MLflow, and never in a file of settings."""

import os
import re
from collections.abc import Iterator
from typing import Any

# user:password@ of an address, also where the password holds an unquoted slash; and parameters that are secret.
_URL_USERINFO = re.compile(r"(?<=://)(?:[^\s/?#@]*:\S*|[^\s/?#]*)@")
_URL_SECRET_PARAMETER = re.compile(
    r"(?<=[?&;])([\w-]*(?:password|passwd|secret|token|api_?key|access_?key|signature)=)[^\s&;#]+", re.IGNORECASE
)
_SECRET_VARIABLE = re.compile(r".*(?:TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS|_KEY)$|.*SECRET.*", re.IGNORECASE)
_MIN_SECRET_LENGTH = 6  # of a value in the environment: a shorter one would be found in any text
MASK = "***"


def redact(text: str) -> str:
    """A text with `***` for credentials in addresses and for the values of environment variables named like secrets."""
    values = {v for name, v in os.environ.items() if len(v) >= _MIN_SECRET_LENGTH and _SECRET_VARIABLE.fullmatch(name)}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, MASK)
    return _mask_url_credentials(text)


def redact_nested(data: Any) -> Any:
    """`redact` for every text in nested lists and mappings."""
    if isinstance(data, str):
        return redact(data)
    if isinstance(data, dict):
        return {key: redact_nested(value) for key, value in data.items()}
    return [redact_nested(value) for value in data] if isinstance(data, list | tuple) else data


def find_credentials(data: Any, key_path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The places in nested data whose text is an address with credentials."""
    if isinstance(data, str) and _mask_url_credentials(data) != data:
        yield key_path
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in pairs:
        yield from find_credentials(value, (*key_path, key))


def _mask_url_credentials(text: str) -> str:
    return _URL_SECRET_PARAMETER.sub(rf"\g<1>{MASK}", _URL_USERINFO.sub(f"{MASK}@", text))
