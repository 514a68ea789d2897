"""A confidence interval of a median that may be looked at after every value, for measurements that stop themselves.

An ordinary 95 % interval covers the median with 95 % probability after a number of values that is fixed beforehand.
A measurement that computes the interval again and again and stops when the interval looks good is wrong more often. A
confidence sequence covers the median after all numbers of values at once, so that any rule may stop the measurement.
"""

import bisect
from collections.abc import Sequence
from functools import lru_cache
from math import lgamma, log

# Both parameters of the Beta prior. Larger values give narrower intervals for many values, and wider ones for few.
PRIOR = 2.0


def median_interval(ordered: Sequence[float], confidence: float) -> tuple[float, float] | None:
    """Return an interval of the median that is valid after any number of values.

    The interval has no assumption on the distribution. The values must be independent with one median. The number of
    values up to the median is then binomial with probability 1/2. The interval holds the candidates for the median
    that a test of this probability does not reject, as the interval of the sign test does. The test's statistic is the
    likelihood ratio of the mixture of all probabilities with a Beta prior (Robbins, "Statistical methods related to
    the law of the iterated logarithm", Annals of Mathematical Statistics 41, 1970). By Ville's inequality, the
    probability that the statistic of the true median ever exceeds `1 / (1 - confidence)` is at most `1 - confidence`.
    Howard and Ramdas ("Sequential estimation of quantiles with applications to A/B testing and best-arm
    identification", Bernoulli 28, 2022) describe this and other confidence sequences of quantiles.

    Args:
        ordered: The values in ascending order.
        confidence: The probability that all intervals of a growing sequence of values cover the median.

    Returns:
        The lower and the upper end, which are two of the values; None for too few values (fewer than 10 at 95 %).
    """
    rank = interval_rank(len(ordered), confidence)
    return (ordered[rank - 1], ordered[-rank]) if rank else None


@lru_cache(maxsize=100_000)
def interval_rank(count: int, confidence: float) -> int:
    """Return which value from either end of `count` ordered values is the end of the interval; 0 if there is none."""

    def evidence(lower: int) -> float:
        """The logarithm of the likelihood ratio against a candidate with `lower` of the values up to it."""
        upper = count - lower
        return count * log(2) + _log_beta(PRIOR + lower, PRIOR + upper) - _log_beta(PRIOR, PRIOR)

    # The evidence falls as `lower` approaches half of the values. The rank is the number of candidates with enough.
    return bisect.bisect_right(range(count // 2 + 1), log(1 - confidence), key=lambda lower: -evidence(lower))


def _log_beta(a: float, b: float) -> float:
    return lgamma(a) + lgamma(b) - lgamma(a + b)
