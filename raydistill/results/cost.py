"""Device-hours end to end: of a run with the teacher's passes that its method needs, and summed over a sweep.

A device is a GPU, or a CPU core. `passes` is what `sweep.json` keeps of the teacher's: the label sets behind each
`labels` setting with their device-hours, and the device-hours of the cache.
"""

from typing import Any

from raydistill.config.run import Run
from raydistill.results.records import Trial

Passes = dict[str, Any]


def pass_hours(passes: Passes) -> float:
    """All teacher passes of a sweep; a label set that serves several settings counts once."""
    sets = {name: hours for used in passes["labels"].values() for name, hours in used.items()}
    return float(sum(sets.values()) + passes["cache"])


def end_to_end(trial: Trial, passes: Passes | None) -> float | None:
    """A run's own device-hours and those of all passes that its method would need if it were run alone.

    Its label sets; and for `kd` the whole teacher cache, which is what knowing the teacher's states costs here. Other
    methods read no more of the cache than encoder states, which they would work out themselves without it: their
    share is not known and is not added. None where the sweep does not say what its passes took.
    """
    hours = trial.metrics.get("gpu_hours")
    if hours is None or passes is None:
        return None
    run = Run.model_validate(trial.run_config())
    used = passes["labels"].get(run.label_key)
    if used is None:
        return None
    return hours + sum(used.values()) + (passes["cache"] if run.method == "kd" else 0.0)
