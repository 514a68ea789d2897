"""Where metrics disagree about two systems."""

import numpy as np
import pytest

from raydistill.evaluation.disagreement import compare_metrics, find_row_disagreements, opposed_metrics
from raydistill.evaluation.metrics import Comparison, Scores, score

REFERENCES = ["the cat sat on the mat", "a dog ran home", "yes"]


def test_row_disagreements_are_sorted_by_size() -> None:
    rows, fewer, more = np.full(4, 10.0), np.array([4, 4, 4, 0]), np.array([1, 3, 0, 5])
    first = Scores({}, rows, "a", {"b": rows})
    # Metric a prefers the first system on rows 0 and 1, metric b prefers the second there, more clearly on row 1
    second = Scores({}, rows - fewer, "a", {"b": rows + more})
    disagreements = find_row_disagreements(first, second, ["a", "b"])
    assert [item.row for item in disagreements] == [1, 0]
    assert disagreements[0].differences == {"a": 4.0, "b": -3.0}
    assert find_row_disagreements(first, second, ["a"]) == []


def test_a_row_with_a_match_of_words_but_not_of_the_whole_text() -> None:
    first = score("exact_match", ["x", "a dog ran home", "no"], REFERENCES, reported=["chrf++"])
    second = score("exact_match", ["x", "a dog ran", "yesterday, yes"], REFERENCES, reported=["chrf++"])
    assert find_row_disagreements(first, second, ["exact_match", "chrf++"]) == []  # row 2: no exact match on any side
    rouge = score("rouge1", ["mat the on sat cat the", "a", "yes"], REFERENCES, reported=["bleu"])
    other = score("rouge1", ["the cat sat on the", "a", "yes"], REFERENCES, reported=["bleu"])
    [item] = find_row_disagreements(rouge, other, ["rouge1", "bleu"])
    assert item.row == 0
    assert item.differences["rouge1"] == pytest.approx(100 - 100 * 2 * 5 / (5 + 6))
    assert item.differences["bleu"] < 0


def test_opposed_metrics_need_intervals_without_zero() -> None:
    comparisons = {
        "chrf++": Comparison(1.0, 0.5, 1.5, 0.001),
        "bleu": Comparison(-2.0, -3.0, -1.0, 0.001),
        "rouge2": Comparison(-1.0, -2.0, 0.5, 0.2),
    }
    assert opposed_metrics(comparisons) == (["chrf++"], ["bleu"])


def test_systems_are_compared_by_every_metric() -> None:
    first = score("chrf", REFERENCES, REFERENCES, reported=["bleu", "exact_match"])
    second = score("chrf", ["the cat", "a dog", "no"], REFERENCES, reported=["bleu", "exact_match"])
    comparisons = compare_metrics(first, second)
    assert list(comparisons) == ["chrf", "bleu", "exact_match"]
    assert comparisons["exact_match"].difference == pytest.approx(100)
