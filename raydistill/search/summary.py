"""The summary that `raydistill sweep` ends with, as text and as a mapping for `--json`."""

from typing import Any

from raydistill.core.console import format_table
from raydistill.results.selection import Selection
from raydistill.results.tables import format_trial_counts, result_tables
from raydistill.search.prepare import PreparedSweep

TRIAL_FIELDS = ("key", "status", "reason", "method", "size", "metrics", "interval", "test", "params")


def format_summary(selection: Selection, prepared: PreparedSweep, failed: list[str], abandoned: list[str]) -> str:
    """Teacher, tables of trials and students, the choice for each budget, and the paths of figures and exports.

    Args:
        selection: The sweep's trials, students and choices.
        prepared: The teacher's record.
        failed: Keys of trials without a result, which the next command retries.
        abandoned: Keys of trials without a result whose shape no budget admits any more.
    """
    metric = selection.metric
    message = selection.record["stop"]["message"]
    lines = [
        f"sweep {selection.name}: {format_trial_counts(selection.trials)}{f' ({message})' if message else ''}",
        _describe_teacher({**prepared.teacher, "costs": selection.teacher["costs"]}, metric),
    ]
    if baseline := prepared.teacher["baseline"]:
        lines.append(f"first sentence as summary (Lead-1): {metric} {baseline['lead1'][metric]:.2f} on test")
    trials, *students = result_tables(selection)
    lines += ["", format_table(*trials), ""]
    for table in students:
        lines += ["finalists as served, on real rows:", format_table(*table), ""]
    lines += [f"{name}: {choice.reason}" for name, choice in selection.choices.items()]
    if failed:
        lines.append(f"{_count_trials(failed)} failed; rerun the command to retry: {', '.join(failed)}")
    if abandoned:
        lines.append(
            f"{_count_trials(abandoned)} abandoned, since no budget admits the size any more: {', '.join(abandoned)}"
        )
    lines += ["", f"front: {selection.sweep / 'front.html'} (and front.png)", f"table: {selection.sweep / 'table.md'}"]
    if any(selection.chosen_keys.values()):
        lines.append(f"chosen students: {selection.sweep / 'exports'}")
    return "\n".join(lines)


def summary_record(selection: Selection, prepared: PreparedSweep) -> dict[str, Any]:
    """The content of `format_summary` for programs."""
    chosen = selection.chosen_keys
    return {
        "name": selection.name,
        "metric": selection.metric,
        "stop_reason": selection.record["stop"]["message"],
        "teacher": prepared.teacher,
        "front": list(dict.fromkeys(selection.trial_key(key) for key in selection.front_keys)),
        "choices": {name: selection.trial_key(key) if key else None for name, key in chosen.items()},
        "decodings": {name: selection.student(key).decoding if key else None for name, key in chosen.items()},
        "finalists": [
            {
                "key": student.folder.name,
                "decoding": student.decoding,
                "metrics": student.metrics,
                "interval": student.interval,
                "test": student.test,
                "front": student.key in selection.front_keys,
            }
            for student in selection.students
            if student.decoding
        ],
        "trials": [{name: getattr(trial, name) for name in TRIAL_FIELDS} for trial in selection.trials],
    }


def _describe_teacher(teacher: dict[str, Any], metric: str) -> str:
    test, costs = teacher["test"], teacher["costs"]
    parts = [f"teacher {teacher['name']} ({teacher['size']}): {metric} {teacher['metrics'][metric]:.2f} on validation"]
    if test:
        low, high = test["interval"]
        parts.append(f"{test[metric]:.2f} [{low:.2f}, {high:.2f}] on test")
    parts += [f"{costs['latency_ms']:.1f} ms for 32", f"{costs['params_m']:.2f} M parameters"]
    return ", ".join(parts)


def _count_trials(keys: list[str]) -> str:
    return "1 trial" if len(keys) == 1 else f"{len(keys)} trials"
