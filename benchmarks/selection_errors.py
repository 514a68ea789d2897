"""How often the choice of a student is wrong: non-inferiority, and the earlier rule, in simulated sweeps.

A population of rows is generated, so that the true scores of all students are known. Each simulated sweep draws rows
from the population and calls the product's `choose`.

    python -m benchmarks.selection_errors
"""

import argparse
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
from scipy import stats

from benchmarks.common import BenchmarkResult, describe_machine
from raydistill.core.console import print_progress
from raydistill.core.machine import available_cores
from raydistill.evaluation.metrics import corpus_score
from raydistill.results.pareto import Candidate, choose
from raydistill.results.tables import markdown_table

TOLERANCE = 0.5
POPULATION_ROWS = 40_000
ROW_COUNTS = (200, 500, 1000)
# True differences of the cheaper students to the best one, as multiples of the tolerance.
DIFFERENCES = (0.0, -1.0, -2.0)
CHEAPER_COSTS = (20.0, 40.0, 60.0, 80.0)
BEST_COST = 100.0
METRICS = ("rouge2", "bleu")


@dataclass(frozen=True)
class Population:
    """Per-row statistics of the best student (the first) and of the cheaper ones, with their true scores."""

    metric: str
    students: list[np.ndarray]
    scores: list[float]


def make_population(metric: str, difference: float, seed: int = 0, num_rows: int = POPULATION_ROWS) -> Population:
    """A population in which each cheaper student differs from the best by `difference` points."""
    rng = np.random.default_rng(seed)
    make_student = {"rouge2": _rouge_students, "bleu": _bleu_students}[metric](rng, num_rows)
    students = [make_student(1.0)]
    target = corpus_score(metric, students[0]) + difference
    for _ in CHEAPER_COSTS:
        noise_seed = int(rng.integers(2**31))
        low, high = 0.5, 1.5
        for _ in range(16):  # bisection of the quality; 16 halvings are enough for 0.01 points
            quality = (low + high) / 2
            rows = make_student(quality, noise_seed)
            low, high = (quality, high) if corpus_score(metric, rows) < target else (low, quality)
        students.append(rows)
    return Population(metric, students, [corpus_score(metric, rows) for rows in students])


def _rouge_students(rng: np.random.Generator, num_rows: int) -> Callable[..., np.ndarray]:
    """ROUGE-2 like scores: 15 % zeros, else a beta distribution (mean 20); correlated between students by rows."""
    shares = np.linspace(0, 1, 4097)
    quantiles = 100 * stats.beta.ppf(np.clip((shares - 0.15) / 0.85, 0, 1), 1.3, 4.2)
    shared = rng.normal(size=num_rows)

    def make_student(quality: float, noise_seed: int = 1) -> np.ndarray:
        own = np.random.default_rng(noise_seed).normal(size=num_rows)
        latent = np.sqrt(0.7) * shared + np.sqrt(0.3) * own
        return quality * np.interp(stats.norm.cdf(latent), shares, quantiles)

    return make_student


def _bleu_students(rng: np.random.Generator, num_rows: int) -> Callable[..., np.ndarray]:
    """BLEU statistics of sentences of about 13 words, in which each word is right or wrong.

    Whether a word is right depends on the sentence and the word, which all students share, and on the student. An
    n-gram matches if all of its words are right.
    """
    lengths = np.clip(rng.lognormal(np.log(12), 0.35, num_rows).astype(int), 4, 40)
    exists = np.arange(lengths.max()) < lengths[:, None]
    shared = 0.6 * rng.normal(size=(num_rows, 1)) + 0.8 * rng.normal(size=exists.shape)

    def make_student(quality: float, noise_seed: int = 1) -> np.ndarray:
        noise = np.random.default_rng(noise_seed)
        latent = np.sqrt(0.85) * shared + np.sqrt(0.15) * noise.normal(size=exists.shape)
        right = exists & (latent < 0.42 + (quality - 1))
        output_lengths = np.maximum(4, lengths + (noise.random(num_rows) < 0.2))
        matches = []
        run = right
        for n in range(4):
            matches.append(run.sum(axis=1))
            run = run[:, :-1] & right[:, n + 1 :]
        totals = [output_lengths - n for n in range(4)]
        return np.stack([*np.minimum(matches, totals), *totals, output_lengths, lengths], axis=1)

    return make_student


@dataclass(frozen=True)
class Outcome:
    """One simulated sweep.

    Attributes:
        highest: Whether the best student, which is also the most expensive, has the highest score.
        replaced: Whether a cheaper student replaced the student with the highest score.
        replaced_by_former_rule: The same by the rule "the cheapest student whose interval contains 0".
        standard_error: Standard error of the difference between the first cheaper student and the highest.
    """

    highest: bool
    replaced: bool
    replaced_by_former_rule: bool
    standard_error: float


def simulate_sweep(population: Population, num_rows: int, seed: int) -> Outcome:
    """Draw rows from the population, score all students on them, and choose."""
    rng = np.random.default_rng([seed, num_rows])
    drawn = rng.choice(len(population.students[0]), size=num_rows, replace=False)
    candidates = []
    for i, (rows, cost) in enumerate(zip(population.students, (BEST_COST, *CHEAPER_COSTS), strict=True)):
        own = rows[drawn]
        candidates.append(Candidate(str(i), corpus_score(population.metric, own), own, {"latency_ms": cost}))
    choice = choose(candidates, {}, population.metric, TOLERANCE)
    widths = [comparison.high - comparison.low for comparison in choice.comparisons.values()]
    return Outcome(
        highest=choice.highest is candidates[0],
        replaced=choice.best is not choice.highest,
        replaced_by_former_rule=any(comparison.high >= 0 for comparison in choice.comparisons.values()),
        standard_error=widths[0] / (2 * 1.96) if widths else np.nan,
    )


@dataclass(frozen=True)
class Rates:
    """Shares of simulated sweeps at one metric, number of rows and true difference.

    Attributes:
        metric: The metric.
        rows: Number of rows.
        difference: True difference of every cheaper student to the best one, in points.
        replaced: Sweeps in which a cheaper student replaced the best one.
        replaced_by_former_rule: The same by the earlier rule.
        cheaper_is_highest: Sweeps in which a cheaper student has the highest score, before any rule is applied.
        standard_error: Median standard error of a difference.
    """

    metric: str
    rows: int
    difference: float
    replaced: float
    replaced_by_former_rule: float
    cheaper_is_highest: float
    standard_error: float


def measure_rates(population: Population, difference: float, num_rows: int, seeds: range) -> Rates:
    """Simulate one sweep per seed."""
    outcomes = [simulate_sweep(population, num_rows, seed) for seed in seeds]
    return Rates(
        metric=population.metric,
        rows=num_rows,
        difference=difference,
        replaced=_share(o.highest and o.replaced for o in outcomes),
        replaced_by_former_rule=_share(o.highest and o.replaced_by_former_rule for o in outcomes),
        cheaper_is_highest=_share(not o.highest for o in outcomes),
        standard_error=float(np.nanmedian([o.standard_error for o in outcomes])),
    )


def _share(values: Iterable[bool]) -> float:
    """The share of values that are true."""
    return statistics.fmean(map(float, values))


def rates_table(rates: list[Rates]) -> str:
    """The rates as a Markdown table."""
    header = ["metric", "rows", "true difference", "standard error", "best replaced", "best replaced, earlier rule"]
    header.append("a cheaper student has the highest score")
    rows = [
        [
            row.metric,
            f"{row.rows:,}",
            f"{row.difference:+.1f}",
            f"{row.standard_error:.2f}",
            *(f"{x:.1%}" for x in (row.replaced, row.replaced_by_former_rule, row.cheaper_is_highest)),
        ]
        for row in rates
    ]
    return markdown_table(header, rows)


def main() -> None:
    """Simulate all metrics, differences and numbers of rows and write the result files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweeps", type=int, default=2000, help="simulated sweeps per row of the table")
    num_sweeps = parser.parse_args().sweeps
    machine = describe_machine()
    rates: list[Rates] = []
    processes = len(available_cores())
    parts = [range(start, num_sweeps, processes) for start in range(processes)]
    with ProcessPoolExecutor(processes) as pool:
        for metric in METRICS:
            for multiple in DIFFERENCES:
                difference = multiple * TOLERANCE
                population = make_population(metric, difference)
                for num_rows in ROW_COUNTS:
                    work = partial(measure_rates, population, difference, num_rows)
                    rates.append(_merge(list(pool.map(work, parts)), parts))
                print_progress(f"selection errors: {metric} at {difference:+.1f} done")
    text = (
        f"{num_sweeps} simulated sweeps per row. The best student is the most expensive one; "
        f"{len(CHEAPER_COSTS)} cheaper students all have the same true difference to it. The tolerance is {TOLERANCE} "
        "points. *best replaced*: the best student has the highest score, and the rule chooses a cheaper one. *a "
        "cheaper student has the highest score*: errors of sampling that no rule over these scores can see; only more "
        "rows reduce them."
    )
    data = [asdict(row) for row in rates]
    title = "Errors of the choice in simulated sweeps"
    print(BenchmarkResult("selection_errors", title, f"{text}\n\n{rates_table(rates)}", data, machine).write())


def _merge(parts: list[Rates], seeds: list[range]) -> Rates:
    """The rates over all parts of the seeds."""
    weights = [len(part) for part in seeds]
    fields = asdict(parts[0])
    for name in ("replaced", "replaced_by_former_rule", "cheaper_is_highest", "standard_error"):
        fields[name] = float(np.average([getattr(part, name) for part in parts], weights=weights))
    return Rates(**fields)


if __name__ == "__main__":
    main()
