"""Completed trials grouped by settings: a group holds the trials that differ only in their seed."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from raydistill.config.label_sources import parse_labels
from raydistill.config.run import Run, parse_size
from raydistill.core.errors import UserError
from raydistill.evaluation.metrics import Comparison, paired_bootstrap_over_seeds
from raydistill.models.layer_choice import layers_to_copy
from raydistill.paper.published import PaperKey, data_name, teacher_name
from raydistill.results.costs import end_to_end_hours
from raydistill.results.records import Trial, read_row_statistics, read_trials
from raydistill.results.sweep_record import SweepRecord, SweepTeacher, read_sweep

DAMAGED_TEACHER_ROWS_REMEDY = (
    "Delete this file: differences to the teacher are then without intervals. To score the teacher again, also delete "
    "teacher.json and sweep.json in the same folder, and run the sweep again"
)


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder, its sweep.json, and its trials."""

    folder: Path
    record: SweepRecord
    trials: list[Trial]

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.name

    @property
    def metric(self) -> str:
        """The main score."""
        return self.record.metric

    @property
    def teacher(self) -> SweepTeacher:
        """The teacher's record."""
        return self.record.teacher

    @property
    def teacher_depths(self) -> tuple[int, int]:
        """The number of encoder and decoder layers of the teacher."""
        return parse_size(self.teacher.size)

    @property
    def teacher_name(self) -> str:
        """The paper's name of the teacher, or a short name."""
        return teacher_name(self.teacher.name)

    @cached_property
    def dataset_name(self) -> str | None:
        """The paper's name of the data set, or a short name; None before the first trial."""
        return next((data_name(trial.run_config().dataset.name) for trial in self.trials), None)

    @property
    def teacher_test_score(self) -> float | None:
        """The teacher's main score on test."""
        return self.teacher.test.metrics.get(self.metric) if self.teacher.test else None

    def teacher_rows(self) -> np.ndarray | None:
        """The teacher's per-row statistics on test, as `read_row_statistics` returns them."""
        return read_row_statistics(self.folder / "teacher_rows.npz", "test", DAMAGED_TEACHER_ROWS_REMEDY)


@dataclass(frozen=True)
class SeedGroup:
    """The completed trials of a sweep that differ only in their seed; never empty.

    `trials` are scored. `collapsed` were trained to the end and failed because of repetitive outputs: they have
    validation losses but no scores.
    """

    sweep: Sweep
    run: Run
    trials: list[Trial]
    collapsed: list[Trial] = field(default_factory=list)

    @property
    def teacher_name(self) -> str:
        """The paper's name of the teacher, or a short name."""
        return teacher_name(str(self.run.teacher))

    @property
    def size(self) -> str:
        """Name of the shape, such as "12-3"."""
        return self.completed[0].size

    @property
    def dataset_name(self) -> str:
        """The paper's name of the data set, or a short name."""
        return data_name(self.run.dataset.name)

    @property
    def paper_key(self) -> PaperKey:
        """(teacher, size, data), as in the paper's tables."""
        return (self.teacher_name, self.size, self.dataset_name)

    @property
    def num_seeds(self) -> int:
        """The number of scored trials."""
        return len(self.trials)

    @property
    def completed(self) -> list[Trial]:
        """All trials that were trained to the end, by seed."""
        return sorted([*self.trials, *self.collapsed], key=lambda trial: trial.seed)

    @property
    def decoder_layers(self) -> tuple[int, ...]:
        """The decoder layers copied; () for a randomly initialised decoder."""
        return tuple(self.completed[0].copied_layers.get("decoder") or ())

    @property
    def decoder_source(self) -> str:
        """The source of the decoder layers: "teacher", another checkpoint, or "" if none were copied."""
        if not self.decoder_layers:
            return ""
        return self.run.student.copy_from or "teacher"

    @cached_property
    def is_spaced(self) -> bool:
        """Whether the student copies the teacher's layers at equal spacing, also if the run lists them one by one."""
        copied, depths = self.completed[0].copied_layers, self.sweep.teacher_depths
        if self.decoder_source != "teacher" or not copied.get("encoder"):
            return False
        sides = zip(("encoder", "decoder"), depths, strict=True)
        return all(copied[side] == layers_to_copy(depth, len(copied[side])) for side, depth in sides)

    @property
    def label_kinds(self) -> tuple[str, ...]:
        """The kind of every label source: original, pseudo (by the student's own teacher) or other."""
        known = ("original", "pseudo")
        return tuple(p.spec if p.spec in known else "other" for p in parse_labels(self.run.resolved_labels))

    @property
    def label_description(self) -> str:
        """The label sources and their weights, such as "original+pseudo*0.5+SET"; a folder by the end of its path."""
        parts = parse_labels(self.run.resolved_labels)
        return "+".join(f"{data_name(p.spec)}{'' if p.weight == 1 else f'*{p.weight:g}'}" for p in parts)

    def mean_test_score(self, metric: str) -> float | None:
        """The mean test score over the seeds."""
        return _mean_or_none((trial.test or {}).get(metric) for trial in self.trials)

    def mean_metric(self, name: str) -> float | None:
        """The mean of a validation score or a cost over the seeds."""
        return _mean_or_none(trial.metrics.get(name) for trial in self.trials)

    @cached_property
    def min_val_loss(self) -> float | None:
        """The mean of `min_val_losses`."""
        return _mean_or_none(self.min_val_losses.values())

    @cached_property
    def min_val_losses(self) -> dict[int, float | None]:
        """The minimum validation cross-entropy by seed, over all completed trials."""
        losses = {t.seed: [v.val_loss for v in t.history() if v.val_loss is not None] for t in self.completed}
        return {seed: min(values, default=None) for seed, values in losses.items()}

    @property
    def mean_repetition(self) -> float | None:
        """The mean share of repetitive outputs, over all completed trials."""
        return _mean_or_none(trial.metrics.get("repetition") for trial in self.completed)

    @property
    def mean_device_hours(self) -> float | None:
        """Mean device-hours, including the teacher passes that a trial needs."""
        return _mean_or_none(end_to_end_hours(trial, self.sweep.teacher.passes) for trial in self.trials)

    @cached_property
    def test_rows(self) -> dict[int, np.ndarray]:
        """Per-row statistics on test by seed, for the trials that kept them."""
        return {trial.seed: rows for trial in self.trials if (rows := trial.row_statistics("test")) is not None}


def load_seed_groups(folders: Iterable[Path]) -> tuple[list[Sweep], list[SeedGroup]]:
    """Read sweeps and group their completed trials, in the order of the trials.

    Raises:
        UserError: A folder holds no sweep, or a file is damaged.
    """
    sweeps = [Sweep(folder, read_sweep(folder), read_trials(folder)) for folder in folders]
    groups: dict[tuple[Path, str], SeedGroup] = {}
    for sweep in sweeps:
        for trial in sweep.trials:
            collapsed = trial.status == "failed" and "repetition" in trial.metrics
            if trial.status != "done" and not collapsed:
                continue
            run = trial.run_config()
            settings = run.model_dump(mode="json", exclude={"name": True, "training": {"seed"}})
            # Groups do not span sweeps: teachers of one name may differ, and so do the hours of teacher passes
            key = (sweep.folder, json.dumps(settings, sort_keys=True))
            group = groups.setdefault(key, SeedGroup(sweep, run, []))
            (group.collapsed if collapsed else group.trials).append(trial)
    return sweeps, list(groups.values())


def group_by_sweep(seed_groups: Iterable[SeedGroup]) -> list[tuple[Sweep, list[SeedGroup]]]:
    """The groups of each sweep, since sweeps may use different recipes."""
    by_folder: dict[Path, list[SeedGroup]] = {}
    for group in seed_groups:
        by_folder.setdefault(group.sweep.folder, []).append(group)
    return [(groups[0].sweep, groups) for groups in by_folder.values()]


def check_comparable(sweeps: Sequence[Sweep]) -> None:
    """Check that sweeps with one name for teacher and data set have the same teacher and data.

    Raises:
        UserError: They differ, so that one table cannot show both.
    """
    first_by_name: dict[tuple[str, str], Sweep] = {}
    for sweep in sweeps:
        if sweep.dataset_name is None:
            continue
        first = first_by_name.setdefault((sweep.teacher_name, sweep.dataset_name), sweep)
        differences = ["teacher"] if first.teacher.key != sweep.teacher.key else []
        others = sweep.teacher.data
        differences += [
            f"{split} split" for split, mark in first.teacher.data.items() if others.get(split, mark) != mark
        ]
        if differences:
            raise UserError(
                f"{first.folder} and {sweep.folder} are both of {sweep.teacher_name} on {sweep.dataset_name}, but "
                f"have a different {' and a different '.join(differences)}; make a report for each"
            )


def best_group(seed_groups: Iterable[SeedGroup]) -> SeedGroup | None:
    """The group with the highest mean validation score; test scores never decide."""
    scored = [
        (score, -i, group) for i, group in enumerate(seed_groups) if (score := group.mean_metric("score")) is not None
    ]
    return max(scored, key=lambda entry: entry[:2])[2] if scored else None


def compare_groups(a: SeedGroup, b: SeedGroup) -> tuple[Comparison, int] | None:
    """The difference a - b on test over the seeds that both have, and the number of seeds; None without rows."""
    seeds = sorted(a.test_rows.keys() & b.test_rows.keys())
    a_rows, b_rows = [a.test_rows[seed] for seed in seeds], [b.test_rows[seed] for seed in seeds]
    if not _same_row_count([*a_rows, *b_rows]):
        return None
    return paired_bootstrap_over_seeds(a.sweep.metric, a_rows, b_rows), len(seeds)


def compare_to_teacher(group: SeedGroup) -> tuple[Comparison, int] | None:
    """The difference student - teacher on test over all seeds, and the number of seeds; None if rows are missing."""
    rows, teacher_rows = list(group.test_rows.values()), group.sweep.teacher_rows()
    if teacher_rows is None or len(rows) < group.num_seeds or not _same_row_count([*rows, teacher_rows]):
        return None
    return paired_bootstrap_over_seeds(group.sweep.metric, rows, [teacher_rows]), group.num_seeds


def _same_row_count(arrays: Sequence[np.ndarray]) -> bool:
    return len({len(rows) for rows in arrays}) == 1


def _mean_or_none(values: Iterable[float | None]) -> float | None:
    """The mean; None if any value is missing, since a mean over the others is not comparable."""
    numbers: Sequence[float | None] = list(values)
    known = [float(value) for value in numbers if value is not None]
    return float(np.mean(known)) if known and len(known) == len(numbers) else None
