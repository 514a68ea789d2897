"""Losses against answers that float64 numpy worked out apart from this code (tests/kd_loss.json)."""

import json
from pathlib import Path

import pytest
import torch

from raydistill.training import losses
from raydistill.training.losses import cross_entropy, hidden_mse, kl_divergence, output_losses

GOLDEN = json.loads((Path(__file__).parent / "kd_loss.json").read_text())
STUDENT = torch.tensor(GOLDEN["student_logits"], dtype=torch.float64)
TEACHER = torch.tensor(GOLDEN["teacher_logits"], dtype=torch.float64)
LABELS = torch.tensor(GOLDEN["labels"])
REAL = LABELS != -100


def test_cross_entropy_is_the_worked_out_sum():
    assert float(cross_entropy(STUDENT[REAL], LABELS[REAL])) == pytest.approx(GOLDEN["ce_sum"], rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_kl_is_from_teacher_to_student_times_the_squared_temperature(temperature):
    found = float(kl_divergence(STUDENT[REAL], TEACHER[REAL], temperature))
    assert found == pytest.approx(GOLDEN["kl_sum"][str(temperature)], rel=1e-5)


def test_kl_of_a_distribution_with_itself_is_zero_and_with_another_is_not():
    assert float(kl_divergence(TEACHER[REAL], TEACHER[REAL], 2.0)) == pytest.approx(0, abs=1e-6)
    assert float(kl_divergence(STUDENT[REAL], TEACHER[REAL], 1.0)) != pytest.approx(
        float(kl_divergence(TEACHER[REAL], STUDENT[REAL], 1.0)), rel=1e-3
    )


def hidden_sum():
    pairs = zip(GOLDEN["student_hidden"], GOLDEN["teacher_hidden"], strict=True)
    return sum(hidden_mse(torch.tensor(s)[REAL], torch.tensor(t)[REAL]) for s, t in pairs)


def test_hidden_is_summed_over_layers_and_means_over_tokens_and_width():
    assert float(hidden_sum()) / GOLDEN["tokens"] == pytest.approx(GOLDEN["hidden"], rel=1e-5)


def test_the_total_is_the_worked_out_one():
    total = GOLDEN["total_mean"]
    tokens = GOLDEN["tokens"]
    value = (
        total["alpha_data"] * cross_entropy(STUDENT[REAL], LABELS[REAL]) / tokens
        + total["alpha_logits"] * kl_divergence(STUDENT[REAL], TEACHER[REAL], total["temperature"]) / tokens
        + total["alpha_hidden"] * hidden_sum() / tokens
    )
    assert float(value) == pytest.approx(total["value"], rel=1e-6)


def test_normalised_hidden_ignores_scale_and_shift():
    a, b = torch.randn(4, 8), torch.randn(4, 8)
    assert float(hidden_mse(a, a * 3 + 2, normalize=True)) == pytest.approx(0, abs=1e-5)
    assert float(hidden_mse(a * 5, b - 1, normalize=True)) == pytest.approx(
        float(hidden_mse(a, b, normalize=True)), rel=1e-4
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_chunks_change_neither_losses_nor_gradients(smoothing, monkeypatch):
    torch.manual_seed(0)
    width, vocabulary, tokens = 6, 11, 17
    ours, theirs = torch.nn.Linear(width, vocabulary), torch.nn.Linear(width, vocabulary)
    labels = torch.randint(0, vocabulary, (tokens,))
    base, teacher_hidden = torch.randn(tokens, width), torch.randn(tokens, width)

    def run():
        hidden = base.clone().requires_grad_()
        ours.zero_grad()
        ce, kl = output_losses(
            hidden, ours, labels, smoothing=smoothing, teacher_hidden=teacher_hidden, teacher_head=theirs,
            temperature=2.0, vocabulary=vocabulary,
        )  # fmt: skip
        (ce + 0.8 * kl).backward()
        return ce.detach(), kl.detach(), hidden.grad, ours.weight.grad.clone()

    whole = run()
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 5 * vocabulary)
    for a, b in zip(whole, run(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
