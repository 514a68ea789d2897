"""The inputs of a run that are prepared before the run starts: label sets, teacher cache and costs of the shape."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raydistill.config.run import Run, parse_labels
from raydistill.teacher_cache.policy import Keep

# The folders of the label sets that teachers wrote: by a run's `label_key`, then by source (pseudo, pseudo@TEACHER).
MadeLabels = dict[str, dict[str, str]]


def read_by(run: Run) -> list[Path]:
    """The folders that a run names: its teacher, a checkpoint to copy from, label sets."""
    named = [run.teacher, run.student.copy_from, *(part.folder for part in parse_labels(run.label_source))]
    return [Path(name) for name in named if name]


def folders_of(labels: MadeLabels, run: Run) -> dict[str, Path]:
    """Those of a run, by source."""
    return {source: Path(folder) for source, folder in labels.get(run.label_key, {}).items()}


@dataclass(frozen=True)
class Inputs:
    """What was made before the run: label sets' folders by source, the teacher cache's root, and the shape's costs.

    `repetition` is the share of the teacher's own outputs that repeat themselves; with it, a student that has
    collapsed into repetition is a failed run.
    `stores` are the cache's folders that were made for this run or the sweep that it is of.
    `keep` is what `teacher_cache: auto` came to, and `computed` what `precision: auto` did, where a worker was asked.
    """

    labels: dict[str, Path] = field(default_factory=dict)
    cache: Path | None = None
    keep: Keep = "full"
    computed: str | None = None
    costs: dict[str, float] = field(default_factory=dict)
    note: dict[str, Any] = field(default_factory=dict)
    repetition: float | None = None
    stores: tuple[Path, ...] = ()
