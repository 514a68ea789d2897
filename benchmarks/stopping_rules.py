"""Published rules of early stopping, for replays of searches in which one trial runs at a time.

A rule gets the curve of a trial, the curves of the earlier trials, the first share of the steps at which it may stop a
trial, and a reduction factor. It returns whether the trial should stop. A curve ends where its trial was stopped.
"""

import statistics
from collections.abc import Callable, Sequence

from raydistill.search.early_stopping import Curve, best_score_at, rungs, should_stop_early

ASHA_REDUCTION = 4  # of Li et al. and of Ray Tune
MEDIAN_STARTUP_TRIALS = 5  # completed trials before the first decision, as in Optuna's MedianPruner

StoppingRule = Callable[[Curve, Sequence[Curve], float, int], bool]


def stops_per_rung(curve: Curve, others: Sequence[Curve], grace: float, reduction: int) -> bool:
    """The rule of the product, `should_stop_early`."""
    return should_stop_early(curve, others, grace, reduction) is not None


def stops_by_asha(curve: Curve, others: Sequence[Curve], grace: float, _reduction: int) -> bool:
    """Asynchronous successive halving (Li et al., 2020, "A System for Massively Parallel Hyperparameter Tuning").

    A trial continues if its best score is among the best 1/4 of all trials at the last rung that it reached, at least
    the best one; ties continue. A trial that does not continue is stopped and not paused, as in Optuna's
    SuccessiveHalvingPruner, since trials run one after the other.
    """
    reached = [rung for rung in rungs(grace, ASHA_REDUCTION) if best_score_at(curve, rung) is not None]
    if not reached:
        return False
    own = best_score_at(curve, reached[-1])
    assert own is not None
    scores = [score for other in others if (score := best_score_at(other, reached[-1])) is not None]
    num_kept = max(1, (len(scores) + 1) // ASHA_REDUCTION)
    return sum(score > own for score in scores) >= num_kept


def stops_by_median(curve: Curve, others: Sequence[Curve], grace: float, _reduction: int) -> bool:
    """The median stopping rule (Golovin et al., 2017, "Google Vizier", section 3.2.2).

    A trial is stopped if its best score until a step is below the median of the averages of the completed trials'
    scores until that step.
    """
    share = curve[-1][0]
    completed = [other for other in others if other[-1][0] >= 1]
    if share < grace or len(completed) < MEDIAN_STARTUP_TRIALS:
        return False
    earlier = [[score for step, score in other if step <= share] for other in completed]
    averages = [statistics.fmean(scores) for scores in earlier if scores]
    return bool(averages) and max(score for _, score in curve) < statistics.median(averages)
