"""IBM model 1: against an enumeration of all alignments, on a worked example, and on larger random data."""

import itertools
import math
from collections import defaultdict

import numpy as np
import pytest

from raydistill.inference import word_alignment
from raydistill.inference.word_alignment import EMPTY, translation_probabilities

DAS, HAUS, BUCH, EIN, THE, HOUSE, BOOK, A = range(8)
SOURCES = [[DAS, HAUS], [DAS, BUCH], [EIN, BUCH]]
TARGETS = [[THE, HOUSE], [THE, BOOK], [A, BOOK]]


def as_dict(translations):
    columns = (translations.sources.tolist(), translations.targets.tolist(), translations.probabilities.tolist())
    return {(source, target): probability for source, target, probability in zip(*columns, strict=True)}


def enumerate_alignments(sources, targets, iterations):
    """EM by the definition: the expected counts over every alignment of all target tokens, one by one."""
    t = defaultdict(lambda: 1.0)
    for _ in range(iterations):
        counts = defaultdict(float)
        for source, target in zip(sources, targets, strict=True):
            source = [EMPTY, *source]
            alignments = list(itertools.product(source, repeat=len(target)))
            weights = [math.prod(t[pair] for pair in zip(a, target, strict=True)) for a in alignments]
            for alignment, weight in zip(alignments, weights, strict=True):
                for pair in zip(alignment, target, strict=True):
                    counts[pair] += weight / sum(weights)
        totals = defaultdict(float)
        for (source_token, _), count in counts.items():
            totals[source_token] += count
        t.update({pair: count / totals[pair[0]] for pair, count in counts.items()})
    return dict(t)


@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_em_equals_the_enumeration_of_all_alignments(iterations):
    expected = enumerate_alignments(SOURCES, TARGETS, iterations)
    computed = as_dict(translation_probabilities(SOURCES, TARGETS, iterations))
    assert computed == pytest.approx(expected, rel=1e-5)


def test_first_iteration_by_hand():
    """Each target token is spread evenly over the empty token and the two source tokens: a third each."""
    computed = as_dict(translation_probabilities(SOURCES, TARGETS, 1))
    # das: the 2/3, house 1/3, book 1/3; Haus: the 1/3, house 1/3; empty: the 2/3, book 2/3, house 1/3, a 1/3
    assert computed[DAS, THE] == pytest.approx(1 / 2)
    assert computed[DAS, BOOK] == pytest.approx(1 / 4)
    assert computed[HAUS, HOUSE] == pytest.approx(1 / 2)
    assert computed[EMPTY, THE] == pytest.approx(1 / 3)


def test_em_resolves_the_ambiguity():
    best = translation_probabilities(SOURCES, TARGETS, 20).best(1, ignore=np.array([]))
    assert {source: int(targets[0]) for source, targets in best.items()} == {DAS: THE, HAUS: HOUSE, BUCH: BOOK, EIN: A}


def test_candidates_are_limited_and_exclude_ignored_targets():
    best = translation_probabilities(SOURCES, TARGETS, 5).best(2, ignore=np.array([THE]))
    assert {source: targets.tolist() for source, targets in best.items()} == {
        DAS: [HOUSE, BOOK],  # "Buch" and the empty token explain "book", and only "Haus" explains "house"
        HAUS: [HOUSE],
        BUCH: [BOOK, A],
        EIN: [A, BOOK],
    }


def test_repeated_tokens_count_once():
    repeated = translation_probabilities([[DAS, DAS, HAUS], *SOURCES[1:]], [[THE, HOUSE, HOUSE], *TARGETS[1:]], 4)
    assert as_dict(repeated) == pytest.approx(as_dict(translation_probabilities(SOURCES, TARGETS, 4)))


def test_result_does_not_depend_on_the_chunks(monkeypatch):
    generator = np.random.default_rng(0)
    sources = [generator.integers(0, 40, size).tolist() for size in generator.integers(0, 9, 200)]
    targets = [generator.integers(0, 30, size).tolist() for size in generator.integers(0, 7, 200)]
    whole = as_dict(translation_probabilities(sources, targets, 3))
    monkeypatch.setattr(word_alignment, "CHUNK_PAIRS", 50)
    assert len(list(word_alignment._make_chunks(*word_alignment._sample_rows(sources, targets, 10**9)))) > 5
    assert as_dict(translation_probabilities(sources, targets, 3)) == pytest.approx(whole)


def test_probabilities_of_each_source_token_sum_to_one():
    translations = translation_probabilities(SOURCES, TARGETS, 3)
    for source in (EMPTY, DAS, HAUS, BUCH, EIN):
        assert translations.probabilities[translations.sources == source].sum() == pytest.approx(1)


def test_limit_of_pairs_uses_evenly_spaced_rows():
    """Rows of (3 source tokens + the empty token) * 2 = 8 pairs: 24 pairs allow 3 of 9 rows."""
    sources = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(9)]
    targets = [[2 * i, 2 * i + 1] for i in range(9)]
    translations = translation_probabilities(sources, targets, 1, max_pairs=24)
    assert set(translations.targets.tolist()) == {0, 1, 6, 7, 12, 13}


@pytest.mark.parametrize("rows", [([], []), ([[1, 2]], [[]])])
def test_no_targets_give_no_translations(rows):
    assert translation_probabilities(*rows).best(5, np.array([])) == {}
