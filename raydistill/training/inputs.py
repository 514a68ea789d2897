"""Inputs of a run that are prepared before the run starts: label sets, teacher cache, costs of the student."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raydistill.config.label_sources import parse_labels
from raydistill.config.run import Run
from raydistill.teacher_cache.policy import CacheMode

# Folders by the `label_key` of a run, then by label source: the label sets of "pseudo" and "pseudo@TEACHER"; the label
# sets of the extra sources under the names of `extra_labels`; the extra sources (data/extra.py) under EXTRA_SOURCES.
LabelFolders = dict[str, dict[str, str]]
EXTRA_SOURCES = "extra"


def input_paths(run: Run) -> list[Path]:
    """The folders that a run names: teacher, checkpoint to copy from, label sets."""
    names = [run.teacher, run.student.copy_from, *(part.folder for part in parse_labels(run.resolved_labels))]
    return [Path(name) for name in names if name]


def extra_labels(source: str) -> str:
    """The name of the label set that the teacher of a label source wrote for the extra sources.

    No label source has such a name, since "+" separates sources.
    """
    return f"{source}+{EXTRA_SOURCES}"


def run_label_folders(labels: LabelFolders, run: Run) -> dict[str, Path]:
    """The folders of the label sets and of the extra sources of a run, as in `LabelFolders`."""
    return {source: Path(folder) for source, folder in labels.get(run.label_key, {}).items()}


@dataclass(frozen=True)
class RunInputs:
    """Inputs of a run that are prepared before the run starts.

    Attributes:
        label_folders: Folders of label sets and extra sources, as in `LabelFolders`.
        cache_root: The folder of the teacher cache, None for no cache.
        cache_mode: The resolved value of `teacher_cache: auto`.
        compute_dtype: The resolved value of `precision: auto`, as measured on a worker.
        costs: Latency, memory and parameters of the student.
        number: Position in the order of proposals of a sweep, for the result.
        params: The values that a sweep's search chose, for the result.
        teacher_repetition: The share of the teacher's outputs that are repetitive. If given, a student with far more
            repetition is a failed run.
        store_folders: The stores of the cache that were built for this run or its sweep.
    """

    label_folders: dict[str, Path] = field(default_factory=dict)
    cache_root: Path | None = None
    cache_mode: CacheMode = "full"
    compute_dtype: str | None = None
    costs: dict[str, float] = field(default_factory=dict)
    number: int | None = None
    params: dict[str, Any] = field(default_factory=dict)
    teacher_repetition: float | None = None
    store_folders: tuple[Path, ...] = ()
