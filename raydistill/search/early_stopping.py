"""Early stopping of trials by successive halving among trials of the same shape.

Asynchronous successive halving (Li et al., 2020, "A System for Massively Parallel Hyperparameter Tuning") keeps the
better part of the trials at each of a few rungs. Halving over all trials would stop every small student, since a small
student scores less than a large one at every rung, and the Pareto front would lose its cheap end.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from raydistill.results.records import Trial
from raydistill.results.trial_index import trial_index
from raydistill.training.records import Validation

Curve = Sequence[tuple[float, float]]  # (share of the run's steps, validation score), in order of steps


def rungs(grace: float, reduction: int) -> list[float]:
    """The shares of a run at which trials are compared: `grace` times powers of `reduction`, below 1."""
    shares = []
    share = grace
    while share < 1:
        shares.append(share)
        share *= reduction
    return shares


def best_score_at(curve: Curve, rung: float) -> float | None:
    """The best score up to the first validation at or beyond `rung`; None if the curve ends before the rung."""
    best = -math.inf
    for share, score in curve:
        best = max(best, score)
        if share >= rung:
            return best
    return None


def should_stop_early(curve: Curve, peers: Sequence[Curve], grace: float, reduction: int) -> str | None:
    """Decide whether a trial should stop at its last rung.

    The trial continues if it is in the better 1/`reduction` of the curves that reached the rung; ties continue. Ask at
    every validation, since peers can reach the rung after the trial did.

    Args:
        curve: The trial's validation scores.
        peers: Validation scores of other trials of the same shape.
        grace: The first rung.
        reduction: Ratio of two rungs, and of the trials before and after a rung.

    Returns:
        The reason to stop, or None.
    """
    reached = [rung for rung in rungs(grace, reduction) if best_score_at(curve, rung) is not None]
    if not reached:
        return None
    own = best_score_at(curve, reached[-1])
    assert own is not None
    scores = [score for peer in peers if (score := best_score_at(peer, reached[-1])) is not None]
    num_better = sum(score > own for score in scores)
    num_kept = math.ceil((len(scores) + 1) / reduction)
    if num_better < num_kept:
        return None
    return (
        f"stopped early: {num_better} of {len(scores)} others of its shape were better after "
        f"{100 * reached[-1]:.3g}% of the steps, and {num_kept} of {len(scores) + 1} continue"
    )


def peer_curves(sweep: Path, key: str) -> tuple[Curve, list[Curve], float]:
    """The curve of a trial, the curves of the other trials of its shape, and the share of its warm-up.

    Of the other trials only the files are read that changed since the last call in this process.
    """
    trials = trial_index(sweep).read()
    own = trials[key]
    peers = [t for t in trials.values() if t is not own and t.trial.status != "failed" and t.shape == own.shape]
    curve, *others = (validation_curve(indexed.trial, indexed.history) for indexed in (own, *peers))
    return curve, others, warmup_share(own.trial, own.history)


def warmup_share(trial: Trial, history: Sequence[Validation]) -> float:
    """Share of a trial's steps in which the learning rate rises; 0 before the first validation."""
    if not history:
        return 0.0
    total = history[-1].total_steps
    return trial.run_config().training.get_warmup_steps(total) / total


def validation_curve(trial: Trial, history: Sequence[Validation]) -> Curve:
    """The validation scores of a trial. A run that ended before its last step keeps its best score until the end."""
    points = [(validation.step / validation.total_steps, validation.score) for validation in history]
    if trial.status == "done" and points and points[-1][0] < 1:
        points.append((1.0, max(score for _, score in points)))
    return points
