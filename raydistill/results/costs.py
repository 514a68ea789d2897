"""Device-hours of runs, including the teacher passes that the runs need.

A device is a GPU or a CPU core. Every pass is counted once for each run or group of runs that needs it, however many
trials share it.
"""

from collections.abc import Iterable

from raydistill.results.records import Trial
from raydistill.results.sweep_record import TeacherPasses


def required_passes(trial: Trial, passes: TeacherPasses) -> TeacherPasses | None:
    """The teacher passes that a trial needs; None if the sweep does not record its label sets.

    Every method needs its label sets. `kd` also needs the whole teacher cache; the other methods read only its encoder
    states, unless the run turns the cache off.
    """
    run = trial.run_config()
    if run.label_key not in passes.labels:
        return None
    stores = passes.stores
    if run.method != "kd":
        reads_cache = run.training.teacher_cache != "off"
        stores = {name: h for name, h in stores.items() if reads_cache and name.startswith("encoder-")}
    return TeacherPasses(labels={run.label_key: passes.labels[run.label_key]}, stores=stores)


def end_to_end_hours(trial: Trial, passes: TeacherPasses) -> float | None:
    """Device-hours of a trial and of all teacher passes that the trial needs; None if either is unknown."""
    hours = trial.metrics.get("device_hours")
    required = None if hours is None else required_passes(trial, passes)
    return None if required is None or hours is None else hours + required.total_hours


def shared_pass_hours(trials: Iterable[Trial], passes: TeacherPasses) -> float:
    """Device-hours of the teacher passes that any of the trials needs, each counted once."""
    required = [needed for trial in trials if (needed := required_passes(trial, passes))]
    hours: dict[str, float] = {}
    for name, value in (item for needed in required for item in needed.hours_by_artifact.items()):
        hours[name] = max(value, hours.get(name, 0.0))  # runs may use different shares of a label set
    return sum(hours.values())
