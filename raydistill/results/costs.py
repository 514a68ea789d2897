"""Device-hours end to end: a run's own and those of the teacher's passes that it needs; and what a method's gain cost.

A device is a GPU, or a CPU core. `passes` is what sweep.json keeps of the teacher's: under "labels" the label sets
behind each `label_key` with their device-hours, the device-hours of the "cache", and those by array under "stores". A
pass is charged once, to all that need it, however many trials share it.
"""

from collections.abc import Iterable
from typing import Any

from raydistill.config.run import Run
from raydistill.core.files import corrupt_file_error
from raydistill.results.records import Trial
from raydistill.results.selection import Selection

TeacherPasses = dict[str, Any]


def total_pass_hours(passes: TeacherPasses) -> float:
    """All teacher passes of a sweep; a label set that serves several settings counts once."""
    sets = {name: hours for used in passes["labels"].values() for name, hours in used.items()}
    return float(sum(sets.values()) + passes["cache"])


def hours_by_artifact(passes: TeacherPasses, default_name: str) -> dict[str, float]:
    """Device-hours by the name of what a pass made: label sets, and arrays of the teacher cache.

    Two sweeps that read one have it by the same name. A record that does not name its arrays has its cache as
    `default_name`.
    """
    sets = {name: hours for used in passes["labels"].values() for name, hours in used.items()}
    return {**sets, **passes.get("stores", {default_name: passes["cache"]})}


def required_passes(trial: Trial, passes: TeacherPasses) -> TeacherPasses | None:
    """The passes that a run would need if it were run alone; None where the sweep does not say what they took.

    Its label sets, whatever its method; for `kd` the whole teacher cache, and for the others its encoder states, which
    they read instead of working them out, unless the cache was turned off for them.
    """
    with corrupt_file_error(trial.folder / "run.json"):
        run = Run.model_validate(trial.run_config())
    used = passes["labels"].get(run.label_key)
    if used is None:
        return None
    encoder = sum(hours for name, hours in passes.get("stores", {}).items() if name.startswith("encoder-"))
    cache = passes["cache"] if run.method == "kd" else encoder * (run.training.teacher_cache != "off")
    return {"labels": {run.label_key: used}, "cache": cache}


def end_to_end_hours(trial: Trial, passes: TeacherPasses | None) -> float | None:
    """A run's own device-hours and those of all passes that it needs; None where these are not known."""
    hours = trial.metrics.get("gpu_hours")
    own = None if hours is None or passes is None else required_passes(trial, passes)
    return None if own is None or hours is None else hours + total_pass_hours(own)


def shared_pass_hours(trials: Iterable[Trial], passes: TeacherPasses | None) -> float:
    """Device-hours of the passes that any of the trials needs, each once."""
    if not passes:
        return 0.0
    each = [own for trial in trials if (own := required_passes(trial, passes))]
    labels = {key: used for own in each for key, used in own["labels"].items()}
    return total_pass_hours({"labels": labels, "cache": max((own["cache"] for own in each), default=0.0)})


def best_score_by_size(trials: list[Trial], method: str, metric: str) -> dict[str, float]:
    """The best validation score of a method at each size."""
    best: dict[str, float] = {}
    for trial in trials:
        score = trial.score(metric)
        if trial.scored and trial.method == method and score is not None:
            best[trial.size] = max(best.get(trial.size, score), score)
    return best


def mean_gain_over_sft(trials: list[Trial], method: str, metric: str) -> float | None:
    """Points that a method's best is above plain fine-tuning's best, the mean over the sizes that both have."""
    ours, plain = best_score_by_size(trials, method, metric), best_score_by_size(trials, "sft", metric)
    sizes = ours.keys() & plain.keys()
    return sum(ours[size] - plain[size] for size in sizes) / len(sizes) if sizes and method != "sft" else None


def method_table(selection: Selection) -> tuple[list[str], list[list[str]]]:
    """A header and a row per method: what it took, what it brought over `sft`, and that per device-hour."""
    header = [
        "method",
        "trials",
        "device h, trials",
        "device h, teacher",
        f"{selection.metric} over sft",
        "per device h",
    ]
    passes = selection.teacher.get("passes")
    rows = []
    for method in sorted({trial.method for trial in selection.trials if trial.method}):
        mine = [trial for trial in selection.trials if trial.method == method]
        hours = sum(trial.device_hours for trial in mine)
        with corrupt_file_error(selection.sweep / "sweep.json"):
            teacher = shared_pass_hours(mine, passes)
        points = mean_gain_over_sft(selection.trials, method, selection.metric)
        spent = hours + teacher
        rows.append(
            [
                method,
                str(len(mine)),
                f"{hours:.3f}",
                f"{teacher:.3f}",
                "-" if points is None else f"{points:+.2f}",
                "-" if points is None or spent == 0 else f"{points / spent:+.2f}",
            ]
        )
    return header, rows
