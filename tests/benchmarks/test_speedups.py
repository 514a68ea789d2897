"""The speed-ups of Tables 6 and 7, on tiny models of the same depths."""

import argparse

import pytest
from transformers import BartConfig

from benchmarks import speedups
from benchmarks.random_models import SPECIAL_TOKENS, word_tokenizer
from benchmarks.speedups import CASES, case_lengths, published_sizes, table_rows, time_sizes
from raydistill.evaluation.latency import Timing

OPTIONS = argparse.Namespace(device="cpu", threads=1, batch=2, repeats=1, engine="transformers", precision="fp32")


def tiny_config():
    sizes = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 1024}
    sizes |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_layers": 12, "decoder_layers": 12}
    return BartConfig(vocab_size=300, **sizes)


def test_sizes_are_those_of_the_paper_with_the_teacher_first():
    """Expected values are copied from Tables 6 and 7 of the paper, the slowest first."""
    assert published_sizes(CASES["bart-xsum"]) == ["12-12", "12-6", "9-6", "6-6", "12-3", "12-1"]
    assert published_sizes(CASES["pegasus-cnn"]) == ["16-16", "16-4"]


@pytest.mark.parametrize(
    ("name", "expected"), [("bart-xsum", (412, 24)), ("pegasus-xsum", (412, 24)), ("bart-cnn", (869, 64))]
)
def test_lengths_are_the_mean_words_of_the_corpus_in_tokens(name, expected):
    assert case_lengths(CASES[name]) == expected


def test_speedup_is_relative_to_the_teacher_and_shown_with_the_papers():
    timings = {
        "12-12": Timing(1000.0, 900.0, 1100.0, 3),
        "12-3": Timing(250.0, 240.0, 260.0, 3),
        "12-6": Timing(400.0, 390.0, 410.0, 3),
    }
    rows = {row[2]: row for row in table_rows(CASES["bart-xsum"], timings)}
    assert {size: row[5] for size, row in rows.items()} == {"12-12": "1.00", "12-3": "4.00", "12-6": "2.50"}
    assert rows["12-3"][3:5] == ["250", "240 to 260"]
    assert rows["12-3"][7] == "1.93"  # the paper's Table 6


def test_each_size_is_measured_once(monkeypatch, tmp_path):
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path))
    tokenizer = word_tokenizer(300, SPECIAL_TOKENS)
    case, sizes = CASES["bart-xsum"], ["12-12", "12-1"]
    first = time_sizes(case, sizes, tiny_config(), tokenizer, OPTIONS)
    assert list(first) == sizes
    assert all(timing.median_ms > 0 for timing in first.values())
    monkeypatch.setattr(speedups, "open_engine", None)  # a second measurement would call it
    assert time_sizes(case, sizes, tiny_config(), tokenizer, OPTIONS) == first
