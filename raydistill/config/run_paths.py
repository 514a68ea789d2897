"""Paths in the data of a run, made absolute before other processes read them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from raydistill.config.label_sources import map_label_paths
from raydistill.config.presets import DATASETS, TEACHERS
from raydistill.core.files import path_exists

# Names with a meaning of their own, also if a file or folder of that name exists.
RESERVED_NAMES = {*TEACHERS, *DATASETS, "demo", "auto", "original", "pseudo"}


def make_paths_absolute(run: dict[str, Any]) -> dict[str, Any]:
    """A copy of a run's data with absolute paths of all inputs.

    These are teacher, data set, label sets, `student.copy_from` and `pseudo.extra`. Ray workers have other working
    directories, in which relative paths are invalid. Names that are not paths of existing files or folders are
    unchanged.
    """
    run = dict(run)
    if "teacher" in run:
        run["teacher"] = _map_strings(run["teacher"], _absolute_if_exists)
    if "labels" in run:
        run["labels"] = _map_strings(run["labels"], lambda labels: map_label_paths(labels, _absolute_if_exists))
    student = run.get("student")
    if isinstance(student, dict) and "copy_from" in student:
        run["student"] = {**student, "copy_from": _map_strings(student["copy_from"], _absolute_if_exists)}
    if "dataset" in run:
        run["dataset"] = _map_name(run["dataset"])
    pseudo = run.get("pseudo")
    if isinstance(pseudo, dict) and "extra" in pseudo:
        run["pseudo"] = {**pseudo, "extra": _map_name(pseudo["extra"])}
    return run


def _map_name(value: Any) -> Any:
    """Make the name of a data set absolute: a string, the strings of a distribution, or the name in a mapping."""
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        return {**value, "name": _absolute_if_exists(value["name"])}
    return _map_strings(value, _absolute_if_exists)


def _map_strings(value: Any, transform: Callable[[str], str]) -> Any:
    """Apply `transform` to a string, or to the strings among the choices of a distribution."""
    if isinstance(value, str):
        return transform(value)
    if isinstance(value, dict) and isinstance(value.get("choice"), list):
        return {**value, "choice": [transform(v) if isinstance(v, str) else v for v in value["choice"]]}
    if isinstance(value, dict) and isinstance(value.get("cases"), list):
        return {**value, "cases": [_map_strings(case, transform) for case in value["cases"]]}
    return value


def _absolute_if_exists(name: str) -> str:
    return name if name in RESERVED_NAMES or not path_exists(Path(name)) else str(Path(name).resolve())
