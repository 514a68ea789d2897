"""Checks of runs before anything starts, from configurations and names of splits alone."""

from pathlib import Path
from typing import Any

from raydistill.config.label_sources import parse_labels
from raydistill.config.metric_names import AUTO
from raydistill.config.presets import check_teacher, teacher_preset
from raydistill.config.run import Run, Student
from raydistill.config.space import Space, corner_runs
from raydistill.core.errors import UserError
from raydistill.data.corpus import check_split, split_names
from raydistill.evaluation.metrics import get_metric
from raydistill.models.metadata import METADATA_FILE, CheckpointMetadata
from raydistill.training.records import check_teacher_repetition


def check_space(space: Space) -> None:
    """`check_run` for the runs at the corners of a space."""
    cache: dict[str, Any] = {}
    for run in corner_runs(space):
        check_run(run, cache)


def check_run(run: Run, cache: dict[str, Any] | None = None) -> None:
    """Check the splits of the data set, the metrics, and the layers and positions of the teacher.

    Args:
        run: The run to check.
        cache: Keeps split names and teacher configurations between calls.

    Raises:
        UserError: The run cannot be trained.
    """
    from raydistill.models.loading import load_config, locate_checkpoint
    from raydistill.models.shrinking import check_same_decoder, plan_student
    from raydistill.models.tokenization import resolve_max_tokens

    cache = {} if cache is None else cache
    _check_data(run, cache)
    for metric in (run.evaluation.metric, *run.evaluation.report):
        if metric != AUTO:
            get_metric(metric)  # the module of a user's metric can be imported
    for part in parse_labels(run.resolved_labels):
        if part.other_teacher:
            check_teacher(part.other_teacher)
    if run.teacher is None:
        return
    name = f"{run.teacher} {run.dataset.name}"
    if name not in cache:
        cache[name] = load_config(locate_checkpoint(run.teacher, run.dataset.name))
        _check_recorded_repetition(run, locate_checkpoint(run.teacher, run.dataset.name))
    plan_student(cache[name], run.student)
    if other := run.student.copy_from:
        if other not in cache:
            cache[other] = load_config(locate_checkpoint(other, run.dataset.name))
        check_same_decoder(cache[name], cache[other], other)
    preset = teacher_preset(run.teacher, run.dataset.name)
    resolve_max_tokens("max_source_tokens", run.dataset, preset, cache[name])
    resolve_max_tokens("max_target_tokens", run.dataset, preset, cache[name])


def _check_data(run: Run, cache: dict[str, Any]) -> None:
    """Check that the data set and the extra sources have the splits that the run reads; once per data set."""
    data = str(run.dataset)
    if data not in cache:
        cache[data] = split_names(run.dataset)
        missing = [split for split in ("train", "validation") if split not in cache[data]]
        if missing:
            raise UserError(
                f"{run.dataset.name}: training needs a train and a validation split; "
                f"there is no {' and no '.join(missing)}"
            )
        if run.dataset.selection_split:
            check_split(run.dataset, run.dataset.selection_split)
    if run.pseudo.extra and (extra := str(run.pseudo.extra)) not in cache:
        cache[extra] = None
        check_split(run.pseudo.extra.as_dataset(), run.pseudo.extra.split)


def _check_recorded_repetition(run: Run, teacher: str | Path) -> None:
    """Refuse a teacher by the repetition in its metadata; a checkpoint that is fine-tuned itself is allowed."""
    if run.method == "sft" and run.student == Student():
        return
    metadata = CheckpointMetadata.read_if_present(Path(teacher) / METADATA_FILE)
    scores = metadata.scores.get("validation") if metadata else None
    repetition = scores.metrics.get("repetition") if scores else None
    check_teacher_repetition(str(run.teacher), repetition, run.evaluation.allow_repetitive_teacher)
