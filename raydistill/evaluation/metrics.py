"""ROUGE and BLEU with bootstrap intervals and paired comparisons, and the detection of repetitive outputs.

Statistics are stored per row. A corpus score is a mean (ROUGE) or a function of a sum (BLEU) of rows, so a bootstrap
resamples rows without scoring texts again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from raydistill.core.errors import UserError
from raydistill.evaluation.rouge import ROUGE_METRICS, rouge_rows, rouge_signature

_LOG_OF_ZERO = -9999999999.0  # sacrebleu's value for log 0
NUM_RESAMPLES = 10_000  # an end of a 95 % interval then has a standard error of 0.7 % of the interval's width
_SEED_STREAM = 2**32 - 1  # apart from the streams of `resample_counts`
_CHUNK_ENTRIES = 2_000_000  # drawn rows at a time; limits memory to about 50 MB


@dataclass(frozen=True)
class Scores:
    """Scores of one list of outputs.

    `metrics` are corpus scores by name; `row_stats` are the per-row statistics of `metric`: [rows] for ROUGE,
    [rows, 10] for BLEU.
    """

    metrics: dict[str, float]
    row_stats: np.ndarray
    metric: str


@dataclass(frozen=True)
class Comparison:
    """A paired comparison, first minus second: difference, 95 % interval, and p-value of a two-sided test."""

    difference: float
    low: float
    high: float
    p_value: float


def bleu_rows(predictions: list[str], references: list[str]) -> np.ndarray:
    """Return BLEU's sufficient statistics per row, int64 [rows, 10].

    Columns: matching n-grams for n = 1 to 4, n-grams for n = 1 to 4, output length, reference length; tokens by 13a.

    Raises:
        ValueError: The numbers of predictions and references differ.
    """
    _check_same_length(predictions, references)
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp

    scorer = BLEU(effective_order=True)  # changes a sentence's score, not its counts; silences a warning
    rows = np.zeros((len(predictions), 10), dtype=np.int64)
    for i, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        bleu = scorer.sentence_score(prediction, [reference])
        rows[i] = [*bleu.counts, *bleu.totals, bleu.sys_len, bleu.ref_len]
    # Each of sacrebleu's two tokenizers caches up to 65,536 texts at module level: 60 MB.
    for tokenizer in (Tokenizer13a, TokenizerRegexp):
        tokenizer.__call__.cache_clear()
    return rows


def corpus_bleu(rows: np.ndarray) -> float:
    """Return the corpus BLEU of `bleu_rows` [rows, 10] (13a, exp smoothing), exactly as `sacrebleu.corpus_bleu`."""
    from sacrebleu.metrics.bleu import BLEU

    total = [int(value) for value in rows.sum(axis=0)]
    return float(BLEU.compute_bleu(total[:4], total[4:8], total[8], total[9], smooth_method="exp").score)


def signature(metric: str) -> str:
    """Return the settings and the version behind a score, in the form of sacrebleu's signatures."""
    if metric == "bleu":
        from sacrebleu.metrics.bleu import BLEU

        scorer = BLEU()
        scorer.corpus_score(["a"], [["a"]])  # a signature is known only after a score
        return f"bleu|{scorer.get_signature()}"
    return rouge_signature(metric)


def score(metric: str, predictions: list[str], references: list[str]) -> Scores:
    """Score outputs with bleu or with a metric of `ROUGE_METRICS`; for ROUGE, all four scores are in `metrics`.

    Raises:
        UserError: There are no outputs, or the metric is unknown.
    """
    if not predictions:
        raise UserError("there are no rows to score; check the split and dataset.validation_rows")
    if metric == "bleu":
        rows = bleu_rows(predictions, references)
        return Scores({"bleu": corpus_bleu(rows)}, rows, metric)
    if metric not in ROUGE_METRICS:
        raise UserError(f"unknown metric {metric!r}; known: {', '.join(ROUGE_METRICS)}, bleu")
    _check_same_length(predictions, references)
    by_name = rouge_rows(predictions, references)
    return Scores({name: float(rows.mean()) for name, rows in by_name.items()}, by_name[metric], metric)


class ScoreAccumulator:
    """Accumulates the corpus scores of `score` over chunks of rows without storing the rows."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.count = 0
        self.sums: dict[str, np.ndarray] = {}

    def add(self, predictions: list[str], references: list[str]) -> None:
        """Add a chunk of rows; an empty chunk is ignored."""
        if not predictions:
            return
        bleu_only = self.metric == "bleu"
        by_name = {"bleu": bleu_rows(predictions, references)} if bleu_only else rouge_rows(predictions, references)
        for name, rows in by_name.items():
            self.sums[name] = self.sums.get(name, 0) + rows.sum(axis=0)
        self.count += len(predictions)

    def metrics(self) -> dict[str, float]:
        """Return the scores of all rows so far by name; empty if there are no rows."""
        if self.metric == "bleu":
            return {name: corpus_bleu(total[None]) for name, total in self.sums.items()}
        return {name: float(total) / self.count for name, total in self.sums.items()}


def chrf_rows(predictions: list[str], references: list[str]) -> np.ndarray:
    """Return sacrebleu's chrF2 of each row, 0 to 100, [rows]: character n-grams of 1 to 6, recall weighted twice.

    Raises:
        ValueError: The numbers of predictions and references differ.
    """
    _check_same_length(predictions, references)
    from sacrebleu.metrics.chrf import CHRF

    scorer = CHRF()
    pairs = zip(predictions, references, strict=True)
    return np.array([scorer.sentence_score(text, [reference]).score for text, reference in pairs], dtype=float)


def corpus_score(metric: str, rows: np.ndarray) -> float:
    """Return the corpus score of per-row statistics: the mean of [rows], or corpus BLEU of [rows, 10]."""
    return corpus_bleu(rows) if metric == "bleu" else float(np.mean(rows))


def bootstrap_interval(
    metric: str, rows: np.ndarray, seed: int = 0, n_resamples: int = NUM_RESAMPLES
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the corpus score (Efron 1979; for BLEU: Koehn 2004).

    Raises:
        ValueError: There are no rows.
    """
    scores = _bootstrap_scores(metric, [rows], seed, n_resamples)[0]
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

    `a_runs` and `b_runs` hold per-row statistics, [rows] or [rows, 10], one array per seed and at least one. All
    runs are scored on each resample of the rows.

    Raises:
        ValueError: The runs have different numbers of rows, or none.
    """
    scores = _bootstrap_scores(metric, [*a_runs, *b_runs], seed, n_resamples)
    differences = np.mean(scores[: len(a_runs)], axis=0) - np.mean(scores[len(a_runs) :], axis=0)
    a_score, b_score = (float(np.mean([corpus_score(metric, rows) for rows in runs])) for runs in (a_runs, b_runs))
    return _summarize(a_score - b_score, differences)


SeedRuns = Sequence[np.ndarray]  # per-row statistics of a system, [rows] or [rows, 10], one array per training seed


def compare_with_reference(
    metric: str, systems: Sequence[np.ndarray | SeedRuns], reference: np.ndarray | SeedRuns
) -> list[Comparison]:
    """`paired_bootstrap` of each system against one reference, system minus reference, over the same resamples.

    A system that was trained with several seeds has the mean score of its runs. Its seeds are resampled too, each
    system's apart from the others', so that the interval covers further training runs as well as further rows.

    Args:
        metric: Name of the score.
        systems: Per-row statistics of each system, [rows] or [rows, 10], or one such array per seed.
        reference: Per-row statistics of the reference.

    Raises:
        ValueError: The systems have different numbers of rows, or none.
    """
    runs_by_system = [[runs] if isinstance(runs, np.ndarray) else list(runs) for runs in (*systems, reference)]
    scores = iter(_bootstrap_scores(metric, [rows for runs in runs_by_system for rows in runs], 0, NUM_RESAMPLES))
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
    resampled = _resample_seeds(_bootstrap_scores(metric, list(runs), 0, NUM_RESAMPLES), 0)
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

    The resamples of the rows are those of `compare_with_reference`. Seeds are resampled with other random numbers.

    Args:
        metric: Name of the score.
        systems: Per-row statistics of each system, [rows] or [rows, 10], or one such array per seed.
        pairs: Indices of the systems to compare.

    Raises:
        ValueError: The systems have different numbers of rows, or none.
    """
    if not systems:
        return {}
    runs_by_system = [[runs] if isinstance(runs, np.ndarray) else list(runs) for runs in systems]
    scores = iter(_bootstrap_scores(metric, [rows for runs in runs_by_system for rows in runs], 0, NUM_RESAMPLES))
    resampled = [_resample_seeds([next(scores) for _ in runs], stream) for stream, runs in enumerate(runs_by_system)]
    means = [mean_score(metric, runs) for runs in runs_by_system]
    return {(i, j): _summarize(means[i] - means[j], resampled[i] - resampled[j]) for i, j in pairs}


def row_scores(metric: str, rows: np.ndarray) -> np.ndarray:
    """Return a score for each row, [rows], of per-row statistics.

    ROUGE: the row's F1. BLEU: the sentence BLEU of `sacrebleu.sentence_bleu`, which ignores n-grams longer than the
    output (its effective order).
    """
    if metric != "bleu":
        return rows.astype(float)
    from sacrebleu.metrics.bleu import BLEU

    scores = [
        BLEU.compute_bleu(row[:4], row[4:8], row[8], row[9], smooth_method="exp", effective_order=True).score
        for row in rows.tolist()
    ]
    return np.array(scores, dtype=float)


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


def _check_same_length(predictions: list[str], references: list[str]) -> None:
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")


def _summarize(difference: float, resampled: np.ndarray) -> Comparison:
    """Return the comparison for a difference and its values over the resamples, [n_resamples]."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    smaller_side = min(np.sum(resampled <= 0), np.sum(resampled >= 0))
    p_value = min(1.0, 2 * (int(smaller_side) + 1) / (len(resampled) + 1))
    return Comparison(difference, float(low), float(high), p_value)


def _bootstrap_scores(metric: str, systems: list[np.ndarray], seed: int, n_resamples: int) -> list[np.ndarray]:
    """Return the corpus scores of each system, [n_resamples], over the same resampled rows.

    A resample is represented by the number of times that each row was drawn, which has a multinomial distribution. The
    product of these counts and the statistics of the rows is the sum over the resample.
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
    return [bleu_from_sums(part) if metric == "bleu" else part[:, 0] / n for part in parts]


@lru_cache(maxsize=16)  # at most 16 times 2 MB; the comparisons of a sweep have the same number of rows
def resample_counts(n: int, count: int, seed: int, start: int) -> np.ndarray:
    """Return how often each of `n` rows is drawn in the resamples from `start` on, uint8 [count, n].

    Drawing rows and counting them is faster than `Generator.multinomial`, which draws one binomial number per row.
    """
    rng = np.random.default_rng([seed, start])
    drawn = rng.integers(0, n, size=(count, n)) + np.arange(count)[:, None] * n
    counts = np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n)
    return counts.astype(np.uint8)  # a count above 255 has a probability of about 1 / 256!


def bleu_from_sums(sums: np.ndarray) -> np.ndarray:
    """Return the corpus BLEU, [samples], of summed statistics [samples, 10]; formula of sacrebleu's `compute_bleu`."""
    correct, total, length, reference = sums[:, :4], sums[:, 4:8], sums[:, 8], sums[:, 9]
    with np.errstate(divide="ignore", invalid="ignore"):
        smoothing = 2.0 ** np.cumsum((correct == 0) & (total > 0), axis=1)
        precisions = 100 * np.where(correct == 0, 1 / smoothing, correct) / total
        logs = np.where(total > 0, np.log(precisions), _LOG_OF_ZERO)
        brevity = np.where(length < reference, np.exp(1 - reference / length), 1.0)
    scores = brevity * np.exp(logs.mean(axis=1))
    return np.where(correct.sum(axis=1) == 0, 0.0, scores)
