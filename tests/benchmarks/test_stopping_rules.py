"""Early stopping by ASHA and by the median rule, with answers worked out by hand."""

import pytest

from benchmarks.stopping_rules import stops_by_asha, stops_by_median


def curve(*scores: float) -> list[tuple[float, float]]:
    """A curve with a score after each quarter of the steps."""
    return [((i + 1) / 4, score) for i, score in enumerate(scores)]


@pytest.mark.parametrize(
    ("others", "stops"),
    [
        ([], False),
        ([curve(4)], False),  # the best of 2 continues
        ([curve(6)], True),
        ([curve(6)] * 3 + [curve(4)] * 3, True),  # 1 of 7 continues
        ([curve(6)] + [curve(4)] * 6, False),  # 2 of 8 continue
        ([curve(6)] * 2 + [curve(4)] * 5, True),
        ([curve(5)] * 7, False),  # ties continue
    ],
)
def test_asha_keeps_a_quarter_and_at_least_the_best(others, stops):
    assert stops_by_asha(curve(5), others, 0.25, 3) is stops


def test_asha_compares_at_rungs_only():
    # The rungs are 1/4 and, beyond the end, 1. A trial is compared at its first rung also after its second validation.
    better = [curve(6)]
    assert not stops_by_asha([(0.1, 1.0)], better, 0.25, 3)
    assert stops_by_asha(curve(5, 9), better, 0.25, 3)
    assert not stops_by_asha(curve(5, 9), [curve(5, 10)], 0.25, 3)


def test_median_rule_compares_the_best_score_with_the_averages_of_completed_trials():
    completed = [curve(s, s + 2, s + 4, s + 6) for s in (1, 2, 3, 4, 5)]
    # Averages until half of the steps: 2, 3, 4, 5 and 6. The median is 4.
    assert not stops_by_median(curve(1, 4), completed, 0.25, 3)
    assert stops_by_median(curve(1, 3.9), completed, 0.25, 3)
    assert not stops_by_median(curve(4, 1), completed, 0.25, 3)
    # Until a quarter the averages are the first scores, with the median 3.
    assert stops_by_median(curve(2.9), completed, 0.25, 3)
    assert not stops_by_median(curve(2.9), completed, 0.5, 3)  # before the grace


def test_median_rule_needs_five_completed_trials():
    completed = [curve(5, 5, 5, 5)] * 4
    assert not stops_by_median(curve(1), completed, 0.25, 3)
    assert not stops_by_median(curve(1), [*completed, curve(5, 5)], 0.25, 3)
    assert stops_by_median(curve(1), [*completed, completed[0]], 0.25, 3)
