"""Passwords and tokens: masked in messages and MLflow, and rejected in configuration files."""

import os
import re
from collections.abc import Iterator
from typing import Any

# `user:password@` of a URL, also if the password contains an unquoted slash; and query parameters with secret names.
_URL_USERINFO = re.compile(r"(?<=://)(?:[^\s/?#@]*:\S*|[^\s/?#]*)@")
_URL_SECRET_PARAMETER = re.compile(
    r"(?<=[?&;])([\w-]*(?:password|passwd|secret|token|api_?key|access_?key|signature)=)[^\s&;#]+", re.IGNORECASE
)
_SECRET_VARIABLE = re.compile(r".*(?:TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS|_KEY)$|.*SECRET.*", re.IGNORECASE)
_MIN_SECRET_LENGTH = 6  # characters; a shorter value of an environment variable would match ordinary text
MASK = "***"
CREDENTIALS_HINT = (
    "MLflow reads MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN), PostgreSQL "
    "PGPASSWORD, S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the hub HF_TOKEN from the environment"
)


def redact(text: str) -> str:
    """Replace credentials in URLs, and values of environment variables with secret names, by `***`."""
    values = {v for name, v in os.environ.items() if len(v) >= _MIN_SECRET_LENGTH and _SECRET_VARIABLE.fullmatch(name)}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, MASK)
    return _mask_url_credentials(text)


def redact_nested(data: Any) -> Any:
    """Apply `redact` to every string in nested lists and mappings."""
    if isinstance(data, str):
        return redact(data)
    if isinstance(data, dict):
        return {key: redact_nested(value) for key, value in data.items()}
    return [redact_nested(value) for value in data] if isinstance(data, list | tuple) else data


def has_credentials(text: str) -> bool:
    """Whether a text contains a URL with credentials."""
    return _mask_url_credentials(text) != text


def find_credentials(data: Any, key_path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the key path of every string in nested data that contains a URL with credentials."""
    if isinstance(data, str) and has_credentials(data):
        yield key_path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from find_credentials(value, (*key_path, key))


def _mask_url_credentials(text: str) -> str:
    return _URL_SECRET_PARAMETER.sub(rf"\g<1>{MASK}", _URL_USERINFO.sub(f"{MASK}@", text))
