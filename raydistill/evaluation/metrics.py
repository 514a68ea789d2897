"""Scores of outputs with bootstrap intervals and paired comparisons, and the detection of repetitive outputs.

Statistics are stored per row. A corpus score is a mean (ROUGE, exact match) or a function of a sum of rows (BLEU,
chrF), so a bootstrap resamples rows without scoring texts again.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import pairwise

import numpy as np

from raydistill.config.metric_names import ROUGE_METRICS, describe_unknown_metric, is_bertscore, is_own_metric
from raydistill.core.errors import UserError
from raydistill.evaluation.metric import Metric, ScoredText, load_own_metric, ratio_of_sums
from raydistill.evaluation.ngram_counts import (
    bleu_from_sums,
    bleu_rows,
    bleu_signature,
    chrf_from_sums,
    chrf_rows,
    chrf_signature,
    corpus_bleu,
    sentence_bleu,
)
from raydistill.evaluation.rouge import rouge_rows, rouge_signature

NUM_RESAMPLES = 10_000  # an end of a 95 % interval then has a standard error of 0.7 % of the interval's width
_SEED_STREAM = 2**32 - 1  # apart from the streams of `resample_counts`
_CHUNK_ENTRIES = 2_000_000  # drawn rows at a time; limits memory to about 50 MB


@dataclass(frozen=True)
class Scores:
    """Scores of one list of outputs.

    Attributes:
        metrics: Corpus scores by name.
        row_stats: Per-row statistics of `metric`: [rows], or [rows, statistics] where the score is a function of sums.
        metric: The deciding metric.
        reported_stats: Per-row statistics of the other metrics, by name.
    """

    metrics: dict[str, float]
    row_stats: np.ndarray
    metric: str
    reported_stats: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def statistics(self) -> dict[str, np.ndarray]:
        """Per-row statistics of all metrics, the deciding metric first."""
        return {self.metric: self.row_stats, **self.reported_stats}


@dataclass(frozen=True)
class Comparison:
    """A paired comparison, first minus second: difference, 95 % interval, and p-value of a two-sided test."""

    difference: float
    low: float
    high: float
    p_value: float


def _texts_of(rows: Sequence[ScoredText]) -> tuple[list[str], list[str]]:
    """The predictions and the references."""
    return [row.prediction for row in rows], [row.reference for row in rows]


def _rouge_metric(name: str) -> Metric:
    return Metric(lambda rows: rouge_rows(*_texts_of(rows))[name], partial(rouge_signature, name), "rouge_score")


def _chrf_metric(name: str) -> Metric:
    return Metric(
        lambda rows: chrf_rows(name, *_texts_of(rows)), partial(chrf_signature, name), "sacrebleu", chrf_from_sums
    )


def exact_match_rows(rows: Sequence[ScoredText]) -> np.ndarray:
    """Return 100 for each row whose prediction equals the reference after both are stripped of white space, else 0."""
    return np.array([100.0 * (row.prediction.strip() == row.reference.strip()) for row in rows])


BUILT_IN: dict[str, Metric] = {
    **{name: _rouge_metric(name) for name in ROUGE_METRICS},
    "bleu": Metric(lambda rows: bleu_rows(*_texts_of(rows)), bleu_signature, "sacrebleu", bleu_from_sums),
    **{name: _chrf_metric(name) for name in ("chrf", "chrf++")},
    "exact_match": Metric(exact_match_rows, lambda: "exact_match|nrefs:1|case:mixed|space:stripped"),
}


def get_metric(name: str) -> Metric:
    """Return a metric by its name; the module of a user's metric is imported, and the model of BERTScore downloaded.

    Raises:
        UserError: The metric is unknown, the user's module has no such metric, or BERTScore's model cannot be used.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    if is_own_metric(name):
        return load_own_metric(name)
    if is_bertscore(name):
        from raydistill.evaluation.bertscore import load_bertscore  # imports torch

        return load_bertscore(name)
    raise UserError(describe_unknown_metric(name))


def signature(metric: str) -> str:
    """Return the settings and the version behind a score, in the form of sacrebleu's signatures."""
    return get_metric(metric).signature()


def signatures(metrics: Iterable[str]) -> str:
    """Return the signatures of several metrics, separated by spaces."""
    return " ".join(map(signature, metrics))


def score(
    metric: str,
    predictions: list[str],
    references: list[str],
    sources: list[str] | None = None,
    reported: Sequence[str] = (),
) -> Scores:
    """Score outputs with a metric that decides and with further ones.

    Args:
        metric: The deciding metric. With a metric of `ROUGE_METRICS`, all four ROUGE scores are in `Scores.metrics`.
        predictions: The outputs.
        references: The reference texts.
        sources: The source texts, which only users' metrics read; default: empty texts.
        reported: Further metrics.

    Raises:
        UserError: There are no outputs, the metric is unknown, or a user's metric does not fit its contract.
        ValueError: The numbers of predictions, references and sources differ.
    """
    rows = make_rows(predictions, references, sources)
    if not rows:
        raise UserError("there are no rows to score; check the split and dataset.validation_rows")
    statistics = compute_statistics([metric, *reported], rows)
    metrics = {name: corpus_score(name, values) for name, values in statistics.items()}
    return Scores(metrics, statistics.pop(metric), metric, statistics)


def make_rows(predictions: list[str], references: list[str], sources: list[str] | None = None) -> list[ScoredText]:
    """Return the rows to score.

    Raises:
        ValueError: The numbers of predictions, references and sources differ.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    return list(map(ScoredText._make, zip(sources or [""] * len(references), predictions, references, strict=True)))


def compute_statistics(metrics: Iterable[str], rows: Sequence[ScoredText]) -> dict[str, np.ndarray]:
    """Return the per-row statistics by metric; a ROUGE score brings the other ROUGE scores, which need the same pass.

    Raises:
        UserError: A metric is unknown, or a user's metric fails or does not fit its contract.
    """
    statistics: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(metrics):
        if name in statistics:
            continue
        if name in ROUGE_METRICS:
            statistics |= rouge_rows(*_texts_of(rows))
        else:
            statistics[name] = np.asarray(get_metric(name).row_statistics(rows))
    return statistics


class ScoreAccumulator:
    """Accumulates the corpus scores of `score` over chunks of rows without storing the rows."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.count = 0
        self.sums: dict[str, np.ndarray] = {}

    def add(self, predictions: list[str], references: list[str], sources: list[str] | None = None) -> None:
        """Add a chunk of rows; an empty chunk is ignored."""
        if not predictions:
            return
        by_name = compute_statistics([self.metric], make_rows(predictions, references, sources))
        self.merge(len(predictions), {name: rows.sum(axis=0).tolist() for name, rows in by_name.items()})

    def merge(self, count: int, sums: Mapping[str, float | list[float]]) -> None:
        """Add `count` rows whose sums another accumulator has computed."""
        for name, total in sums.items():
            self.sums[name] = self.sums.get(name, 0) + np.asarray(total)
        self.count += count

    def metrics(self) -> dict[str, float]:
        """Return the scores of all rows so far by name; empty if there are no rows."""
        return {name: _score_of_sums(name, total, self.count) for name, total in self.sums.items()}


def corpus_score(metric: str, rows: np.ndarray) -> float:
    """Return the corpus score of per-row statistics: the mean of [rows], or the metric's score of [rows, statistics].

    The code of a user's metric is not run.
    """
    return float(np.mean(rows)) if rows.ndim == 1 else _score_of_sums(metric, rows.sum(axis=0), len(rows))


def row_scores(metric: str, rows: np.ndarray) -> np.ndarray:
    """Return a score for each row, [rows], of per-row statistics, which shows the rows that differ.

    ROUGE: the row's F1. BLEU: the sentence BLEU of `sacrebleu.sentence_bleu`, which ignores n-grams longer than the
    output (its effective order). The code of a user's metric is not run.
    """
    if rows.ndim == 1:
        return rows.astype(float)
    return sentence_bleu(rows) if metric == "bleu" else _scores_of_sums(metric, rows.astype(np.float64))


def _score_of_sums(metric: str, total: np.ndarray, num_rows: int) -> float:
    """The corpus score of summed statistics, a number or [statistics]."""
    if np.ndim(total) == 0:
        return float(total) / num_rows
    if metric == "bleu":
        return corpus_bleu(total[None])  # exactly sacrebleu's number; `bleu_from_sums` differs in the last digits
    return float(_scores_of_sums(metric, total[None].astype(np.float64))[0])


def _scores_of_sums(metric: str, sums: np.ndarray) -> np.ndarray:
    """The corpus scores, [samples], of statistics that are summed over the rows of samples, [samples, statistics]."""
    function = ratio_of_sums if is_own_metric(metric) else get_metric(metric).corpus_scores
    if function is None:
        raise UserError(f"{metric} has a number for each row, and the rows have {sums.shape[1]}: the file is damaged")
    return function(sums)


def bootstrap_interval(
    metric: str, rows: np.ndarray, seed: int = 0, n_resamples: int = NUM_RESAMPLES
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the corpus score (Efron 1979; for BLEU: Koehn 2004).

    Raises:
        ValueError: There are no rows.
    """
    scores = bootstrap_scores(metric, [rows], seed, n_resamples)[0]
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)


def paired_bootstrap(
    metric: str, a_rows: np.ndarray, b_rows: np.ndarray, seed: int = 0, n_resamples: int = NUM_RESAMPLES
) -> Comparison:
    """Compare two systems on the same rows by paired bootstrap resampling (Koehn 2004).

    Both systems are scored on each resample. The p-value is twice the smaller share of resamples on either side of 0,
    with one added to count and total so that it is never 0.

    Raises:
        ValueError: The systems have different numbers of rows, or none.
    """
    return paired_bootstrap_over_seeds(metric, [a_rows], [b_rows], seed, n_resamples)


def paired_bootstrap_over_seeds(
    metric: str,
    a_runs: Sequence[np.ndarray],
    b_runs: Sequence[np.ndarray],
    seed: int = 0,
    n_resamples: int = NUM_RESAMPLES,
) -> Comparison:
    """`paired_bootstrap` of systems that were trained with several seeds; the score of a system is the mean over seeds.

    `a_runs` and `b_runs` hold per-row statistics, [rows] or [rows, statistics], one array per seed and at least one.
    All runs are scored on each resample of the rows.

    Raises:
        ValueError: The runs have different numbers of rows, or none.
    """
    scores = bootstrap_scores(metric, [*a_runs, *b_runs], seed, n_resamples)
    differences = np.mean(scores[: len(a_runs)], axis=0) - np.mean(scores[len(a_runs) :], axis=0)
    a_score, b_score = (float(np.mean([corpus_score(metric, rows) for rows in runs])) for runs in (a_runs, b_runs))
    return _summarize(a_score - b_score, differences)


SeedRuns = Sequence[np.ndarray]  # per-row statistics of a system, one array per training seed


def compare_with_reference(
    metric: str, systems: Sequence[np.ndarray | SeedRuns], reference: np.ndarray | SeedRuns
) -> list[Comparison]:
    """`paired_bootstrap` of each system against one reference, system minus reference, over the same resamples.

    A system that was trained with several seeds has the mean score of its runs. Its seeds are resampled too, each
    system's apart from the others', so that the interval covers further training runs as well as further rows.

    Args:
        metric: Name of the score.
        systems: Per-row statistics of each system, [rows] or [rows, statistics], or one such array per seed.
        reference: Per-row statistics of the reference.

    Raises:
        ValueError: The systems have different numbers of rows, or none.
    """
    runs_by_system = [[runs] if isinstance(runs, np.ndarray) else list(runs) for runs in (*systems, reference)]
    scores = iter(bootstrap_scores(metric, [rows for runs in runs_by_system for rows in runs], 0, NUM_RESAMPLES))
    *means, reference_mean = [
        (mean_score(metric, runs), _resample_seeds([next(scores) for _ in runs], stream))
        for stream, runs in enumerate(runs_by_system)
    ]
    return [_summarize(mean - reference_mean[0], resampled - reference_mean[1]) for mean, resampled in means]


def mean_score(metric: str, runs: SeedRuns) -> float:
    """Return the mean of the corpus scores of several runs."""
    return float(np.mean([corpus_score(metric, rows) for rows in runs]))


def bootstrap_interval_over_seeds(metric: str, runs: SeedRuns) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean score of several runs, over rows and seeds.

    Raises:
        ValueError: The runs have different numbers of rows, or none.
    """
    resampled = _resample_seeds(bootstrap_scores(metric, list(runs), 0, NUM_RESAMPLES), 0)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)


def _resample_seeds(scores: Sequence[np.ndarray], stream: int) -> np.ndarray:
    """Return the mean over seeds drawn with replacement, [n_resamples], for each resample of the rows.

    One seed less than there are is drawn. The variance of the mean over resamples is then s^2 / n for n seeds with the
    sample variance s^2, and not (n - 1) / n of this (Rao and Wu 1988, "Resampling Inference With Complex Survey
    Data"), which matters because n is small.

    Args:
        scores: The scores of each seed, [n_resamples] each.
        stream: Number of the random stream; systems with different streams are resampled independently.
    """
    if len(scores) == 1:
        return scores[0]
    stacked = np.stack(scores)
    shape = (len(scores) - 1, stacked.shape[1])
    drawn = np.random.default_rng([_SEED_STREAM, stream]).integers(0, len(scores), size=shape)
    return np.take_along_axis(stacked, drawn, axis=0).mean(axis=0)


def compare_pairs(
    metric: str, systems: Sequence[np.ndarray | SeedRuns], pairs: Iterable[tuple[int, int]]
) -> dict[tuple[int, int], Comparison]:
    """`compare_with_reference` for pairs of systems: by (i, j), system i minus system j.

    The rows are resampled as in `compare_with_reference`, the seeds with other random numbers.

    Args:
        metric: Name of the score.
        systems: Per-row statistics of each system, [rows] or [rows, statistics], or one such array per seed.
        pairs: Indices of the systems to compare.

    Raises:
        ValueError: The systems have different numbers of rows, or none.
    """
    if not systems:
        return {}
    runs_by_system = [[runs] if isinstance(runs, np.ndarray) else list(runs) for runs in systems]
    scores = iter(bootstrap_scores(metric, [rows for runs in runs_by_system for rows in runs], 0, NUM_RESAMPLES))
    resampled = [_resample_seeds([next(scores) for _ in runs], stream) for stream, runs in enumerate(runs_by_system)]
    means = [mean_score(metric, runs) for runs in runs_by_system]
    return {(i, j): _summarize(means[i] - means[j], resampled[i] - resampled[j]) for i, j in pairs}


def repeated_bigrams(text: str) -> float:
    """Return the share of a text's bigrams of words that occurred before in the text, 0 to 1.

    This is rep-2 / 100 of Su et al. (2022), "A Contrastive Framework for Neural Text Generation", section 4.2:
    1 - (distinct bigrams / bigrams). A text of fewer than two words has none.
    """
    words = text.lower().split()
    bigrams = list(pairwise(words))
    return 1 - len(set(bigrams)) / len(bigrams) if bigrams else 0.0


def is_repetitive(text: str) -> bool:
    """Return whether an output has collapsed into repetition.

    This is the case if a 1- to 4-gram of words occurs 4 or more times in a row, or if the text has at least 8 words and
    fewer than 30 % of them are distinct.
    """
    words = text.lower().split()
    if len(words) >= 8 and len(set(words)) < 0.3 * len(words):
        return True
    for n in range(1, 5):
        run = 0  # consecutive words that equal the word n positions before
        for i in range(n, len(words)):
            run = run + 1 if words[i] == words[i - n] else 0
            if run >= 3 * n:
                return True
    return False


def repetition_rate(predictions: list[str]) -> float:
    """Return the share of repetitive outputs, 0 to 1; see `is_repetitive`."""
    return sum(map(is_repetitive, predictions)) / len(predictions) if predictions else 0.0


def _summarize(difference: float, resampled: np.ndarray) -> Comparison:
    """Return the comparison for a difference and its values over the resamples, [n_resamples]."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    smaller_side = min(np.sum(resampled <= 0), np.sum(resampled >= 0))
    p_value = min(1.0, 2 * (int(smaller_side) + 1) / (len(resampled) + 1))
    return Comparison(difference, float(low), float(high), p_value)


def bootstrap_scores(metric: str, systems: list[np.ndarray], seed: int, n_resamples: int) -> list[np.ndarray]:
    """Return the corpus scores of each system, [n_resamples], over the same resampled rows.

    A resample is represented by the number of times that each row was drawn, which has a multinomial distribution. The
    product of these counts and the statistics of the rows is the sum over the resample.

    Args:
        metric: Name of the score.
        systems: Per-row statistics of each system, [rows] or [rows, statistics].
        seed: Number of the random stream.
        n_resamples: Number of resamples.

    Raises:
        ValueError: The systems have different numbers of rows, or none.
    """
    lengths = sorted({len(rows) for rows in systems})
    if len(lengths) > 1:
        raise ValueError(f"a paired comparison needs the same rows; got {' and '.join(map(str, lengths))}")
    [n] = lengths
    if n == 0:
        raise ValueError("a bootstrap needs at least one row")
    stacked = np.concatenate([rows.reshape(n, -1).astype(np.float64) for rows in systems], axis=1)
    chunk = max(1, _CHUNK_ENTRIES // n)
    sums = [
        resample_counts(n, min(chunk, n_resamples - start), seed, start).astype(np.float64) @ stacked
        for start in range(0, n_resamples, chunk)
    ]
    parts = np.split(np.concatenate(sums), len(systems), axis=1)
    return [part[:, 0] / n if systems[0].ndim == 1 else _scores_of_sums(metric, part) for part in parts]


@lru_cache(maxsize=16)  # at most 16 times 2 MB; the comparisons of a sweep have the same number of rows
def resample_counts(n: int, count: int, seed: int, start: int) -> np.ndarray:
    """Return how often each of `n` rows is drawn in the resamples from `start` on, uint8 [count, n].

    Drawing rows and counting them is faster than `Generator.multinomial`, which draws one binomial number per row.
    """
    rng = np.random.default_rng([seed, start])
    drawn = rng.integers(0, n, size=(count, n)) + np.arange(count)[:, None] * n
    counts = np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n)
    return counts.astype(np.uint8)  # a count above 255 has a probability of about 1 / 256!
