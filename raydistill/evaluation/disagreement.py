"""Where metrics disagree about two systems: in the corpus scores, and in single rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from raydistill.evaluation.metrics import Comparison, Scores, paired_bootstrap, row_scores


@dataclass(frozen=True)
class RowDisagreement:
    """A row on which two metrics prefer different systems.

    Attributes:
        row: Index of the row.
        differences: By metric, the row's score of the first system minus that of the second.
    """

    row: int
    differences: dict[str, float]


def compare_metrics(first: Scores, second: Scores) -> dict[str, Comparison]:
    """Compare two systems on the same rows by each metric that both were scored by, the deciding metric first.

    Raises:
        ValueError: The systems have different numbers of rows.
    """
    return {
        name: paired_bootstrap(name, rows, second.statistics[name])
        for name, rows in first.statistics.items()
        if name in second.statistics
    }


def opposed_metrics(comparisons: Mapping[str, Comparison]) -> tuple[list[str], list[str]]:
    """The metrics that prefer the first system, and the metrics that prefer the second, by intervals without 0."""
    first = [name for name, comparison in comparisons.items() if comparison.low > 0]
    return first, [name for name, comparison in comparisons.items() if comparison.high < 0]


def find_row_disagreements(first: Scores, second: Scores, metrics: Sequence[str]) -> list[RowDisagreement]:
    """The rows on which two of the metrics prefer different systems, the largest disagreement first.

    The difference of each metric is divided by its standard deviation over the rows. The size of a disagreement is the
    smaller of the largest difference in favour of the first system and the largest in favour of the second.
    """
    differences = {
        name: row_scores(name, first.statistics[name]) - row_scores(name, second.statistics[name]) for name in metrics
    }
    if len(differences) < 2:
        return []
    scaled = np.stack([values / (values.std() or 1.0) for values in differences.values()])
    sizes = np.minimum(scaled.max(axis=0), -scaled.min(axis=0))
    return [
        RowDisagreement(int(row), {name: float(values[row]) for name, values in differences.items()})
        for row in np.argsort(-sizes, kind="stable")
        if sizes[row] > 0
    ]
