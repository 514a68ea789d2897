"""The inputs of a run that are prepared before the run starts: label sets, teacher cache and costs of the shape."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raydistill.config.label_sources import parse_labels
from raydistill.config.run import Run
from raydistill.teacher_cache.policy import CacheMode

# The folders of the label sets that teachers wrote: by a run's `label_key`, then by source (pseudo, pseudo@TEACHER).
LabelFolders = dict[str, dict[str, str]]


def input_paths(run: Run) -> list[Path]:
    """The folders that a run names: its teacher, a checkpoint to copy from, label sets."""
    named = [run.teacher, run.student.copy_from, *(part.folder for part in parse_labels(run.resolved_labels))]
    return [Path(name) for name in named if name]


def run_label_folders(labels: LabelFolders, run: Run) -> dict[str, Path]:
    """Those of a run, by source."""
    return {source: Path(folder) for source, folder in labels.get(run.label_key, {}).items()}


@dataclass(frozen=True)
class RunInputs:
    """What was made before the run: label sets' folders by source, the teacher cache's root, and the shape's costs.

    `repetition` is the share of the teacher's own outputs that repeat themselves; with it, a student that has
    collapsed into repetition is a failed run.
    `stores` are the cache's folders that were made for this run or the sweep that it is of.
    `keep` is what `teacher_cache: auto` came to, and `computed` what `precision: auto` did, where a worker was asked.
    """

    label_folders: dict[str, Path] = field(default_factory=dict)
    cache_root: Path | None = None
    cache_mode: CacheMode = "full"
    compute_dtype: str | None = None
    costs: dict[str, float] = field(default_factory=dict)
    result_fields: dict[str, Any] = field(default_factory=dict)
    teacher_repetition: float | None = None
    store_folders: tuple[Path, ...] = ()
