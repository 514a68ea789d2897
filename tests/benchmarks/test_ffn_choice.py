"""The table of benchmarks.ffn_choice."""

from benchmarks.ffn_choice import as_markdown


def row(choice: str, seed: int, bleu: float) -> dict:
    losses = {"untrained_loss": 4.0 - seed, "val_loss": 2.0, "params_m": 3.07}
    return {"size": "6-3", "choice": choice, "seed": seed, "bleu": bleu, **losses}


def test_means_over_seeds_and_differences_of_equal_seeds():
    bleu = {"activation": (35.0, 34.0), "random": (34.0, 34.5), "all": (36.0, 36.0)}
    rows = [row(choice, seed, values[seed]) for seed in (0, 1) for choice, values in bleu.items()]
    text = as_markdown(rows, 0.25)
    assert "| 6-3 | activation | 3.07 | 3.500 | 2.000 | 34.50 (35.00, 34.00) | 2 |" in text
    assert "BLEU, activation minus random: +0.25 on average over 2 seeds (+1.00, -0.50)" in text
