"""Device-hours of runs, including the teacher passes that the runs need.

A device is a GPU or a CPU core. A teacher pass computes a label set or the teacher cache. sweep.json records the passes
as `{"labels": {label_key: {set name: hours}}, "cache": hours, "stores": {array name: hours}}`. Every pass is counted
once for each run or group of runs that needs it, however many trials share it.
"""

from collections.abc import Iterable
from typing import Any

from raydistill.config.run import Run
from raydistill.core.files import corrupt_file_error
from raydistill.results.records import Trial

TeacherPasses = dict[str, Any]


def total_pass_hours(passes: TeacherPasses) -> float:
    """Device-hours of all teacher passes of a sweep; a label set that several label keys share counts once."""
    return float(sum(_label_set_hours(passes).values()) + passes["cache"])


def hours_by_artifact(passes: TeacherPasses, default_name: str) -> dict[str, float]:
    """Device-hours by artifact: label sets and arrays of the teacher cache.

    Sweeps that share an artifact report it under the same name. A record without named arrays reports its cache under
    `default_name`.
    """
    return {**_label_set_hours(passes), **passes.get("stores", {default_name: passes["cache"]})}


def required_passes(trial: Trial, passes: TeacherPasses) -> TeacherPasses | None:
    """The teacher passes that a trial needs; None if the sweep does not record its label sets.

    Every method needs its label sets. `kd` also needs the whole teacher cache; the other methods read only its encoder
    states, unless the run turns the cache off.
    """
    with corrupt_file_error(trial.folder / "run.json"):
        run = Run.model_validate(trial.run_config())
    label_sets = passes["labels"].get(run.label_key)
    if label_sets is None:
        return None
    encoder_hours = sum(hours for name, hours in passes.get("stores", {}).items() if name.startswith("encoder-"))
    cache = passes["cache"] if run.method == "kd" else encoder_hours * (run.training.teacher_cache != "off")
    return {"labels": {run.label_key: label_sets}, "cache": cache}


def end_to_end_hours(trial: Trial, passes: TeacherPasses | None) -> float | None:
    """Device-hours of a trial and of all teacher passes that the trial needs; None if either is unknown."""
    hours = trial.metrics.get("gpu_hours")
    required = None if hours is None or passes is None else required_passes(trial, passes)
    return None if required is None or hours is None else hours + total_pass_hours(required)


def shared_pass_hours(trials: Iterable[Trial], passes: TeacherPasses | None) -> float:
    """Device-hours of the teacher passes that any of the trials needs, each counted once."""
    if not passes:
        return 0.0
    required = [needed for trial in trials if (needed := required_passes(trial, passes))]
    labels = {key: label_sets for needed in required for key, label_sets in needed["labels"].items()}
    return total_pass_hours({"labels": labels, "cache": max((needed["cache"] for needed in required), default=0.0)})


def _label_set_hours(passes: TeacherPasses) -> dict[str, float]:
    return {name: hours for label_sets in passes["labels"].values() for name, hours in label_sets.items()}
