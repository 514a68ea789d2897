"""ROUGE and BLEU by row, their confidence intervals, and paired comparisons.

Everything is kept per row: a corpus score is then a mean (ROUGE) or a function of a sum (BLEU), and a
bootstrap resamples rows without scoring any text again.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np

from raydistill.core.errors import UserError

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_LOG_OF_ZERO = -9999999999.0  # sacrebleu's stand-in for log 0


@dataclass(frozen=True)
class Scored:
    """Scores of one list of outputs.

    `metrics` are corpus scores by name; `rows` are the per-row statistics of `metric`: [rows] for ROUGE,
    [rows, 10] for BLEU.
    """

    metrics: dict[str, float]
    rows: np.ndarray
    metric: str


@dataclass(frozen=True)
class Comparison:
    """First minus second: the difference, its 95 % interval, and a two-sided p for "no difference"."""

    difference: float
    low: float
    high: float
    p: float


def sentences(text: str) -> list[str]:
    """The sentences of a text: its lines where it has several, else split after . ! ? followed by a space.

    It needs no download, and it splits abbreviations ("Mr. Smith"), alike on both sides of a comparison.
    """
    text = text.strip()
    parts = text.splitlines() if "\n" in text else _SENTENCE_END.split(text)
    return [part.strip() for part in parts if part.strip()]


def lead(source: str, n: int = 1) -> str:
    """The first `n` sentences: the baseline that any summariser must beat."""
    return " ".join(sentences(source)[:n])


def rouge_rows(predictions: list[str], references: list[str]) -> dict[str, np.ndarray]:
    """F1 x 100 per row of rouge1, rouge2, rougeL and rougeLsum, each [rows]; the mean is the corpus score.

    Google's rouge-score with Porter stemming. Its tokens are ASCII letters and digits only, so ROUGE says
    nothing about text in other scripts. rougeLsum is over `sentences`.
    """
    _same_length(predictions, references)
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_rouge_tokenizer())
    summary = RougeScorer(["rougeLsum"], tokenizer=_rouge_tokenizer())
    rows = np.zeros((len(predictions), len(ROUGE)))
    for i, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        scores = scorer.score(reference, prediction)
        scores |= summary.score("\n".join(sentences(reference)), "\n".join(sentences(prediction)))
        rows[i] = [100 * scores[name].fmeasure for name in ROUGE]
    return {name: rows[:, i] for i, name in enumerate(ROUGE)}


def bleu_rows(predictions: list[str], references: list[str]) -> np.ndarray:
    """BLEU's sufficient statistics per row, int64 [rows, 10].

    Columns: matching n-grams for n = 1 to 4, n-grams for n = 1 to 4, output and reference length (13a).
    """
    _same_length(predictions, references)
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp

    scorer = BLEU(effective_order=True)  # changes a sentence's score, not its counts; silences a warning
    rows = np.zeros((len(predictions), 10), dtype=np.int64)
    for i, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        found = scorer.sentence_score(prediction, [reference])
        rows[i] = [*found.counts, *found.totals, found.sys_len, found.ref_len]
    # sacrebleu remembers 65,536 texts in each of its two tokenizers, under a scorer that nobody has any more: 60 MB.
    for tokenizer in (Tokenizer13a, TokenizerRegexp):
        tokenizer.__call__.cache_clear()
    return rows


def bleu(rows: np.ndarray) -> float:
    """Corpus BLEU of `bleu_rows` (13a, exp smoothing): exactly what `sacrebleu.corpus_bleu` gives."""
    from sacrebleu.metrics.bleu import BLEU

    total = [int(value) for value in rows.sum(axis=0)]
    return float(BLEU.compute_bleu(total[:4], total[4:8], total[8], total[9], smooth_method="exp").score)


def signature(metric: str) -> str:
    """All that is needed to get the same score again, in sacrebleu's form."""
    if metric == "bleu":
        from sacrebleu.metrics.bleu import BLEU

        scorer = BLEU()
        scorer.corpus_score(["a"], [["a"]])  # a signature is known only after a score
        return f"bleu|{scorer.get_signature()}"
    stem_and_split = "f1:mean|stemmer:porter|tok:rouge-score|sentences:newline,[.!?]+space"
    return f"{metric}|nrefs:1|{stem_and_split}|version:rouge-score-{version('rouge-score')}"


def score(metric: str, predictions: list[str], references: list[str]) -> Scored:
    """Score outputs with "rouge2" (all four ROUGEs are computed) or "bleu". UserError: there are none."""
    if not predictions:
        raise UserError("there are no rows to score; check the split and dataset.validation_rows")
    if metric == "bleu":
        rows = bleu_rows(predictions, references)
        return Scored({"bleu": bleu(rows)}, rows, metric)
    if metric not in ROUGE:
        raise UserError(f"unknown metric {metric!r}; known: {', '.join(ROUGE)}, bleu")
    by_name = rouge_rows(predictions, references)
    return Scored({name: float(rows.mean()) for name, rows in by_name.items()}, by_name[metric], metric)


class Tally:
    """Corpus scores of rows that come in chunks: `score`'s metrics without holding the rows."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.count = 0
        self.sums: dict[str, np.ndarray] = {}

    def add(self, predictions: list[str], references: list[str]) -> None:
        """Score some more rows; none is none."""
        if not predictions:
            return
        bleu_only = self.metric == "bleu"
        found = {"bleu": bleu_rows(predictions, references)} if bleu_only else rouge_rows(predictions, references)
        for name, rows in found.items():
            self.sums[name] = self.sums.get(name, 0) + rows.sum(axis=0)
        self.count += len(predictions)

    def metrics(self) -> dict[str, float]:
        """The scores of all rows so far; empty where there was none."""
        if self.metric == "bleu":
            return {name: bleu(total[None]) for name, total in self.sums.items()}
        return {name: float(total) / self.count for name, total in self.sums.items()}


def rouge2_rows(predictions: list[str], references: list[str]) -> np.ndarray:
    """ROUGE-2 alone, F1 x 100 per row, [rows]: a fraction of the time of `rouge_rows`."""
    _same_length(predictions, references)
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge2"], tokenizer=_rouge_tokenizer())
    pairs = zip(predictions, references, strict=True)
    return np.array([100 * scorer.score(reference, text)["rouge2"].fmeasure for text, reference in pairs])


def corpus_score(metric: str, rows: np.ndarray) -> float:
    """The corpus score of per-row statistics: the mean, or corpus BLEU."""
    return bleu(rows) if metric == "bleu" else float(np.mean(rows))


def bootstrap(metric: str, rows: np.ndarray, seed: int = 0, samples: int = 1000) -> tuple[float, float]:
    """95 % percentile interval of the corpus score over resampled rows (Efron 1979; for BLEU: Koehn 2004)."""
    scores = _resampled(metric, [rows], seed, samples)[0]
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)


def paired_bootstrap(
    metric: str, a_rows: np.ndarray, b_rows: np.ndarray, seed: int = 0, samples: int = 1000
) -> Comparison:
    """Compare two systems on the same rows: both are scored on each resample (Koehn 2004).

    p is twice the smaller share of resamples on either side of 0, each count plus one: never exactly 0.
    ValueError where the two were not scored on the same number of rows.
    """
    return paired_bootstrap_of_means(metric, [a_rows], [b_rows], seed, samples)


def paired_bootstrap_of_means(
    metric: str, a: Sequence[np.ndarray], b: Sequence[np.ndarray], seed: int = 0, samples: int = 1000
) -> Comparison:
    """`paired_bootstrap` where a side is several trainings of one system, and its score the mean of theirs.

    Each of a side is [rows] or [rows, 10]; at least one each. All are scored on each resample of the rows.
    """
    lengths = sorted({len(rows) for rows in (*a, *b)})
    if len(lengths) > 1:
        raise ValueError(f"a paired comparison needs the same rows; got {' and '.join(map(str, lengths))}")
    found = _resampled(metric, [*a, *b], seed, samples)
    differences = np.mean(found[: len(a)], axis=0) - np.mean(found[len(a) :], axis=0)
    low, high = np.percentile(differences, [2.5, 97.5])
    smaller = min(np.sum(differences <= 0), np.sum(differences >= 0))
    p = min(1.0, 2 * (int(smaller) + 1) / (samples + 1))
    ours, theirs = (float(np.mean([corpus_score(metric, rows) for rows in side])) for side in (a, b))
    return Comparison(ours - theirs, float(low), float(high), p)


def collapsed(text: str) -> bool:
    """Whether an output has collapsed into repetition.

    Some 1- to 4-gram of words stands 4 or more times in a row, or under 30 % of 8 or more words are distinct.
    """
    words = text.lower().split()
    if len(words) >= 8 and len(set(words)) < 0.3 * len(words):
        return True
    for n in range(1, 5):
        run = 0  # how many words in a row equal the word n places before
        for i in range(n, len(words)):
            run = run + 1 if words[i] == words[i - n] else 0
            if run >= 3 * n:
                return True
    return False


def repetition_rate(predictions: list[str]) -> float:
    """Share of outputs, 0 to 1, that have `collapsed` into repetition."""
    return sum(map(collapsed, predictions)) / len(predictions) if predictions else 0.0


def _same_length(predictions: list[str], references: list[str]) -> None:
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")


@lru_cache(1)
def _rouge_tokenizer() -> SimpleNamespace:
    """rouge-score's own tokenizer; stems and texts are remembered, since each text is tokenized twice."""
    from nltk.stem.porter import PorterStemmer
    from rouge_score import tokenize

    stemmer = SimpleNamespace(stem=lru_cache(200_000)(PorterStemmer().stem))
    return SimpleNamespace(tokenize=lru_cache(20_000)(lambda text: tokenize.tokenize(text, stemmer)))


def _resampled(metric: str, systems: list[np.ndarray], seed: int, samples: int) -> list[np.ndarray]:
    """Each system's corpus scores, [samples], over the same resampled rows.

    A resample is a vector of how often each row was drawn; times the rows' statistics it gives their sums.
    """
    n = len(systems[0])
    if n == 0:
        raise ValueError("a bootstrap needs at least one row")
    columns = [rows.reshape(n, -1).astype(np.float64) for rows in systems]
    stacked = np.concatenate(columns, axis=1)
    rng = np.random.default_rng(seed)
    sums = np.empty((samples, stacked.shape[1]))
    chunk = max(1, 2_000_000 // n)  # bounds memory to some 50 MB
    for start in range(0, samples, chunk):
        count = min(chunk, samples - start)
        drawn = rng.integers(0, n, size=(count, n)) + np.arange(count)[:, None] * n
        weights = np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n)
        sums[start : start + count] = weights.astype(np.float64) @ stacked
    parts = np.split(sums, len(systems), axis=1)
    return [_bleu_of_sums(part) if metric == "bleu" else part[:, 0] / n for part in parts]


def _bleu_of_sums(sums: np.ndarray) -> np.ndarray:
    """Corpus BLEU, [samples], of sums [samples, 10]; the formula of sacrebleu's `compute_bleu`."""
    correct, total, length, reference = sums[:, :4], sums[:, 4:8], sums[:, 8], sums[:, 9]
    with np.errstate(divide="ignore", invalid="ignore"):
        smoothing = 2.0 ** np.cumsum((correct == 0) & (total > 0), axis=1)
        precisions = 100 * np.where(correct == 0, 1 / smoothing, correct) / total
        logs = np.where(total > 0, np.log(precisions), _LOG_OF_ZERO)
        brevity = np.where(length < reference, np.exp(1 - reference / length), 1.0)
    scores = brevity * np.exp(logs.mean(axis=1))
    return np.where(correct.sum(axis=1) == 0, 0.0, scores)
