"""YAML to checked models: an error names the file, the line and the key, and the nearest known key."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from raydistill.core.errors import UserError
from raydistill.core.files import is_there
from raydistill.core.secrets import places_of_credentials

# Names that mean something by themselves, even where a file or folder of that name lies about.
KNOWN_WORDS = {"bart", "pegasus", "mbart", "marian", "t5", "demo", "xsum", "cnn_dailymail", "wmt16_en_ro"} | {
    *("auto", "original", "pseudo"),
}
ELSEWHERE = (
    "MLflow reads MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN), PostgreSQL "
    "PGPASSWORD, S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the hub HF_TOKEN from the environment"
)
MOST_CHARS, MOST_NODES, MOST_DEPTH = 1_000_000, 100_000, 100
Path_ = tuple[str | int, ...]
M = TypeVar("M", bound=BaseModel)


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[Path_, int]]:
    """A YAML mapping and the line (from 1) of each key path. Plain YAML only: a !!python tag is refused."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MOST_CHARS + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{_similar_files(path)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    if len(text) > MOST_CHARS:
        raise UserError(f"{path}: longer than {MOST_CHARS:,} characters; that is no file of settings")
    lines: dict[Path_, int] = {}
    try:
        node = _compose(text)
        if node is not None:
            _walk(node, (), lines, path)
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{path}{where}: not valid YAML: {problem}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, found {type(data).__name__}")
    return data, lines


def check(model: type[M], data: Any, path: Path | str, lines: dict[Path_, int] | None = None) -> M:
    """Validate `data` as `model`, or raise a UserError that names file, line and key.

    An address with a password is refused: settings go into run records, checkpoints and MLflow.
    """
    for at in places_of_credentials(data):
        where = f"{path}:{lines[at]}" if lines and at in lines else str(path)
        raise UserError(
            f"{where}: {'.'.join(map(str, at))}: holds a password or token, and settings are kept and shown; leave it "
            f"out. {ELSEWHERE}"
        )
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UserError(explain(error, model, path, lines or {})) from None


def explain(error: ValidationError, model: type[BaseModel], path: Path | str, lines: dict[Path_, int]) -> str:
    """All the errors, one a line, as FILE:LINE: KEY: what is wrong."""
    messages = []
    for item in error.errors(include_url=False):
        location = tuple(item["loc"])
        key = ".".join(str(part) for part in location) or "(top level)"
        line = next((lines[location[:n]] for n in range(len(location), 0, -1) if location[:n] in lines), None)
        where = f"{path}:{line}" if line else str(path)
        messages.append(f"{where}: {key}: {reason_of(dict(item), model, location)}")
    return "\n".join(dict.fromkeys(messages))


def reason_of(item: dict[str, Any], model: type[BaseModel], location: Path_) -> str:
    """What is wrong with one value, with the nearest known key for an unknown one."""
    if item["type"] == "extra_forbidden":
        known = sorted(known_keys(model, location[:-1]))
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key; {hint}"
    message = str(item["msg"]).removeprefix("Value error, ")
    given = item.get("input")
    if item["type"] != "value_error" and isinstance(given, str | int | float | bool):
        message += f", found {given!r}"
    return message[0].lower() + message[1:] if message[:1].isupper() and message[1:2].islower() else message


def known_keys(model: type[BaseModel], location: Path_) -> list[str]:
    """The keys that a (nested) model knows at a location."""
    for part in location:
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        inner = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)


def apply_settings(data: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """`--set a.b=VALUE` applied to a copy of the data; VALUE is read as YAML."""
    data = yaml.safe_load(yaml.safe_dump(data))
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"--set {setting}: expected KEY=VALUE, for example --set search.trials=4")
        try:
            _compose(text)
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise UserError(f"--set {setting}: {text!r} is not a YAML value") from None
        place = data
        *parents, last = key.split(".")
        for parent in parents:
            inner = place.get(parent)
            if isinstance(inner, str) and parent == "dataset":
                inner = {"name": inner}
            place[parent] = inner if isinstance(inner, dict) else {}
            place = place[parent]
        place[last] = value
    return data


def absolute_paths(run: dict[str, Any]) -> dict[str, Any]:
    """A run's data with teacher, data set and label set as absolute paths where they are files or folders here.

    Workers run in folders of their own, where a relative path would lead nowhere.
    """
    run = dict(run)
    for key in ("teacher", "dataset"):
        if key in run:
            run[key] = _each_text(run[key], _absolute)
    if "labels" in run:
        run["labels"] = _each_text(run["labels"], _absolute_labels)
    student = run.get("student")
    if isinstance(student, dict) and "copy_from" in student:
        run["student"] = {**student, "copy_from": _each_text(student["copy_from"], _absolute)}
    dataset = run.get("dataset")
    if isinstance(dataset, dict) and isinstance(dataset.get("name"), str):
        run["dataset"] = {**dataset, "name": _absolute(dataset["name"])}
    return run


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """A text changed, also where it stands in a distribution's choices."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict) and isinstance(value.get("choice"), list):
        return {**value, "choice": [change(v) if isinstance(v, str) else v for v in value["choice"]]}
    if isinstance(value, dict) and isinstance(value.get("cases"), list):
        return {**value, "cases": [_each_text(case, change) for case in value["cases"]]}
    return value


def _absolute(name: str) -> str:
    return name if name in KNOWN_WORDS or not is_there(Path(name)) else str(Path(name).resolve())


def _absolute_labels(labels: str) -> str:
    """Each source of `labels` by itself; its weight stays."""
    absolute = []
    for text in labels.split("+"):
        source, star, weight = text.strip().partition("*")
        kind, at, teacher = source.partition("@")
        source = f"pseudo@{_absolute(teacher)}" if (kind, at) == ("pseudo", "@") else _absolute(source)
        absolute.append(f"{source}{star}{weight}")
    return "+".join(absolute)


def _compose(text: str) -> yaml.Node | None:
    """The nodes of a YAML text; ValueError where they are too deep, or too many, aliases of aliases included."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    waiting, count = [(node, 0)] if node else [], 0
    while waiting:
        one, depth = waiting.pop()
        count += 1
        if count + len(waiting) > MOST_NODES:
            raise ValueError(f"more than {MOST_NODES:,} values, aliases counted as often as they stand")
        if depth > MOST_DEPTH:
            raise ValueError(f"more than {MOST_DEPTH} levels deep")
        if isinstance(one, yaml.MappingNode):
            waiting += [(inner, depth + 1) for pair in one.value for inner in pair]
        elif isinstance(one, yaml.SequenceNode):
            waiting += [(inner, depth + 1) for inner in one.value]
    return node


def _walk(node: yaml.Node, at: Path_, lines: dict[Path_, int], path: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(
                    f"{path}:{key.start_mark.line + 1}: a key must be a plain word, not a list or a mapping"
                )
            here = (*at, key.value)
            if here in lines:
                raise UserError(f"{path}:{key.start_mark.line + 1}: {key.value} is given twice")
            lines[here] = key.start_mark.line + 1
            _walk(value, here, lines, path)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[(*at, i)] = value.start_mark.line + 1
            _walk(value, (*at, i), lines, path)


def _similar_files(path: Path) -> str:
    names = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
