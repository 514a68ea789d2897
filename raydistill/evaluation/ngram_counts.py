"""BLEU and chrF by sacrebleu: n-gram counts per row, and corpus scores of sums of rows."""

import numpy as np

# The version of sacrebleu whose private interface is used: CHRF._extract_corpus_statistics, the caches of tokenizers.
WRITTEN_FOR = "2.6.0"
_LOG_OF_ZERO = -9999999999.0  # sacrebleu's value for log 0
CHRF_BETA = 2  # recall counts twice as much as precision
CHRF_WORD_ORDERS = {"chrf": 0, "chrf++": 2}


def bleu_rows(predictions: list[str], references: list[str]) -> np.ndarray:
    """Return BLEU's sufficient statistics per row, int64 [rows, 10].

    Columns: matching n-grams for n = 1 to 4, n-grams for n = 1 to 4, output length, reference length; tokens by 13a.

    Raises:
        ValueError: The numbers of predictions and references differ.
    """
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
    return _compute_bleu(rows.sum(axis=0), effective_order=False)


def sentence_bleu(rows: np.ndarray) -> np.ndarray:
    """Return the BLEU of each row of `bleu_rows`, [rows], over the orders that a row has, as sacrebleu's sentence_bleu.

    These scores show which rows differ. The corpus score is no mean of them.
    """
    return np.array([_compute_bleu(row, effective_order=True) for row in rows])


def _compute_bleu(total: np.ndarray, effective_order: bool) -> float:
    from sacrebleu.metrics.bleu import BLEU

    counts = [int(value) for value in total]
    bleu = BLEU.compute_bleu(
        counts[:4], counts[4:8], counts[8], counts[9], smooth_method="exp", effective_order=effective_order
    )
    return float(bleu.score)


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


def bleu_signature() -> str:
    """Return sacrebleu's signature of BLEU."""
    from sacrebleu.metrics.bleu import BLEU

    scorer = BLEU()
    scorer.corpus_score(["a"], [["a"]])  # a signature is known only after a score
    return f"bleu|{scorer.get_signature()}"


def chrf_rows(metric: str, predictions: list[str], references: list[str]) -> np.ndarray:
    """Return the n-gram counts of chrF or chrF++ per row, int64 [rows, 18] or [rows, 24].

    Three columns for each order (characters 1 to 6, for chrF++ also words 1 to 2): n-grams of the output, n-grams of
    the reference, matches. From these counts sacrebleu computes its corpus score.

    Raises:
        ValueError: The numbers of predictions and references differ.
    """
    from sacrebleu.metrics.chrf import CHRF

    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    scorer = CHRF(word_order=CHRF_WORD_ORDERS[metric])
    rows = scorer._extract_corpus_statistics(predictions, [references])
    return np.array(rows, dtype=np.int64).reshape(len(predictions), 3 * scorer.order)


def chrf_from_sums(sums: np.ndarray) -> np.ndarray:
    """Return chrF or chrF++, [samples], of summed counts [samples, 3 x orders], as sacrebleu's `corpus_chrf`.

    F-score with beta = 2 of the mean precision and the mean recall over the orders that both sides have (Popović 2015,
    "chrF: character n-gram F-score for automatic MT evaluation", and 2017, "chrF++").
    """
    outputs, references, matches = sums[:, 0::3], sums[:, 1::3], sums[:, 2::3]
    used = (outputs > 0) & (references > 0)
    num_used = np.maximum(used.sum(axis=1), 1)
    precision = np.where(used, matches / np.maximum(outputs, 1), 0.0).sum(axis=1) / num_used
    recall = np.where(used, matches / np.maximum(references, 1), 0.0).sum(axis=1) / num_used
    factor = CHRF_BETA**2
    denominator = factor * precision + recall
    scores = 100 * (1 + factor) * precision * recall / np.where(denominator > 0, denominator, 1.0)
    return np.where(denominator > 0, scores, 0.0)


def sentence_chrf(predictions: list[str], references: list[str]) -> np.ndarray:
    """Return the chrF of each pair of texts, [rows], as sacrebleu's sentence_chrf.

    Raises:
        ValueError: The numbers of predictions and references differ.
    """
    return chrf_from_sums(chrf_rows("chrf", predictions, references))


def chrf_signature(metric: str) -> str:
    """Return sacrebleu's signature of chrF or chrF++."""
    from sacrebleu.metrics.chrf import CHRF

    scorer = CHRF(word_order=CHRF_WORD_ORDERS[metric])
    scorer.corpus_score(["a"], [["a"]])
    return f"{metric}|{scorer.get_signature()}"
