"""The keys of run and space files, and the keys of `--set`: checked, completed, or corrected by a suggestion."""

from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from raydistill.config.validation import nested_model
from raydistill.core.errors import UserError
from raydistill.core.suggestions import closest_name

# Key -> the keys below it; None: a value, which may be a list, a mapping of any keys, or a distribution.
KeyTree = dict[str, "KeyTree | None"]
RUN_PREFIX = "run."


def key_tree(model: type[BaseModel]) -> KeyTree:
    """The keys of a model and of its nested models."""
    return {
        name: key_tree(nested) if (nested := nested_model(field.annotation)) else None
        for name, field in model.model_fields.items()
    }


def complete_overrides(overrides: list[str], keys: KeyTree, path: Path | str) -> list[str]:
    """The overrides of `--set` with the full keys of a file.

    The prefix `run.` may be missing for a space, and may be present for a run.

    Args:
        overrides: `KEY=VALUE` strings.
        keys: The keys of the file; in a space, `run` holds the keys of the run.
        path: The file, named in messages.

    Raises:
        UserError: A key is unknown; the message names similar keys.
    """
    completed = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if equals and all(key.split(".")):  # else `apply_overrides` reports the form
            key = _complete(key, keys, f"{path}: --set {override}")
        completed.append(f"{key}{equals}{value}")
    return completed


def _complete(key: str, keys: KeyTree, context: str) -> str:
    candidates = [key, f"{RUN_PREFIX}{key}" if "run" in keys else key.removeprefix(RUN_PREFIX)]
    for candidate in candidates:
        if _is_known(candidate.split("."), keys):
            return candidate
    similar = _similar_keys(key, list(_dotted_keys(keys)))
    hint = f"did you mean {' or '.join(map(repr, similar))}?" if similar else f"known keys: {', '.join(keys)}"
    raise UserError(f"{context}: unknown key; {hint}")


def _is_known(parts: list[str], keys: KeyTree | None) -> bool:
    """Whether a path leads to a key, or into a value."""
    return keys is None or not parts or (parts[0] in keys and _is_known(parts[1:], keys[parts[0]]))


def _dotted_keys(keys: KeyTree, prefix: str = "") -> Iterator[str]:
    for name, nested in keys.items():
        yield f"{prefix}{name}"
        yield from _dotted_keys(nested or {}, f"{prefix}{name}.")


def _similar_keys(key: str, known: list[str], max_shown: int = 3) -> list[str]:
    """Keys whose last part is that of `key`, else the most similar key, else a key with a similar last part."""
    last = key.rpartition(".")[2]
    last_parts = [name.rpartition(".")[2] for name in known]
    if same := [name for name, part in zip(known, last_parts, strict=True) if part == last]:
        return same[:max_shown]
    if similar := closest_name(key, known, cutoff=0.8):
        return [similar]
    similar_part = closest_name(last, last_parts, cutoff=0.75)
    return [name for name, part in zip(known, last_parts, strict=True) if part == similar_part][:max_shown]
