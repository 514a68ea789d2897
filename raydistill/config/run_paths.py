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
    """A copy of a run's data with absolute paths for teacher, data set, label sets and `student.copy_from`.

    Ray workers have other working directories, in which relative paths are invalid. Names that are not paths of
    existing files or folders are unchanged.
    """
    run = dict(run)
    for key in ("teacher", "dataset"):
        if key in run:
            run[key] = _map_strings(run[key], _absolute_if_exists)
    if "labels" in run:
        run["labels"] = _map_strings(run["labels"], lambda labels: map_label_paths(labels, _absolute_if_exists))
    student = run.get("student")
    if isinstance(student, dict) and "copy_from" in student:
        run["student"] = {**student, "copy_from": _map_strings(student["copy_from"], _absolute_if_exists)}
    dataset = run.get("dataset")
    if isinstance(dataset, dict) and isinstance(dataset.get("name"), str):
        run["dataset"] = {**dataset, "name": _absolute_if_exists(dataset["name"])}
    return run


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
