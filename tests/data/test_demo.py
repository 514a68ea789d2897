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

# Changes only when the text of the corpus is changed on purpose; then scores of older runs do not compare.
PINNED = "040a7dcc3e26f93b44f16fd1cf8a22e830cc666d34ed6f38176703f3c720d65e"


def _hash() -> str:
    return hashlib.sha256(json.dumps([demo_rows(split) for split in SPLIT_SIZES]).encode()).hexdigest()


def test_text_is_pinned():
    assert _hash() == PINNED


def test_another_process_with_other_hash_seed_makes_the_same_text():
    code = "from tests.data.test_demo import _hash; print(_hash())"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == PINNED


def test_counts_and_ids():
    assert {split: len(demo_rows(split)) for split in SPLIT_SIZES} == {"train": 6000, "validation": 400, "test": 400}
    ids = [row["id"] for split in SPLIT_SIZES for row in demo_rows(split)]
    assert len(set(ids)) == 6800
    with pytest.raises(KeyError):
        demo_rows("dev")


@pytest.mark.parametrize("key", ["source", "target"])
def test_no_text_is_in_two_rows_or_splits(key):
    texts = [row[key] for split in SPLIT_SIZES for row in demo_rows(split)]
    assert len(set(texts)) == len(texts)


def test_lengths_and_no_placeholder_left():
    for row in (row for split in SPLIT_SIZES for row in demo_rows(split)):
        assert 45 <= len(row["source"].split()) <= 75
        assert 8 <= len(row["target"].split()) <= 15
        for text in (row["source"], row["target"]):
            assert not re.search(r"[{}_\d]|  | [.,:]", text)
            assert text.endswith(".")
            assert all(sentence[0].isupper() for sentence in text.split(". "))


def test_every_test_word_is_known_from_training_and_words_are_few():
    def words(split):
        return {w for row in demo_rows(split) for w in re.findall(r"\w+", row["source"] + " " + row["target"])}

    assert words("test") | words("validation") <= words("train")
    assert len(words("train")) <= 900


@pytest.mark.parametrize(("sentences", "bound"), [(1, 15.0), (3, 15.0)])
def test_copying_the_first_sentences_scores_little(sentences, bound):
    scorer = rouge_scorer.RougeScorer(["rouge2"], use_stemmer=True)
    rows = demo_rows("test")
    scores = [
        scorer.score(row["target"], ". ".join(row["source"].split(". ")[:sentences]))["rouge2"].fmeasure for row in rows
    ]
    assert 100 * sum(scores) / len(scores) < bound


def test_facts_of_the_summary_follow_from_the_report():
    """The winner is the one with more votes, worked out here from the report alone."""
    tens = ["ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
    checked = 0
    for row in demo_rows("test"):
        event = [s for s in row["source"].split(". ") if not s.startswith(demo.DISTRACTOR_CUES)]
        found = re.search(r"Of every hundred votes (\w+) went to (\w+)", ". ".join(event))
        other = re.search(r"(\w+) could count on (\w+)|, and (\w+) got (\w+)", ". ".join(event))
        if not found or not other:
            continue
        rival, votes = (part for part in other.groups() if part)
        ahead, behind = (found[2], rival) if tens.index(found[1]) > tens.index(votes) else (rival, found[2])
        assert row["target"].startswith(f"{ahead} beats {behind} ")
        checked += 1
    assert checked >= 5


def test_made_in_under_two_seconds():
    demo._generate_splits.cache_clear()
    start = time.process_time()
    demo_rows("train")
    assert time.process_time() - start < 2
