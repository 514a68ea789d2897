"""Validation of YAML data by pydantic models, with errors that name the file, the line and the key."""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from raydistill.core.errors import UserError
from raydistill.core.secrets import CREDENTIALS_HINT, find_credentials
from raydistill.core.suggestions import closest_name

KeyPath = tuple[str | int, ...]  # keys and list indices that lead to a value in nested data
Model = TypeVar("Model", bound=BaseModel)


def validate(model: type[Model], data: Any, path: Path | str, lines: dict[KeyPath, int] | None = None) -> Model:
    """Validate data as a pydantic model.

    Args:
        model: The model class.
        data: The data of the file.
        path: The file, named in messages.
        lines: The line of each key path, from `read_yaml`.

    Raises:
        UserError: The data is invalid, or holds a URL with credentials, which would be copied into run records,
            checkpoints and MLflow.
    """
    for key_path in find_credentials(data):
        location = f"{path}:{lines[key_path]}" if lines and key_path in lines else str(path)
        raise UserError(
            f"{location}: {'.'.join(map(str, key_path))}: contains a password or token, but configurations are stored "
            f"and displayed; remove it. {CREDENTIALS_HINT}"
        )
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UserError(format_validation_error(error, model, path, lines or {})) from None


def format_validation_error(
    error: ValidationError, model: type[BaseModel], path: Path | str, lines: dict[KeyPath, int]
) -> str:
    """All errors of a ValidationError, one per line, as `FILE:LINE: KEY: reason`."""
    messages = []
    for item in error.errors(include_url=False):
        key_path = tuple(item["loc"])
        key = ".".join(map(str, key_path)) or "(top level)"
        prefixes = (key_path[:n] for n in range(len(key_path), 0, -1))
        line = next((lines[prefix] for prefix in prefixes if prefix in lines), None)
        location = f"{path}:{line}" if line else str(path)
        messages.append(f"{location}: {key}: {describe_error(dict(item), model, key_path)}")
    return "\n".join(dict.fromkeys(messages))


def describe_error(error: dict[str, Any], model: type[BaseModel], key_path: KeyPath) -> str:
    """The reason of one pydantic error; for an unknown key also the most similar known key."""
    if error["type"] == "extra_forbidden":
        known = sorted(known_keys(model, key_path[:-1]))
        similar = closest_name(str(key_path[-1]), known, cutoff=0.5)
        hint = f"did you mean {similar!r}?" if similar else f"known keys: {', '.join(known)}"
        return f"unknown key; {hint}"
    message = str(error["msg"]).removeprefix("Value error, ")
    value = error.get("input")
    if isinstance(value, list) and error["type"].endswith(("_type", "_error")) and error["type"] != "value_error":
        message += f", got a list; a space searches several values with {{choice: {value}}}"
    if error["type"] != "value_error" and isinstance(value, str | int | float | bool):
        message += f", got {value!r}"
    return message[0].lower() + message[1:] if message[:1].isupper() and message[1:2].islower() else message


def known_keys(model: type[BaseModel], key_path: KeyPath) -> list[str]:
    """The keys of the model that `key_path` leads to, starting from `model`; empty if there is no model."""
    for part in key_path:
        field = model.model_fields.get(str(part))
        nested = nested_model(field.annotation) if field else None
        if nested is None:
            return []
        model = nested
    return list(model.model_fields)


def nested_model(annotation: Any) -> type[BaseModel] | None:
    """The model that a field holds, optional or not; None if the field holds another type."""
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
