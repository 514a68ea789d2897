"""The speed-ups of Tables 6 and 7 on shapes of the same depths, but tiny."""

import argparse

import pytest
from transformers import BartConfig

from benchmarks import random_models, speedups
from benchmarks.speedups import CASES, lengths, rows_of, sizes_of
from raydistill.evaluation.latency import Timing

ASKED = argparse.Namespace(device="cpu", threads=1, batch=2, repeats=1, engine="transformers", precision="fp32")


def tiny(form):
    sizes = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 1024}
    sizes |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_layers": 12, "decoder_layers": 12}
    return BartConfig(vocab_size=300, **sizes), random_models._tokenizer(300, random_models.SPECIAL)


def test_sizes_are_the_papers_and_the_teacher_comes_first():
    """Typed from the paper's Tables 6 and 7, the slowest first."""
    assert sizes_of(CASES["bart-xsum"]) == ["12-12", "12-6", "9-6", "6-6", "12-3", "12-1"]
    assert sizes_of(CASES["pegasus-cnn"]) == ["16-16", "16-4"]


@pytest.mark.parametrize(
    ("name", "wanted"), [("bart-xsum", (412, 24)), ("pegasus-xsum", (412, 24)), ("bart-cnn", (869, 64))]
)
def test_lengths_are_the_corpuss_words_in_tokens(name, wanted):
    assert lengths(CASES[name]) == wanted


def test_a_speed_up_is_over_the_teacher_and_stands_beside_the_papers(monkeypatch):
    times = {"12-12": 1000.0, "12-3": 250.0, "12-6": 400.0}
    monkeypatch.setattr(speedups, "large", tiny)
    monkeypatch.setattr(speedups, "sizes_of", lambda case: list(times))
    monkeypatch.setattr(speedups, "time_size", lambda t, k, case, size, asked: Timing(times[size], 1.0, 2.0, 1))
    rows = {row[2]: row for row in rows_of(CASES["bart-xsum"], ASKED)}
    assert {size: row[5] for size, row in rows.items()} == {"12-12": "1.00", "12-3": "4.00", "12-6": "2.50"}
    assert rows["12-3"][7] == "1.93"  # the paper's Table 6


def test_shapes_are_timed_once(monkeypatch, tmp_path):
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path))
    monkeypatch.setattr(speedups, "large", tiny)
    monkeypatch.setattr(speedups, "sizes_of", lambda case: ["12-12", "12-1"])
    first = rows_of(CASES["bart-xsum"], ASKED)
    assert all(float(row[3]) > 0 for row in first)
    assert first[0][3] != first[1][3]
    monkeypatch.setattr(speedups, "open_engine", None)  # a second measurement would need it
    assert rows_of(CASES["bart-xsum"], ASKED) == first
