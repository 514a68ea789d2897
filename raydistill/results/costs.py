"""Device-hours end to end: a run's own and those of the teacher's passes that it needs; and what a method's gain cost.

A device is a GPU, or a CPU core. `passes` is what sweep.json keeps of the teacher's: under "labels" the label sets
behind each `label_key` with their device-hours, the device-hours of the "cache", and those by array under "stores". A
pass is charged once, to all that need it, however many trials share it.
"""

from collections.abc import Iterable
from typing import Any

from raydistill.config.run import Run
from raydistill.core.files import damage_told
from raydistill.results.records import Trial
from raydistill.results.selection import Outcome

Passes = dict[str, Any]


def pass_hours(passes: Passes) -> float:
    """All teacher passes of a sweep; a label set that serves several settings counts once."""
    sets = {name: hours for used in passes["labels"].values() for name, hours in used.items()}
    return float(sum(sets.values()) + passes["cache"])


def products(passes: Passes, unnamed: str) -> dict[str, float]:
    """Device-hours by the name of what a pass made: label sets, and arrays of the teacher cache.

    Two sweeps that read one have it by the same name. A record that does not name its arrays has its cache as
    `unnamed`.
    """
    sets = {name: hours for used in passes["labels"].values() for name, hours in used.items()}
    return {**sets, **passes.get("stores", {unnamed: passes["cache"]})}


def needed(trial: Trial, passes: Passes) -> Passes | None:
    """The passes that a run would need if it were run alone; None where the sweep does not say what they took.

    Its label sets, whatever its method; for `kd` the whole teacher cache, and for the others its encoder states, which
    they read instead of working them out, unless the cache was turned off for them.
    """
    with damage_told(trial.folder / "run.json"):
        run = Run.model_validate(trial.run_config())
    used = passes["labels"].get(run.label_key)
    if used is None:
        return None
    encoder = sum(hours for name, hours in passes.get("stores", {}).items() if name.startswith("encoder-"))
    cache = passes["cache"] if run.method == "kd" else encoder * (run.training.teacher_cache != "off")
    return {"labels": {run.label_key: used}, "cache": cache}


def end_to_end(trial: Trial, passes: Passes | None) -> float | None:
    """A run's own device-hours and those of all passes that it needs; None where these are not known."""
    hours = trial.metrics.get("gpu_hours")
    own = None if hours is None or passes is None else needed(trial, passes)
    return None if own is None or hours is None else hours + pass_hours(own)


def shared(trials: Iterable[Trial], passes: Passes | None) -> float:
    """Device-hours of the passes that any of the trials needs, each once."""
    if not passes:
        return 0.0
    each = [own for trial in trials if (own := needed(trial, passes))]
    labels = {key: used for own in each for key, used in own["labels"].items()}
    return pass_hours({"labels": labels, "cache": max((own["cache"] for own in each), default=0.0)})


def best_by_size(trials: list[Trial], method: str, metric: str) -> dict[str, float]:
    """The best validation score of a method at each size."""
    best: dict[str, float] = {}
    for trial in trials:
        score = trial.score(metric)
        if trial.scored and trial.method == method and score is not None:
            best[trial.size] = max(best.get(trial.size, score), score)
    return best


def gain(trials: list[Trial], method: str, metric: str) -> float | None:
    """Points that a method's best is above plain fine-tuning's best, the mean over the sizes that both have."""
    ours, plain = best_by_size(trials, method, metric), best_by_size(trials, "sft", metric)
    sizes = ours.keys() & plain.keys()
    return sum(ours[size] - plain[size] for size in sizes) / len(sizes) if sizes and method != "sft" else None


def method_table(found: Outcome) -> tuple[list[str], list[list[str]]]:
    """A header and a row per method: what it took, what it brought over `sft`, and that per device-hour."""
    header = ["method", "trials", "device h, trials", "device h, teacher", f"{found.metric} over sft", "per device h"]
    passes = found.teacher.get("passes")
    rows = []
    for method in sorted({trial.method for trial in found.trials if trial.method}):
        mine = [trial for trial in found.trials if trial.method == method]
        hours = sum(trial.device_hours for trial in mine)
        with damage_told(found.sweep / "sweep.json"):
            teacher = shared(mine, passes)
        points = gain(found.trials, method, found.metric)
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
