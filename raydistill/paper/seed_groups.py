"""Finished trials of sweeps put together by setting: the same run with other seeds is one setting."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from raydistill.config.label_sources import parse_labels
from raydistill.config.run import Run, parse_size
from raydistill.core.errors import UserError
from raydistill.evaluation.metrics import Comparison, paired_bootstrap_over_seeds
from raydistill.models.layer_choice import layers_to_copy
from raydistill.paper.published import data_name, teacher_name
from raydistill.results.costs import end_to_end_hours, hours_by_artifact
from raydistill.results.records import Trial, read_rows, read_sweep, read_trials


@dataclass(frozen=True)
class Sweep:
    """A sweep's own record, as tables need it."""

    folder: Path
    info: dict[str, Any]
    trials: list[Trial]

    @property
    def name(self) -> str:
        """The folder's."""
        return self.folder.name

    @property
    def teacher(self) -> dict[str, Any]:
        """What sweep.json tells of the teacher; empty before the teacher was scored."""
        return self.info.get("teacher") or {}

    @property
    def teacher_depths(self) -> tuple[int, int] | None:
        """The teacher's encoder and decoder layers; None before it was scored."""
        size = self.teacher.get("size")
        return parse_size(size) if size else None

    @property
    def teacher_name(self) -> str:
        """By the paper's name where it has one."""
        return teacher_name(str(self.teacher.get("name")))

    @cached_property
    def data(self) -> str | None:
        """The data set by the paper's name where it has one, from any trial's run; None before the first trial."""
        names = ((trial.run_config().get("dataset") or {}).get("name") for trial in self.trials)
        return next((data_name(str(name)) for name in names if name), None)

    @property
    def hours_by_artifact(self) -> dict[str, float]:
        """Device-hours of the teacher's passes, by the name of what each made."""
        if passes := self.teacher.get("passes"):
            return hours_by_artifact(passes, f"cache of {self.folder}")
        return {f"passes of {self.folder}": float(self.info.get("teacher_gpu_hours") or 0.0)}

    @property
    def metric(self) -> str:
        """The main metric, rouge2 or bleu."""
        return str(self.info.get("metric", "rouge2"))

    def teacher_rows(self) -> np.ndarray | None:
        """The teacher's per-row statistics on test."""
        return read_rows(self.folder / "teacher_rows.npz", "test")


@dataclass(frozen=True)
class SeedGroup:
    """The trials that differ in nothing but their seed: those that are done, and those that came to an end collapsed.

    There is at least one of either. Whoever collapsed has no scores, but all its validation losses.
    """

    sweep: Sweep
    run: Run
    trials: list[Trial]
    collapsed: list[Trial] = field(default_factory=list)

    @property
    def paper_key(self) -> tuple[str, str, str]:
        """(teacher, size, data), by the paper's names where it has them."""
        return (teacher_name(str(self.run.teacher)), self.ended[0].size, data_name(self.run.dataset.name))

    @property
    def num_seeds(self) -> int:
        """How many scored trials there are."""
        return len(self.trials)

    @property
    def ended(self) -> list[Trial]:
        """All trials that were trained to their end, by seed."""
        return sorted([*self.trials, *self.collapsed], key=lambda trial: trial.seed)

    @property
    def layers(self) -> tuple[int, ...]:
        """The decoder layers copied; () where the decoder started from random weights."""
        return tuple(self.ended[0].copied.get("decoder") or ())

    @property
    def source(self) -> str:
        """Where the decoder layers come from: "teacher", another checkpoint, or "" where none were copied."""
        if not self.layers:
            return ""
        return self.run.student.copy_from or "teacher"

    @cached_property
    def is_spaced(self) -> bool:
        """Whether the student starts as the paper's do, also where its layers are listed one by one.

        False of a teacher whose size is not known.
        """
        copied, depths = self.ended[0].copied, self.sweep.teacher_depths
        if depths is None or not self.layers or self.source != "teacher" or not copied.get("encoder"):
            return False
        sides = zip(("encoder", "decoder"), depths, strict=True)
        return all(copied[side] == layers_to_copy(depth, len(copied[side])) for side, depth in sides)

    @property
    def label_kinds(self) -> tuple[str, ...]:
        """Each source of labels as original, pseudo (the teacher's own) or other."""
        known = ("original", "pseudo")
        return tuple(p.spec if p.spec in known else "other" for p in parse_labels(self.run.resolved_labels))

    @property
    def labels(self) -> str:
        """What it was trained to write, a folder by its last part: "original+pseudo*0.5+SET"."""
        parts = parse_labels(self.run.resolved_labels)
        return "+".join(f"{data_name(p.spec)}{'' if p.weight == 1 else f'*{p.weight:g}'}" for p in parts)

    def test(self, metric: str) -> float | None:
        """The mean test score over the seeds."""
        return _mean_or_none((t.test or {}).get(metric) for t in self.trials)

    def measure(self, name: str) -> float | None:
        """The mean of a validation score or a cost over the seeds."""
        return _mean_or_none(t.metrics.get(name) for t in self.trials)

    @cached_property
    def min_val_loss(self) -> float | None:
        """The mean of `least_losses`."""
        return _mean_or_none(self.min_val_losses.values())

    @cached_property
    def min_val_losses(self) -> dict[int, float | None]:
        """By seed the least validation cross-entropy of all checks, of all that were trained to their end."""
        checks = {t.seed: [c["val_loss"] for c in t.history() if "val_loss" in c] for t in self.ended}
        return {seed: min(losses, default=None) for seed, losses in checks.items()}

    @property
    def repetition(self) -> float | None:
        """The mean share of outputs that repeat themselves, of all that were trained to their end."""
        return _mean_or_none(t.metrics.get("repetition") for t in self.ended)

    @property
    def cost(self) -> float | None:
        """Mean device-hours end to end."""
        passes = self.sweep.teacher.get("passes")
        return _mean_or_none(end_to_end_hours(t, passes) for t in self.trials)

    @cached_property
    def rows(self) -> dict[int, np.ndarray]:
        """By seed the per-row statistics on test, of the trials that kept them."""
        return {t.seed: rows for t in self.trials if (rows := t.rows("test")) is not None}


def load_seed_groups(folders: Iterable[Path]) -> tuple[list[Sweep], list[SeedGroup]]:
    """The sweeps and the settings of their trials that came to their end, in the order of the trials."""
    sweeps = [Sweep(folder, read_sweep(folder), read_trials(folder)) for folder in folders]
    grouped: dict[tuple[Path, str], SeedGroup] = {}
    for sweep in sweeps:
        for trial in sweep.trials:
            collapsed = trial.status == "failed" and "repetition" in trial.metrics
            if trial.status != "done" and not collapsed:
                continue
            run = Run.model_validate(trial.run_config())
            plain = run.model_dump(mode="json", exclude={"name": True, "training": {"seed"}})
            # Not over sweeps: a teacher of the same name may be another, and passes cost each sweep its own.
            key = (sweep.folder, json.dumps(plain, sort_keys=True))
            setting = grouped.setdefault(key, SeedGroup(sweep, run, []))
            (setting.collapsed if collapsed else setting.trials).append(trial)
    return sweeps, list(grouped.values())


def group_by_sweep(seed_groups: Iterable[SeedGroup]) -> list[tuple[Sweep, list[SeedGroup]]]:
    """The settings of each sweep, for a row of each: two sweeps may have trained by two recipes."""
    found: dict[Path, list[SeedGroup]] = {}
    for s in seed_groups:
        found.setdefault(s.sweep.folder, []).append(s)
    return [(mine[0].sweep, mine) for mine in found.values()]


def check_comparable(sweeps: Sequence[Sweep]) -> None:
    """UserError where sweeps of one teacher and data set by name are of two teachers, or of two data sets."""
    first: dict[tuple[str, str], Sweep] = {}
    for sweep in sweeps:
        if sweep.data is None:
            continue
        one = first.setdefault((sweep.teacher_name, sweep.data), sweep)
        differ = ["teacher"] if _differ(one.teacher.get("key"), sweep.teacher.get("key")) else []
        marks, others = one.teacher.get("data") or {}, sweep.teacher.get("data") or {}
        differ += [f"{split} split" for split in marks if _differ(marks[split], others.get(split))]
        if differ:
            raise UserError(
                f"{one.folder} and {sweep.folder} are both of {sweep.teacher_name} on {sweep.data}, but the "
                f"{' and the '.join(differ)} of one is not the other's; report them apart"
            )


def _differ(a: str | None, b: str | None) -> bool:
    """Whether two marks are known and not the same."""
    return a is not None and b is not None and a != b


def best_group(seed_groups: Iterable[SeedGroup]) -> SeedGroup | None:
    """The one with the highest mean validation score: validation decides, test reports."""
    scored = [(score, i, s) for i, s in enumerate(seed_groups) if (score := s.measure("score")) is not None]
    return max(scored, key=lambda entry: (entry[0], -entry[1]))[2] if scored else None


def compare_groups(a: SeedGroup, b: SeedGroup) -> tuple[Comparison, int] | None:
    """`a` less `b` on test, on the seeds that both have, and how many these are; None where there are none."""
    seeds = sorted(a.rows.keys() & b.rows.keys())
    ours, theirs = [a.rows[seed] for seed in seeds], [b.rows[seed] for seed in seeds]
    return (
        (paired_bootstrap_over_seeds(a.sweep.metric, ours, theirs), len(seeds))
        if _same_row_count([*ours, *theirs])
        else None
    )


def compare_to_teacher(group: SeedGroup) -> tuple[Comparison, int] | None:
    """A student, all its seeds, less its teacher on test; None where rows of either are missing."""
    rows, theirs = list(group.rows.values()), group.sweep.teacher_rows()
    if theirs is None or len(rows) < group.num_seeds or not _same_row_count([*rows, theirs]):
        return None
    return paired_bootstrap_over_seeds(group.sweep.metric, rows, [theirs]), group.num_seeds


def _same_row_count(rows: Sequence[np.ndarray]) -> bool:
    return len({len(one) for one in rows}) == 1


def _mean_or_none(values: Iterable[float | None]) -> float | None:
    """The mean; None where any value is missing: a mean over the rest would be another figure."""
    found: Sequence[float | None] = list(values)
    known = [float(v) for v in found if v is not None]
    return float(np.mean(known)) if known and len(known) == len(found) else None
