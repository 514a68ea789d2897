"""The tables and the runs of benchmarks.ffn_choice."""

from argparse import Namespace
from pathlib import Path

from benchmarks.ffn_choice import ALL, ALL_FROZEN, CHOICES, as_markdown, latency_table, make_run


def row(choice: str, seed: int, bleu: float) -> dict:
    losses = {"untrained_loss": 4.0 - seed, "val_loss": 2.0, "params_m": 3.07}
    return {"size": "6-3", "choice": choice, "seed": seed, "bleu": bleu, **losses}


def test_means_over_seeds_and_differences_of_equal_seeds():
    bleu = {"activation": (35.0, 34.0), "random": (34.0, 34.5), ALL: (36.0, 36.0), ALL_FROZEN: (34.5, 35.0)}
    rows = [row(choice, seed, values[seed]) for seed in (0, 1) for choice, values in bleu.items()]
    text = as_markdown(rows, 0.25)
    assert "| 6-3 | activation | 3.07 | 3.500 | 2.000 | 34.50 (35.00, 34.00) | 2 |" in text
    assert "BLEU, activation minus random: +0.25 on average over 2 seeds (+1.00, -0.50)" in text
    assert "BLEU, random minus all, encoder frozen: -0.50 on average over 2 seeds (-0.50, -0.50)" in text
    assert "BLEU, random minus all, encoder trained: -1.75 on average over 2 seeds (-2.00, -1.50)" in text


def test_latency_table():
    timed = {"size": "6-6", "precision": "fp32", "beams": 4, "ratio": 0.9, "stop_reason": "precise"}
    noisy = {**timed, "beams": 1, "ratio": None, "interval": None, "stop_reason": "noisy"}
    text = latency_table([{**timed, "interval": (0.88, 0.92)}, noisy], 16)
    assert "| 6-6 | fp32 | 4 | 0.900 [0.880, 0.920] |" in text
    assert "| 6-6 | fp32 | 1 | noisy |" in text


def test_the_encoder_has_its_own_rate_where_it_is_trained(tmp_path: Path):
    options = Namespace(
        **{"teacher": str(tmp_path), "data": str(tmp_path), "share": 0.25, "method": "sft", "steps": 681},
        **{"learning_rate": 2e-3, "encoder_learning_rate": 5e-4, "train_rows": None, "score_rows": 10},
    )
    runs = {choice: make_run(options, "6-3", choice, 1) for choice in CHOICES}
    assert {choice for choice, run in runs.items() if run.training.freeze_encoder} == {ALL_FROZEN}
    assert {run.training.encoder_learning_rate for run in runs.values()} == {5e-4}
    assert {choice for choice, run in runs.items() if run.student.is_pruned} == {"activation", "random"}
    assert len({run.name for run in runs.values()}) == len(CHOICES)
