"""The confidence sequence of a median: its ends, and its coverage over all numbers of values, computed exactly."""

import itertools
import random
from fractions import Fraction
from math import comb, factorial

import pytest

from raydistill.evaluation.confidence_sequence import interval_rank, median_interval


def likelihood_ratio(count, lower):
    """Mixture over Beta(2, 2) of p^lower (1-p)^upper, over (1/2)^count. The integrals of factorials by hand."""
    upper = count - lower
    return Fraction(6 * factorial(lower + 1) * factorial(upper + 1) * 2**count, factorial(count + 3))


def probability_of_missing_the_median(rank, most):
    """The probability that the interval misses the median after any number of values up to `most`.

    The number of values below the median is a binomial walk; the interval misses where the walk comes too near to
    either end.
    """
    inside, missed = {0: 1.0}, 0.0
    for count in range(1, most + 1):
        moved: dict[int, float] = {}
        for lower, probability in inside.items():
            for step in (0, 1):
                moved[lower + step] = moved.get(lower + step, 0.0) + probability / 2
        ends = rank(count)
        inside = {lower: p for lower, p in moved.items() if ends <= lower <= count - ends}
        missed += sum(moved.values()) - sum(inside.values())
    return missed


def sign_test_rank(count):
    """The rank of the ordinary 95 % interval of a median, for a number of values that is fixed beforehand."""
    tail = itertools.accumulate(comb(count, lower) for lower in range(count + 1))
    return sum(1 for _ in itertools.takewhile(lambda ways: 40 * ways <= 2**count, tail))


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_rank_counts_the_candidates_with_enough_evidence(confidence):
    limit = 1 / (1 - Fraction(str(confidence)))
    for count in range(80):
        rejected = [lower for lower in range(count // 2 + 1) if likelihood_ratio(count, lower) >= limit]
        assert interval_rank(count, confidence) == len(rejected)


def test_interval_consists_of_ordered_values():
    assert median_interval([], 0.95) is None
    assert median_interval([float(n) for n in range(8)], 0.95) is None
    values = [float(n) for n in range(1, 16)]
    assert median_interval(values, 0.95) == (2.0, 14.0)  # 32,768 x 6 x 2! x 15! / 18! = 80.3; with 3! x 14!: 16.1 < 20


def test_probability_of_ever_missing_the_median_is_at_most_5_percent():
    missed = probability_of_missing_the_median(lambda count: interval_rank(count, 0.95), 400)
    assert 0.01 < missed <= 0.05


def test_repeated_looks_at_an_ordinary_interval_miss_the_median_too_often():
    assert probability_of_missing_the_median(sign_test_rank, 400) > 0.2


def test_interval_becomes_narrow_and_covers_the_median():
    random.seed(0)
    values = sorted(random.gauss(3, 1) for _ in range(4000))
    lower, upper = median_interval(values, 0.95) or (0.0, 0.0)
    assert 2.8 < lower < 3 < upper < 3.2
