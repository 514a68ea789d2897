"""The embedded demo corpus."""

import hashlib
import json
import re
import subprocess
import sys
import time

import pytest
from rouge_score import rouge_scorer

from raydistill.data import demo
from raydistill.data.demo import SPLIT_SIZES, demo_rows

# Scores of runs on the demo are comparable only while this hash is unchanged.
PINNED = "040a7dcc3e26f93b44f16fd1cf8a22e830cc666d34ed6f38176703f3c720d65e"


def corpus_hash() -> str:
    return hashlib.sha256(json.dumps([demo_rows(split) for split in SPLIT_SIZES]).encode()).hexdigest()


def test_corpus_is_pinned():
    assert corpus_hash() == PINNED


def test_corpus_does_not_depend_on_the_hash_seed():
    code = "from tests.data.test_demo import corpus_hash; print(corpus_hash())"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == PINNED


def test_split_sizes_and_unique_ids():
    assert {split: len(demo_rows(split)) for split in SPLIT_SIZES} == {"train": 6000, "validation": 400, "test": 400}
    ids = [row["id"] for split in SPLIT_SIZES for row in demo_rows(split)]
    assert len(set(ids)) == 6800
    with pytest.raises(KeyError):
        demo_rows("dev")


@pytest.mark.parametrize("key", ["source", "target"])
def test_no_text_occurs_twice(key):
    texts = [row[key] for split in SPLIT_SIZES for row in demo_rows(split)]
    assert len(set(texts)) == len(texts)


def test_lengths_and_sentence_form():
    for row in (row for split in SPLIT_SIZES for row in demo_rows(split)):
        assert 45 <= len(row["source"].split()) <= 75
        assert 8 <= len(row["target"].split()) <= 15
        for text in (row["source"], row["target"]):
            assert not re.search(r"[{}_\d]|  | [.,:]", text)
            assert text.endswith(".")
            assert all(sentence[0].isupper() for sentence in text.split(". "))


def test_training_split_has_all_words_and_few():
    def words(split):
        return {w for row in demo_rows(split) for w in re.findall(r"\w+", row["source"] + " " + row["target"])}

    assert words("test") | words("validation") <= words("train")
    assert len(words("train")) <= 900


@pytest.mark.parametrize(("sentences", "bound"), [(1, 15.0), (3, 15.0)])
def test_copying_the_first_sentences_scores_low(sentences, bound):
    scorer = rouge_scorer.RougeScorer(["rouge2"], use_stemmer=True)
    rows = demo_rows("test")
    scores = [
        scorer.score(row["target"], ". ".join(row["source"].split(". ")[:sentences]))["rouge2"].fmeasure for row in rows
    ]
    assert 100 * sum(scores) / len(scores) < bound


def test_summary_of_an_election_names_the_winner_of_the_report():
    """The winner is computed from the votes in the report."""
    tens = ["ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
    cues = tuple(demo.load_vocabulary().distractor_cues)
    checked = 0
    for row in demo_rows("test"):
        event = [s for s in row["source"].split(". ") if not s.startswith(cues)]
        votes_of_first = re.search(r"Of every hundred votes (\w+) went to (\w+)", ". ".join(event))
        votes_of_second = re.search(r"(\w+) could count on (\w+)|, and (\w+) got (\w+)", ". ".join(event))
        if not votes_of_first or not votes_of_second:
            continue
        second, votes = (part for part in votes_of_second.groups() if part)
        first = votes_of_first[2]
        first_wins = tens.index(votes_of_first[1]) > tens.index(votes)
        winner, loser = (first, second) if first_wins else (second, first)
        assert row["target"].startswith(f"{winner} beats {loser} ")
        checked += 1
    assert checked >= 5


@pytest.mark.slow
def test_generation_takes_under_two_seconds():
    demo._generate_splits.cache_clear()
    demo.load_vocabulary.cache_clear()
    start = time.process_time()
    demo_rows("train")
    assert time.process_time() - start < 2
