"""Metrics of a user, as the how-to page on metrics shows them."""

from collections.abc import Sequence

from raydistill.evaluation.metric import ScoredText


def length_match(rows: Sequence[ScoredText]) -> list[float]:
    """100 for an output with as many words as the reference, less for each word more or less."""
    return [100 / (1 + abs(len(r.prediction.split()) - len(r.reference.split()))) for r in rows]


def copy_rate(rows: Sequence[ScoredText]) -> list[tuple[int, int]]:
    """100 x words of the output that occur in the source, and words of the output."""
    return [(100 * sum(w in r.source.split() for w in r.prediction.split()), len(r.prediction.split())) for r in rows]


def three_numbers(rows: Sequence[ScoredText]) -> list[list[int]]:
    """Three numbers for each row."""
    return [[1, 2, 3] for _ in rows]


def too_few(rows: Sequence[ScoredText]) -> list[float]:
    """A number too few."""
    return [1.0] * (len(rows) - 1)


def not_finite(rows: Sequence[ScoredText]) -> list[float]:
    """NaN for every row."""
    return [float("nan")] * len(rows)


def failing(rows: Sequence[ScoredText]) -> list[float]:
    """Fails."""
    raise KeyError("term list")


not_a_metric = 3
