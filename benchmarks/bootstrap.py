"""Time of a paired bootstrap: a product with the counts of drawn rows, a loop over resamples, and scipy's bootstrap.

python -m benchmarks.bootstrap
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
from scipy import stats

from benchmarks.common import BenchmarkResult, describe_machine
from benchmarks.selection_errors import make_population
from raydistill.evaluation import metrics
from raydistill.evaluation.ngram_counts import bleu_from_sums
from raydistill.results.tables import markdown_table

NUM_ROWS = 1000
LOOP_RESAMPLES = 200  # the loop's time is measured for these and scaled to all resamples


def time_product(metric: str, a: np.ndarray, b: np.ndarray) -> float:
    """Seconds of the package's paired bootstrap, with the drawing of the rows."""
    metrics.resample_counts.cache_clear()
    return _seconds(lambda: metrics.paired_bootstrap(metric, a, b))


def time_loop(metric: str, a: np.ndarray, b: np.ndarray) -> float:
    """Seconds of a loop that draws rows and scores both systems, scaled to all resamples."""
    rng = np.random.default_rng(0)

    def loop() -> None:
        for _ in range(LOOP_RESAMPLES):
            drawn = rng.integers(0, len(a), len(a))
            metrics.corpus_score(metric, a[drawn])
            metrics.corpus_score(metric, b[drawn])

    return _seconds(loop) * metrics.NUM_RESAMPLES / LOOP_RESAMPLES


def time_scipy(metric: str, a: np.ndarray, b: np.ndarray) -> float:
    """Seconds of `scipy.stats.bootstrap` over paired rows, vectorised over batches of 200 resamples."""

    def difference(*columns: np.ndarray, axis: int) -> np.ndarray:
        sums = [column.sum(axis=axis) for column in columns]
        if metric != "bleu":
            return (sums[0] - sums[1]) / len(a)
        halves = (np.stack(sums[:10], axis=-1), np.stack(sums[10:], axis=-1))
        first, second = (bleu_from_sums(np.atleast_2d(half)) for half in halves)
        return first - second

    columns = [column for rows in (a, b) for column in rows.reshape(len(rows), -1).astype(float).T]

    def resample() -> None:
        stats.bootstrap(
            columns,
            difference,
            n_resamples=metrics.NUM_RESAMPLES,
            batch=200,
            paired=True,
            vectorized=True,
            method="percentile",
            rng=np.random.default_rng(0),
        )

    return _seconds(resample)


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main() -> None:
    """Time all sides for both metrics and write the result files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each side; the median is reported")
    repeats = parser.parse_args().repeats
    machine = describe_machine()
    rows, data = [], {}
    for metric in ("rouge2", "bleu"):
        a, b = (student[:NUM_ROWS] for student in make_population(metric, -0.5, num_rows=4 * NUM_ROWS).students[:2])
        sides = {"product": time_product, "loop": time_loop, "scipy": time_scipy}
        data[metric] = {
            name: statistics.median(side(metric, a, b) for _ in range(repeats)) for name, side in sides.items()
        }
        rows.append([metric, *(f"{seconds:.2f}" for seconds in data[metric].values())])
    header = ["metric", "product of counts and statistics, s", "loop over resamples, s", "scipy.stats.bootstrap, s"]
    text = f"One paired comparison of {NUM_ROWS:,} rows with {metrics.NUM_RESAMPLES:,} resamples, with one process."
    title = "Time of a paired bootstrap"
    print(BenchmarkResult("bootstrap", title, f"{text}\n\n{markdown_table(header, rows)}", data, machine).write())


if __name__ == "__main__":
    main()
