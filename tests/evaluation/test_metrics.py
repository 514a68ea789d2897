"""Scores against hand-worked numbers, sacrebleu itself, and exact enumeration for the bootstrap."""

import itertools
import json
import math
import subprocess
import sys
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp

from raydistill.core.errors import UserError
from raydistill.evaluation import metrics, ngram_counts, rouge

VOCABULARY = ["the", "a", "cat", "dog", "sat", "ran", "on", "mat", ",", ".", "!"]
WORDS = st.lists(st.sampled_from(VOCABULARY), max_size=12).map(" ".join)
TEXTS = WORDS | st.text(st.sampled_from("abcé .,日本"), max_size=12)


def test_rouge_by_hand() -> None:
    # "the cat sat" / "the cat ran home": 2 of 3 and 2 of 4 words; 1 of 2 and 1 of 3 bigrams.
    rows = rouge.rouge_rows(["the cat sat"], ["the cat ran home"])
    assert rows["rouge1"] == pytest.approx([100 * 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)])
    assert rows["rouge2"] == pytest.approx([100 * 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)])
    assert rows["rougeL"] == pytest.approx(rows["rouge1"])


def test_rouge_stems_and_ignores_case_and_punctuation() -> None:
    assert rouge.rouge_rows(["Running dogs!"], ["run DOG"])["rouge2"] == pytest.approx([100.0])
    # words of three letters or fewer are not stemmed: "ids" is not "id"
    assert rouge.rouge_rows(["his ids"], ["his id"])["rouge1"] == pytest.approx([50.0])
    assert rouge.rouge_rows(["Jumped quickly"], ["jumping, QUICKLY."])["rouge2"] == pytest.approx([100.0])


def test_rouge_lsum_takes_the_union_over_sentences_in_any_order() -> None:
    # Same two sentences, swapped: the longest common subsequence has 3 of 6 words, the summary level all 6.
    rows = rouge.rouge_rows(["one two three. four five six."], ["four five six. one two three."])
    assert rows["rougeL"] == pytest.approx([50.0])
    assert rows["rougeLsum"] == pytest.approx([100.0])
    newlines = rouge.rouge_rows(["one two three\nfour five six"], ["four five six\none two three"])
    assert newlines["rougeLsum"] == pytest.approx([100.0])


def test_rouge_of_empty_output_is_zero() -> None:
    rows = rouge.rouge_rows(["", "."], ["a cat", "a cat"])
    assert all(np.array_equal(values, [0, 0]) for values in rows.values())


def test_rouge_corpus_score_is_the_mean_over_rows() -> None:
    scored = metrics.score("rouge2", ["a b c", "x y z"], ["a b c", "a b c"])
    assert scored.metrics == pytest.approx({"rouge1": 50, "rouge2": 50, "rougeL": 50, "rougeLsum": 50})
    assert scored.row_stats.tolist() == [100, 0]


def test_bleu_counts_by_hand() -> None:
    rows = ngram_counts.bleu_rows(["the cat sat on mat", ""], ["the cat sat on the mat", "a cat"])
    # 5 of 5 words; the cat, cat sat, sat on; the cat sat, cat sat on; the cat sat on
    assert rows.tolist() == [[5, 3, 2, 1, 5, 4, 3, 2, 5, 6], [0, 0, 0, 0, 0, 0, 0, 0, 0, 2]]
    by_hand = 100 * math.exp(1 - 6 / 5) * (5 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert ngram_counts.corpus_bleu(rows[:1]) == pytest.approx(by_hand)


def test_sacrebleu_keeps_no_text_when_the_rows_are_counted() -> None:
    ngram_counts.bleu_rows(["the cat sat on mat"], ["the cat sat on the mat"])
    for tokenizer in (Tokenizer13a, TokenizerRegexp):
        assert tokenizer.__call__.cache_info().currsize == 0


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(WORDS, WORDS.filter(bool)), min_size=1, max_size=6))
def test_bleu_is_sacrebleus(pairs: list[tuple[str, str]]) -> None:
    predictions, references = [list(side) for side in zip(*pairs, strict=True)]
    expected = sacrebleu.corpus_bleu(predictions, [references], smooth_method="exp", tokenize="13a").score
    rows = ngram_counts.bleu_rows(predictions, references)
    assert ngram_counts.corpus_bleu(rows) == expected
    assert ngram_counts.bleu_from_sums(rows.sum(axis=0, keepdims=True).astype(float))[0] == pytest.approx(expected)
    assert metrics.score("bleu", predictions, references).metrics["bleu"] == expected


@pytest.mark.parametrize(("metric", "word_order"), [("chrf", 0), ("chrf++", 2)])
@settings(deadline=None, max_examples=40)
@given(pairs=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6))
def test_chrf_is_sacrebleus(metric: str, word_order: int, pairs: list[tuple[str, str]]) -> None:
    predictions, references = [list(side) for side in zip(*pairs, strict=True)]
    expected = sacrebleu.corpus_chrf(predictions, [references], word_order=word_order).score
    scored = metrics.score(metric, predictions, references)
    assert scored.metrics[metric] == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert scored.row_stats.shape == (len(pairs), 18 + 3 * word_order)
    # The sum of the rows is what sacrebleu computes its corpus score from
    scorer = sacrebleu.CHRF(word_order=word_order)
    assert scorer._compute_f_score(scored.row_stats.sum(axis=0).tolist()) == pytest.approx(expected)
    sentences = [sacrebleu.sentence_chrf(p, [r], word_order=word_order).score for p, r in pairs]
    assert metrics.row_scores(metric, scored.row_stats) == pytest.approx(sentences)


def test_chrf_by_hand() -> None:
    # "abc" / "abd": characters a, b of 3 on both sides; ab of 2 on both; no trigram; longer orders exist on no side.
    # Precision and recall are (2/3 + 1/2 + 0) / 3, and so is F.
    assert metrics.score("chrf", ["abc"], ["abd"]).metrics["chrf"] == pytest.approx(100 * (2 / 3 + 1 / 2) / 3)
    # chrF++ adds the words, of which none match, as a fourth order
    assert metrics.score("chrf++", ["abc"], ["abd"]).metrics["chrf++"] == pytest.approx(100 * (2 / 3 + 1 / 2) / 4)


def test_chrf_of_rows_by_hand() -> None:
    """Characters without spaces, n-grams of the orders that both texts have, F-score with recall weighted twice."""
    equal = (3 / 4 + 2 / 3 + 1 / 2 + 0) / 4  # "abcd" / "abce": precision and recall of 1 to 4 characters
    recall = (3 / 4 + 2 / 3 + 1 / 2) / 3  # "abc" / "abcd", whose precision is 1
    rows = ngram_counts.sentence_chrf(["ab cd", "abc", ""], ["abce", "a bcd", "x"])
    assert rows == pytest.approx([100 * equal, 100 * 5 * recall / (4 + recall), 0])


def test_scores_are_those_of_the_command_line_of_sacrebleu(tmp_path: Path) -> None:
    predictions = ["Ein Mann fährt Rad.", "Zwei Hunde  spielen im Schnee !", "", "日本語の文です。", "a b c d"]
    references = ["Ein Mann fährt ein Rad.", "Zwei Hunde spielen.", "Eine Frau.", "これは日本語の文です。", "a b c d e"]
    for name, lines in (("out", predictions), ("ref", references)):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    common = [sys.executable, "-m", "sacrebleu", "ref", "-i", "out", "-w", "12", "-f", "json", "-m"]
    for metric, arguments in {"bleu": ["bleu"], "chrf": ["chrf"], "chrf++": ["chrf", "--chrf-word-order", "2"]}.items():
        done = subprocess.run([*common, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        report = json.loads(done.stdout)
        scored = metrics.score(metric, predictions, references).metrics[metric]
        assert scored == pytest.approx(report["score"], abs=1e-11)
        assert metrics.signature(metric).split("|")[1:] == report["signature"].split("|")


def test_exact_match_ignores_white_space_at_the_ends() -> None:
    scored = metrics.score("exact_match", ["Ja.", " Ja.\n", "ja."], ["Ja."] * 3)
    assert scored.row_stats.tolist() == [100, 100, 0]
    assert scored.metrics == pytest.approx({"exact_match": 200 / 3})


def test_several_metrics_are_scored_in_one_call() -> None:
    scored = metrics.score("chrf++", ["the cat sat"], ["the cat ran"], reported=["bleu", "rouge1", "bleu"])
    assert list(scored.metrics) == ["chrf++", "bleu", "rouge1", "rouge2", "rougeL", "rougeLsum"]
    assert list(scored.statistics) == list(scored.metrics)
    assert scored.row_stats.shape == (1, 24)
    assert scored.metrics["rouge1"] == pytest.approx(100 * 2 / 3)


def test_signatures_name_what_is_needed() -> None:
    assert metrics.signature("bleu").startswith("bleu|nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert "stemmer:porter" in metrics.signature("rouge2")
    assert metrics.signature("rouge2").endswith("rouge-score-0.1.2")


def test_bootstrap_of_a_mean_has_the_textbook_width() -> None:
    rows = np.random.default_rng(3).normal(20, 10, size=2000)
    low, high = metrics.bootstrap_interval("rouge2", rows, n_resamples=4000)
    error = rows.std() / math.sqrt(len(rows))
    assert low == pytest.approx(rows.mean() - 1.96 * error, abs=0.1 * error * 1.96)
    assert high == pytest.approx(rows.mean() + 1.96 * error, abs=0.1 * error * 1.96)


def test_bootstrap_against_all_resamples_of_four_rows() -> None:
    rows = np.array([0.0, 10.0, 30.0, 100.0])
    means = [np.mean(draw) for draw in itertools.product(rows, repeat=4)]
    low, high = metrics.bootstrap_interval("rouge2", rows, n_resamples=20_000)
    assert (low, high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=2.6)
    scored = metrics.bootstrap_scores("rouge2", [rows], 0, 20_000)[0]
    assert np.mean(scored <= 20) == pytest.approx(np.mean(np.array(means) <= 20), abs=0.015)
    assert set(np.round(scored, 6)) <= set(np.round(means, 6))


def test_bleu_bootstrap_against_all_resamples_of_three_rows() -> None:
    rows = ngram_counts.bleu_rows(
        ["the cat sat on the mat", "a dog ran off", "yes"], ["the cat sat on a mat", "a dog ran", "no"]
    )
    exact = [ngram_counts.corpus_bleu(rows[list(draw)]) for draw in itertools.product(range(3), repeat=3)]
    sampled = metrics.bootstrap_scores("bleu", [rows], 1, 20_000)[0]
    assert sampled.mean() == pytest.approx(np.mean(exact), abs=0.5)
    assert np.unique(np.round(sampled, 6)).tolist() == np.unique(np.round(exact, 6)).tolist()


def test_paired_bootstrap_uses_the_same_resamples() -> None:
    rows = np.random.default_rng(0).normal(20, 10, size=300)
    shifted = metrics.paired_bootstrap("rouge2", rows + 0.5, rows)  # far below either's own interval of +-1.1
    assert (shifted.difference, shifted.low, shifted.high) == pytest.approx((0.5, 0.5, 0.5))
    assert shifted.p_value == pytest.approx(2 / 10_001)
    same = metrics.paired_bootstrap("rouge2", rows, rows)
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    with pytest.raises(ValueError, match="same rows"):
        metrics.paired_bootstrap("rouge2", rows, rows[1:])


@pytest.mark.parametrize("metric", ["rouge2", "bleu", "chrf++"])
def test_bootstrap_scores_equal_a_loop_over_resampled_rows(metric: str) -> None:
    """Each resample is written out as a list of rows and scored by the metric's reference, one at a time."""
    rng = np.random.default_rng(5)
    chrf = partial(sacrebleu.corpus_chrf, word_order=2)
    corpus_score: dict[str, Any] = {"bleu": sacrebleu.corpus_bleu, "chrf++": chrf}
    if metric in corpus_score:
        words = np.array(VOCABULARY[:8])
        texts = [" ".join(rng.choice(words, size=rng.integers(3, 12))) for _ in range(120)]
        references, first, second = texts[:40], texts[40:80], texts[80:]
        systems = [metrics.score(metric, outputs, references).row_stats for outputs in (first, second)]
    else:
        systems = [rng.uniform(0, 60, size=40), rng.uniform(0, 60, size=40)]
    resampled = metrics.bootstrap_scores(metric, systems, 0, 30)
    counts = metrics.resample_counts(40, 30, 0, 0)
    assert counts.sum(axis=1).tolist() == [40] * 30
    for i, row_counts in enumerate(counts):
        drawn = [row for row, count in enumerate(row_counts) for _ in range(count)]
        if metric in corpus_score:
            expected = [
                corpus_score[metric]([outputs[r] for r in drawn], [[references[r] for r in drawn]]).score
                for outputs in (first, second)
            ]
        else:
            expected = [sum(rows[r] for r in drawn) / 40 for rows in systems]
        assert [scores[i] for scores in resampled] == pytest.approx(expected, rel=1e-9)


def test_paired_interval_equals_an_independent_loop() -> None:
    """The percentile interval of a plain loop with draws of its own, within the error of 10,000 resamples."""
    rng = np.random.default_rng(6)
    a = rng.gamma(1.5, 10, size=150)
    b = a + rng.normal(-0.3, 6, size=150)
    drawn = (rng.choice(150, size=150) for _ in range(10_000))
    differences = [a[rows].mean() - b[rows].mean() for rows in drawn]
    comparison = metrics.paired_bootstrap("rouge2", a, b)
    width = comparison.high - comparison.low
    assert [comparison.low, comparison.high] == pytest.approx(
        list(np.percentile(differences, [2.5, 97.5])), abs=0.04 * width
    )


def test_comparisons_with_a_reference_equal_those_one_by_one() -> None:
    rng = np.random.default_rng(7)
    reference = rng.uniform(0, 50, size=60)
    systems = [reference + rng.normal(size=60) for _ in range(3)]
    together = metrics.compare_with_reference("rouge2", systems, reference)
    for comparison, rows in zip(together, systems, strict=True):
        alone = metrics.paired_bootstrap("rouge2", rows, reference)
        assert (comparison.low, comparison.high) == pytest.approx((alone.low, alone.high))
        assert (comparison.difference, comparison.p_value) == pytest.approx((alone.difference, alone.p_value))
    with pytest.raises(ValueError, match="same rows"):
        metrics.compare_with_reference("rouge2", [reference[1:]], reference)


def test_seeds_are_resampled_with_the_variance_of_their_mean() -> None:
    """Rows of equal scores leave the variance of the seeds alone: s^2 / n, computed by hand.

    Of n seeds, n - 1 are drawn: of (1, 2, 6) nine pairs with means 1, 1.5, 1.5, 2, 3.5, 3.5, 4, 4, 6.
    """
    three = [np.full(40, score) for score in (1.0, 2.0, 6.0)]
    assert metrics.bootstrap_interval_over_seeds("rouge2", three) == (1.0, 6.0)
    scores = metrics._resample_seeds([np.full(90_000, score) for score in (1.0, 2.0, 6.0)], 0)
    assert sorted(set(scores)) == [1, 1.5, 2, 3.5, 4, 6]
    assert np.mean(scores == 1.5) == pytest.approx(2 / 9, abs=0.01)
    assert np.mean(scores) == pytest.approx(3.0, abs=0.03)
    assert np.var(scores) == pytest.approx(7 / 3, rel=0.03)  # s^2 = 7
    assert metrics.mean_score("rouge2", three) == 3.0


def test_comparison_of_seeds_covers_rows_and_seeds_of_both_sides() -> None:
    """The variance of a difference of means is that of the rows plus s^2 / n of each side (here 2 and 0.5)."""
    rng = np.random.default_rng(9)
    base = rng.normal(20, 5, size=400)
    a, b = [base + shift + rng.normal(0, 8, size=400) for shift in (0.0, 2.0)], [base - 1.0, base + 1.0]
    runs = [
        [rows - rows.mean() + mean for rows, mean in zip(side, means, strict=True)]
        for side, means in ((a, (20.0, 24.0)), (b, (20.0, 22.0)))
    ]
    [comparison] = metrics.compare_with_reference("rouge2", [runs[0]], runs[1])
    assert comparison.difference == pytest.approx(1.0)
    # Of two seeds one is drawn, so that differences of 20 - 22, 20 - 20, 24 - 22 and 24 - 20 are equally frequent
    assert comparison.low == pytest.approx(-2.0, abs=1.3)
    assert comparison.high == pytest.approx(4.0, abs=1.3)
    [one_seed] = metrics.compare_with_reference("rouge2", [runs[0][0]], runs[1][0])
    assert one_seed.high - one_seed.low < 0.5 * (comparison.high - comparison.low)


def test_bootstrap_resamples_in_chunks_of_bounded_memory() -> None:
    """10,000 resamples of 2,000 rows would be 160 MB as one matrix of counts."""
    rows = np.random.default_rng(8).uniform(0, 50, size=2000)
    metrics.resample_counts.cache_clear()
    tracemalloc.start()
    scores = metrics.bootstrap_scores("rouge2", [rows], 0, 10_000)[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert scores.shape == (10_000,)
    assert peak < 90e6


def test_paired_bootstrap_finds_no_difference_in_noise_at_the_promised_rate() -> None:
    rng = np.random.default_rng(1)
    ps = [
        metrics.paired_bootstrap("rouge2", rng.normal(size=200), rng.normal(size=200), n_resamples=500).p_value
        for _ in range(200)
    ]
    assert 0.01 <= np.mean(np.array(ps) < 0.05) <= 0.10  # 5 %, and 2.2 standard errors of it


def test_repetition() -> None:
    assert metrics.is_repetitive("so so so so")
    assert metrics.is_repetitive("he said that he said that he said that he said that")
    assert not metrics.is_repetitive("so so so it goes")
    assert metrics.is_repetitive("a b a c a b b a c b c a")  # 3 of 12 distinct
    assert not metrics.is_repetitive("the cat sat on the mat near the dog")
    assert metrics.repetition_rate(["so so so so", "fine", "", "ok"]) == 0.25
    assert metrics.repetition_rate([]) == 0


def test_sentences_and_lead() -> None:
    text = 'It rained. "Why?" he asked! The end'
    assert rouge.split_sentences(text) == ["It rained.", '"Why?" he asked!', "The end"]
    assert rouge.split_sentences("a. b\n\nc ") == ["a. b", "c"]
    assert rouge.lead_baseline(text, 2) == 'It rained. "Why?" he asked!'
    assert rouge.lead_baseline("", 3) == ""


def test_what_cannot_be_scored_is_said() -> None:
    with pytest.raises(UserError, match="no rows"):
        metrics.score("rouge2", [], [])
    with pytest.raises(UserError, match=r"unknown metric 'rogue2'; did you mean 'rouge2'\?"):
        metrics.score("rogue2", ["a"], ["a"])
    with pytest.raises(UserError, match="unknown metric 'meteor'; known metrics: rouge1, "):
        metrics.score("meteor", ["a"], ["a"])
    with pytest.raises(ValueError, match="1 predictions for 2"):
        metrics.score("bleu", ["a"], ["a", "b"])


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_row_scores_of_bleu_are_sentence_bleu(pairs: list[tuple[str, str]]) -> None:
    predictions, references = [list(side) for side in zip(*pairs, strict=True)]
    expected = [sacrebleu.sentence_bleu(text, [reference]).score for text, reference in pairs]
    scores = metrics.row_scores("bleu", ngram_counts.bleu_rows(predictions, references))
    assert scores == pytest.approx(expected)


def test_row_scores_of_rouge_are_the_statistics() -> None:
    assert metrics.row_scores("rouge2", np.array([1.5, 2.0])).tolist() == [1.5, 2.0]


@pytest.mark.parametrize("metric", ["rouge2", "bleu"])
def test_pairs_are_compared_as_with_each_reference(metric: str) -> None:
    rng = np.random.default_rng(0)
    texts = [[" ".join(rng.choice(VOCABULARY, 6)) for _ in range(30)] for _ in range(4)]
    systems = [metrics.score(metric, outputs, texts[0]).row_stats for outputs in texts[1:]]
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    comparisons = metrics.compare_pairs(metric, systems, pairs)
    assert list(comparisons) == pairs
    for (i, j), comparison in comparisons.items():
        assert comparison == metrics.compare_with_reference(metric, [systems[i]], systems[j])[0]
    # Seeds: the mean of two runs whose scores differ by a constant, against one run, with the variance over seeds
    [difference] = metrics.compare_pairs(
        "rouge2", [[np.full(9, 1.0), np.full(9, 3.0)], np.full(9, 1.0)], [(0, 1)]
    ).values()
    assert (difference.difference, difference.low, difference.high) == (1.0, 0.0, 2.0)


def test_share_of_repeated_bigrams_by_hand() -> None:
    assert metrics.repeated_bigrams("a b A b") == pytest.approx(1 / 3)  # a b, b a, a b
    assert metrics.repeated_bigrams("one") == 0.0
    assert metrics.repeated_bigrams("") == 0.0
