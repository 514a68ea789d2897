"""Early stopping of trials against others of their own shape: pure functions, decided from validation scores alone.

Successive halving (Jamieson and Talwalkar, 2016; asynchronous: Li et al., 2020) keeps the better part of the trials at
each of a few rungs. Over all trials it would stop every small student, since a small student scores less than a large
one at every rung, and the front would lose its cheap end. So a trial is compared with trials of its own shape only.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from raydistill.config.run import Training
from raydistill.core.files import damage_told
from raydistill.results.records import (
    Trial,
    read_trials,
)

Curve = Sequence[tuple[float, float]]  # (share of the run's steps done, validation score), in order


def rungs(grace: float, reduction: int) -> list[float]:
    """Shares of a run at which trials are compared: `grace`, then each `reduction` times further, below 1."""
    found = []
    share = grace
    while share < 1:
        found.append(share)
        share *= reduction
    return found


def best_by(curve: Curve, rung: float) -> float | None:
    """The best score up to the first validation at or beyond `rung`; None for a curve that did not get there."""
    best = -math.inf
    for share, score in curve:
        best = max(best, score)
        if share >= rung:
            return best
    return None


def falls_behind(own: Curve, rivals: Sequence[Curve], grace: float, reduction: int) -> str | None:
    """Why a trial should stop, or None: it is not in the better 1/`reduction` of those that reached its last rung.

    Asked anew at every validation, so that a trial which had the rung for itself is compared with those that came
    later. Ties go on, and so does the best.
    """
    passed = [rung for rung in rungs(grace, reduction) if best_by(own, rung) is not None]
    if not passed:
        return None
    mine = best_by(own, passed[-1])
    assert mine is not None
    scores = [score for rival in rivals if (score := best_by(rival, passed[-1])) is not None]
    better = sum(score > mine for score in scores)
    kept = math.ceil((len(scores) + 1) / reduction)
    if better < kept:
        return None
    return (
        f"stopped early: {better} of {len(scores)} others of its shape were better after "
        f"{100 * passed[-1]:.3g}% of the steps, and {kept} of {len(scores) + 1} go on"
    )


def rivals(sweep: Path, key: str) -> tuple[Curve, list[Curve], float]:
    """What early stopping asks of a trial: its curve, those of the others of its shape, the share of its warm-up."""
    trials = {trial.key: trial for trial in read_trials(sweep)}
    shape = _shape_asked(trials[key])
    others = [t for t in trials.values() if t.key != key and t.status != "failed" and _shape_asked(t) == shape]
    return curve(trials[key]), [curve(trial) for trial in others], warm_up(trials[key])


def warm_up(trial: Trial) -> float:
    """Share of a trial's steps in which its learning rate rises; 0 before its first validation."""
    with damage_told(trial.folder / "metrics.jsonl"):
        lines = [line for line in trial.history() if "progress" in line]
        total = round(lines[-1]["step"] / lines[-1]["progress"]) if lines else 0
    if not total:
        return 0.0
    with damage_told(trial.folder / "run.json"):
        return Training.model_validate(trial.run_config().get("training", {})).warm_up(total) / total


def curve(trial: Trial) -> Curve:
    """(share of the steps done, score) of each validation; a run that ended by itself stays at its best."""
    with damage_told(trial.folder / "metrics.jsonl"):
        points = [(float(line["progress"]), float(line["score"])) for line in trial.history() if "progress" in line]
    if trial.status == "done" and points and points[-1][0] < 1:
        points.append((1.0, max(score for _, score in points)))
    return points


def _shape_asked(trial: Trial) -> str:
    """The size as the run names it: a trial under way has no other, and "" is the full teacher's."""
    with damage_told(trial.folder / "run.json"):
        return str((trial.run_config().get("student") or {}).get("size") or "")
