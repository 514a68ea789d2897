"""Near duplicates: similarities against sets of n-grams in plain Python, and the rows that the index returns."""

import random

import pytest

from raydistill.data.overlap import (
    BAND_ROWS,
    BANDS,
    MIN_SIMILARITY,
    NearDuplicateIndex,
    hash_ngrams,
    jaccard,
    normalize_text,
)

WORDS = ["alder", "birch", "cedar", "fir", "hazel", "larch", "maple", "oak", "pine", "rowan", "spruce", "willow"]


def ngrams_of(text):
    text = " ".join(text.casefold().split())
    return {text[i : i + 5] for i in range(len(text) - 4)}


def similarity(a, b):
    first, second = ngrams_of(a), ngrams_of(b)
    return len(first & second) / len(first | second)


def random_text(rng, words=20):
    return " ".join(f"{rng.choice(WORDS)}{rng.randrange(1000)}" for _ in range(words))


def test_similarity_is_the_jaccard_index_of_character_ngrams():
    rng = random.Random(0)
    for _ in range(20):
        a = random_text(rng)
        b = " ".join(word if rng.random() < 0.8 else "something" for word in a.split())
        assert jaccard(hash_ngrams(a), hash_ngrams(b)) == pytest.approx(similarity(a, b))


def test_case_width_and_white_space_do_not_count():
    assert normalize_text(" Ein\tMann\u00a0 LÄUFT\n ") == "ein mann läuft"
    assert normalize_text("ＡＢＣ ①") == "abc 1"
    assert jaccard(hash_ngrams("A dog  runs"), hash_ngrams("a DOG runs")) == 1
    assert len(hash_ngrams("Hi")) == 1  # shorter than an n-gram


def test_index_returns_the_most_similar_row_and_its_similarity():
    rng = random.Random(1)
    texts = [random_text(rng) for _ in range(300)]
    index = NearDuplicateIndex((("test", f"r{i}", text) for i, text in enumerate(texts)))
    assert index.find(texts[7]) == ("test", "r7", 1.0)
    changed = texts[7].replace(texts[7].split()[3], "another")
    match = index.find(changed)
    assert match.id == "r7"
    assert match.similarity == pytest.approx(similarity(texts[7], changed))
    assert MIN_SIMILARITY < match.similarity < 1
    assert index.find(random_text(rng)) is None
    # A text of the same words in another order shares words, but few of its n-grams span them.
    assert index.find(" ".join(rng.sample(texts[7].split(), 20))) is None


def test_pairs_above_the_threshold_are_detected_as_often_as_the_formula_says():
    """The share of detected near duplicates is at least the probability at the threshold, 1 - (1 - 0.7^5)^25."""
    rng = random.Random(2)
    texts = [random_text(rng, 30) for _ in range(400)]
    index = NearDuplicateIndex((("test", str(i), text) for i, text in enumerate(texts)))
    near = []
    for i, text in enumerate(texts):
        words = text.split()
        for position in rng.sample(range(30), 3):
            words[position] = f"new{rng.randrange(100)}"
        if similarity(text, changed := " ".join(words)) >= MIN_SIMILARITY:
            near.append((i, changed))
    assert len(near) > 100
    num_detected = sum(index.find(changed) is not None for _, changed in near)
    assert num_detected / len(near) >= 1 - (1 - MIN_SIMILARITY**BAND_ROWS) ** BANDS - 0.02


def test_empty_index_matches_nothing():
    assert NearDuplicateIndex(()).find("any text at all") is None
