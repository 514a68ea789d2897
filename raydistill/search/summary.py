"""The summary that `raydistill sweep` ends with, as text and as a mapping for `--json`."""

from typing import Any

from raydistill.config.serving import ServingConfig
from raydistill.core.console import format_table
from raydistill.evaluation.metrics import corpus_score
from raydistill.results.formatting import describe_split, format_count, format_score
from raydistill.results.records import Trial
from raydistill.results.selection import Selection
from raydistill.results.sweep_record import SweepTeacher
from raydistill.results.tables import format_trial_counts, result_tables

TRIAL_FIELDS = ("key", "status", "reason", "method", "size", "metrics", "interval", "test", "params")


def format_summary(selection: Selection, failed: list[str], abandoned: list[str]) -> str:
    """Teacher, tables of trials and students, the choice for each budget, and the paths of figures and exports.

    Args:
        selection: The sweep's trials, students and choices.
        failed: Keys of trials without a result, which the next command retries.
        abandoned: Keys of trials without a result whose shape no budget admits any more.
    """
    metric = selection.metric
    message = selection.record.stop.message
    lines = [
        f"sweep {selection.name}: {format_trial_counts(selection.trials)}{f' ({message})' if message else ''}",
        _describe_teacher(selection.teacher, metric, selection.split),
    ]
    if lead1 := selection.teacher.lead1:
        lines.append(f"first sentence as summary (Lead-1): {metric} {lead1[metric]:.2f} on test")
    trials, *students = result_tables(selection)
    lines += ["", format_table(*trials), ""]
    for table in students:
        lines += ["finalists as served, on real rows:", format_table(*table), ""]
    lines += [f"{name}: {choice.reason}" for name, choice in selection.choices.items()]
    if failed:
        lines.append(f"{format_count(len(failed), 'trial')} failed; rerun the command to retry: {', '.join(failed)}")
    if abandoned:
        count = format_count(len(abandoned), "trial")
        lines.append(f"{count} abandoned, since no budget admits the size any more: {', '.join(abandoned)}")
    lines += ["", f"front: {selection.sweep / 'front.html'} (and front.png)", f"table: {selection.sweep / 'table.md'}"]
    if any(selection.chosen_keys.values()):
        lines.append(f"chosen students: {selection.sweep / 'exports'}")
    return "\n".join(lines)


def summary_record(selection: Selection) -> dict[str, Any]:
    """The content of `format_summary` for programs."""
    chosen = selection.chosen_keys
    return {
        "name": selection.name,
        "metric": selection.metric,
        "reported": selection.metrics.reported,
        "stop_reason": selection.record.stop.message,
        "teacher": selection.record.teacher.model_dump(mode="json"),
        "front": list(dict.fromkeys(selection.trial_key(key) for key in selection.front_keys)),
        "choices": {name: selection.trial_key(key) if key else None for name, key in chosen.items()},
        "serving": {name: _dump(selection.student(key).serving) if key else None for name, key in chosen.items()},
        "finalists": [
            {
                "key": student.folder.name,
                "serving": _dump(student.serving),
                "speedup": student.metrics.get("speedup"),
                "speedup_same_serving": student.metrics.get("speedup_same_serving"),
                "split": student.split,
                "seeds": _seed_scores(selection, student),
                "metrics": student.metrics,
                "interval": student.interval,
                "test": student.test,
                "front": student.key in selection.front_keys,
            }
            for student in selection.students
            if student.serving
        ],
        "trials": [{name: getattr(trial, name) for name in TRIAL_FIELDS} for trial in selection.trials],
    }


def _seed_scores(selection: Selection, student: Trial) -> dict[str, float]:
    """The main score of each seed of a student, whose mean is the student's score."""
    rows = {str(run.seed): run.row_statistics() for run in (student, *student.repeats)}
    return {seed: corpus_score(selection.metric, own) for seed, own in rows.items() if own is not None}


def _dump(serving: ServingConfig | None) -> dict[str, Any] | None:
    return serving.model_dump() if serving else None


def _describe_teacher(teacher: SweepTeacher, metric: str, split: str) -> str:
    test, costs = teacher.test, teacher.costs
    parts = [
        f"teacher {teacher.name} ({teacher.size}): {metric} {teacher.metrics[metric]:.2f} on {describe_split(split)}"
    ]
    if test:
        parts.append(f"{format_score(test.metrics[metric], test.interval)} on test")
    parts += [f"{costs['latency_ms']:.1f} ms for 32", f"{costs['params_m']:.2f} M parameters"]
    return ", ".join(parts)
