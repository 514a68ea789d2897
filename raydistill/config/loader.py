"""Reading of YAML files with the line of every key, and `--set` overrides."""

from pathlib import Path
from typing import Any

import yaml

from raydistill.config.validation import KeyPath
from raydistill.core.errors import UserError
from raydistill.core.suggestions import closest_name

MAX_CHARS, MAX_NODES, MAX_DEPTH = 1_000_000, 100_000, 100


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """Read a YAML mapping.

    Returns:
        The data, and the line (counted from 1) of each key path.

    Raises:
        UserError: The file is missing, not UTF-8, too large, not a YAML mapping, or it repeats a key or uses a tag
            such as `!!python/object`.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARS + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{_similar_name_hint(path)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    if len(text) > MAX_CHARS:
        raise UserError(f"{path}: longer than {MAX_CHARS:,} characters, too long for a configuration file")
    lines: dict[KeyPath, int] = {}
    try:
        node = _compose_within_limits(text)
        if node is not None:
            _collect_lines(node, (), lines, path)
        data = _construct(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        location = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{location}: not valid YAML: {problem}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, got {type(data).__name__}")
    return data, lines


def apply_overrides(data: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Apply overrides such as `training.epochs=3` to a copy of the data; the values are parsed as YAML.

    Raises:
        UserError: An override has no `=`, an empty key, or an invalid value.
    """
    data = yaml.safe_load(yaml.safe_dump(data))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"--set {override}: expected KEY=VALUE, for example --set search.trials=4")
        try:
            value = _construct(_compose_within_limits(text))
        except (yaml.YAMLError, ValueError, RecursionError):
            raise UserError(f"--set {override}: {text!r} is not a YAML value") from None
        mapping = data
        *parents, last = key.split(".")
        for parent in parents:
            nested = mapping.get(parent)
            if isinstance(nested, str) and parent == "dataset":
                nested = {"name": nested}
            mapping[parent] = nested if isinstance(nested, dict) else {}
            mapping = mapping[parent]
        mapping[last] = value
    return data


def _compose_within_limits(text: str) -> yaml.Node | None:
    """Parse a YAML text into nodes; ValueError if nodes are nested too deeply or too many after alias expansion."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    pending, count = [(root, 0)] if root else [], 0
    while pending:
        node, depth = pending.pop()
        count += 1
        if count + len(pending) > MAX_NODES:
            raise ValueError(f"more than {MAX_NODES:,} values, aliases expanded")
        if depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} levels deep")
        if isinstance(node, yaml.MappingNode):
            pending += [(child, depth + 1) for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            pending += [(child, depth + 1) for child in node.value]
    return root


def _construct(root: yaml.Node | None) -> Any:
    """The data of a document; only plain YAML types are allowed."""
    return yaml.SafeLoader("").construct_document(root) if root else None


def _collect_lines(node: yaml.Node, key_path: KeyPath, lines: dict[KeyPath, int], path: Path) -> None:
    """Fill `lines` with the line of every key path below `node`; UserError for a repeated or a nested key."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"{path}:{line}: a key must be a scalar, not a list or a mapping")
            child_path = (*key_path, key.value)
            if child_path in lines:
                raise UserError(f"{path}:{line}: duplicate key {key.value}")
            lines[child_path] = line
            _collect_lines(value, child_path, lines, path)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[(*key_path, i)] = value.start_mark.line + 1
            _collect_lines(value, (*key_path, i), lines, path)


def _similar_name_hint(path: Path) -> str:
    names = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    similar = closest_name(path.name, names)
    return f"; did you mean {path.parent / similar}?" if similar else ""
