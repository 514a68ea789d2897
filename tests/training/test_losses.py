"""Losses against answers that float64 numpy worked out apart from this code (tests/training/kd_loss.json)."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from raydistill.training import losses
from raydistill.training.losses import OutputTargets, hidden_mse, output_loss

GOLDEN = json.loads((Path(__file__).parent / "kd_loss.json").read_text())
STUDENT = torch.tensor(GOLDEN["student_logits"], dtype=torch.float64)
TEACHER = torch.tensor(GOLDEN["teacher_logits"], dtype=torch.float64)
LABELS = torch.tensor(GOLDEN["labels"])
REAL = LABELS != -100


def as_they_are(logits):
    """A head whose hidden states are the logits themselves."""
    return logits * 1


def sums(student, teacher=None, labels=LABELS[REAL], **how):
    """The sums of CE and KL of given logits."""
    weight = 0.0 if teacher is None else 1.0
    targets = OutputTargets(labels, kl_weight=weight, teacher_hidden=teacher, teacher_lm_head=as_they_are, **how)
    _, entropy, divergence = output_loss(student, as_they_are, targets, student.shape[-1])
    return float(entropy), float(divergence)


def test_cross_entropy_is_the_worked_out_sum():
    assert sums(STUDENT[REAL])[0] == pytest.approx(GOLDEN["ce_sum"], rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_kl_is_from_teacher_to_student_times_the_squared_temperature(temperature):
    found = sums(STUDENT[REAL], TEACHER[REAL], temperature=temperature)[1]
    assert found == pytest.approx(GOLDEN["kl_sum"][str(temperature)], rel=1e-5)


def test_kl_of_a_distribution_with_itself_is_zero_and_with_another_is_not():
    assert sums(TEACHER[REAL], TEACHER[REAL], temperature=2.0)[1] == pytest.approx(0, abs=1e-6)
    there, back = sums(STUDENT[REAL], TEACHER[REAL])[1], sums(TEACHER[REAL], STUDENT[REAL])[1]
    assert there != pytest.approx(back, rel=1e-3)


def hidden_sum():
    pairs = zip(GOLDEN["student_hidden"], GOLDEN["teacher_hidden"], strict=True)
    return sum(hidden_mse(torch.tensor(s)[REAL], torch.tensor(t)[REAL]) for s, t in pairs)


def test_hidden_is_summed_over_layers_and_means_over_tokens_and_width():
    assert float(hidden_sum()) / GOLDEN["tokens"] == pytest.approx(GOLDEN["hidden"], rel=1e-5)


def test_the_total_is_the_worked_out_one():
    total = GOLDEN["total_mean"]
    tokens = GOLDEN["tokens"]
    targets = OutputTargets(
        LABELS[REAL],
        ce_weight=total["alpha_data"] / tokens,
        kl_weight=total["alpha_logits"] / tokens,
        temperature=total["temperature"],
        teacher_hidden=TEACHER[REAL],
        teacher_lm_head=as_they_are,
    )
    output, _, _ = output_loss(STUDENT[REAL], as_they_are, targets, STUDENT.shape[-1])
    value = output + total["alpha_hidden"] * hidden_sum() / tokens
    assert float(value) == pytest.approx(total["value"], rel=1e-6)


def test_normalised_hidden_ignores_scale_and_shift():
    a, b = torch.randn(4, 8), torch.randn(4, 8)
    assert float(hidden_mse(a, a * 3 + 2, normalize=True)) == pytest.approx(0, abs=1e-5)
    assert float(hidden_mse(a * 5, b - 1, normalize=True)) == pytest.approx(
        float(hidden_mse(a, b, normalize=True)), rel=1e-4
    )


WIDTH, VOCABULARY, TOKENS = 6, 11, 17


def problem(dtype=torch.float32):
    """Two heads, hidden states of both models, and labels."""
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Linear(WIDTH, VOCABULARY, dtype=dtype) for _ in range(2))
    hidden, teacher = (torch.randn(TOKENS, WIDTH, dtype=dtype) for _ in range(2))
    return ours, theirs, hidden, teacher, torch.randint(0, VOCABULARY, (TOKENS,))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("logits", [0.0, 0.8])
@pytest.mark.parametrize("chunk", [2**25, 5 * VOCABULARY, 1])
def test_losses_and_gradients_are_autograds_own_over_whole_logits(smoothing, trained, logits, chunk, monkeypatch):
    """Against torch's cross_entropy and kl_div with its own backward, in chunks of any size, head trained or frozen."""
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(losses, "FLOAT32_CHUNK_ELEMENTS", {"cpu": 2 * VOCABULARY})
    ours, theirs, base, teacher, labels = problem()
    ours.requires_grad_(trained)
    parameters = list(ours.parameters()) if trained else []

    def gradients(loss, hidden):
        ours.zero_grad()
        (3 * loss).backward()
        return [hidden.grad, *(p.grad.clone() for p in parameters)]

    hidden = base.clone().requires_grad_()
    with torch.no_grad():
        q = F.log_softmax(theirs(teacher) / 2, -1)
    entropy = F.cross_entropy(ours(hidden), labels, reduction="sum", label_smoothing=smoothing)
    kl = F.kl_div(F.log_softmax(ours(hidden) / 2, -1), q, reduction="sum", log_target=True) * 4
    expected = gradients(0.5 * entropy + logits * kl, hidden)

    hidden = base.clone().requires_grad_()
    targets = OutputTargets(labels, 0.5, smoothing, logits, 2.0, teacher, lambda h: theirs(h).detach())
    loss, found_entropy, found_kl = output_loss(hidden, ours, targets, VOCABULARY, parameters)
    assert float(loss.detach()) == pytest.approx(float((0.5 * entropy + logits * kl).detach()), rel=1e-5)
    assert float(found_entropy) == pytest.approx(float(entropy.detach()), rel=1e-5)
    assert float(found_kl) == pytest.approx(float(kl.detach()) if logits else 0.0, rel=1e-5)
    assert not found_entropy.requires_grad
    for a, b in zip(gradients(loss, hidden), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("logits", [0.0, 0.8])
@pytest.mark.parametrize("chunk", [2**25, 5 * VOCABULARY, 1])
def test_a_trained_heads_gradients_under_autocast_are_autograds_own_within_bf16(smoothing, logits, chunk, monkeypatch):
    """Seen: gradients up to 0.0042 of their norm apart, as far as either is from float32's; the sums are the same."""
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(losses, "FLOAT32_CHUNK_ELEMENTS", {"cpu": 2 * VOCABULARY})
    ours, theirs, base, teacher, labels = problem()
    parameters = list(ours.parameters())

    def gradients(loss, hidden):
        ours.zero_grad()
        (3 * loss).backward()
        return [hidden.grad, *(p.grad.clone() for p in parameters)]

    hidden = base.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logits_of = ours(hidden).float()
        q = F.log_softmax(theirs(teacher).detach().float() / 2, -1)
        entropy = F.cross_entropy(logits_of, labels, reduction="sum", label_smoothing=smoothing)
        kl = F.kl_div(F.log_softmax(logits_of / 2, -1), q, reduction="sum", log_target=True) * 4
    expected = gradients(0.5 * entropy + logits * kl, hidden)

    hidden = base.clone().requires_grad_()
    targets = OutputTargets(labels, 0.5, smoothing, logits, 2.0, teacher, lambda h: theirs(h).detach())
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(hidden).dtype == torch.bfloat16
        loss, found_entropy, found_kl = output_loss(hidden, ours, targets, VOCABULARY, parameters)
    assert float(found_entropy) == pytest.approx(float(entropy.detach()), rel=1e-6)
    assert float(found_kl) == pytest.approx(float(kl.detach()) if logits else 0.0, rel=1e-6)
    for a, b in zip(gradients(loss, hidden), expected, strict=True):
        assert a.dtype == torch.float32
        assert float((a - b).norm() / b.norm()) < 0.008


def test_gradients_hold_against_finite_differences():
    ours, theirs, base, teacher, labels = problem(torch.float64)
    targets = OutputTargets(labels, 0.5, 0.1, 0.8, 2.0, teacher, lambda h: theirs(h).detach())
    hidden = base.clone().requires_grad_()
    output_loss(hidden, ours, targets, VOCABULARY, list(ours.parameters()))[0].backward()
    step = 1e-3  # the sums are float32
    for row, column in ((0, 0), (3, 4), (16, 5)):
        moved = torch.zeros_like(base)
        moved[row, column] = step
        up, down = (float(output_loss(base + s * moved, ours, targets, VOCABULARY)[0]) for s in (1, -1))
        assert float(hidden.grad[row, column]) == pytest.approx((up - down) / (2 * step), rel=2e-2, abs=2e-3)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor of each dtype that any operation gives."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.found[tensor.dtype] = max(self.found.get(tensor.dtype, 0), tensor.numel())
        return out


@pytest.mark.parametrize("trained", [True, False])
def test_no_float32_logits_of_all_tokens_exist_forwards_or_backwards(trained, monkeypatch):
    width, vocabulary, tokens = 8, 1000, 300
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 20 * vocabulary)
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Linear(width, vocabulary, bias=False) for _ in range(2))
    ours.requires_grad_(trained)
    hidden = torch.randn(tokens, width, requires_grad=True)
    targets = OutputTargets(
        torch.randint(0, vocabulary, (tokens,)),
        1.0,
        0.1,
        1.0,
        2.0,
        torch.randn(tokens, width),
        lambda h: theirs(h).detach(),
    )
    with Largest() as seen:
        loss, _, _ = output_loss(hidden, ours, targets, vocabulary, list(ours.parameters()) if trained else [])
        loss.backward()
    assert 15 * vocabulary < seen.found[torch.float32] <= 20 * vocabulary
    with Largest() as plain:
        F.cross_entropy(ours(hidden), targets.labels).backward()
    assert plain.found[torch.float32] == tokens * vocabulary


def test_a_weight_for_logits_without_a_teacher_is_refused():
    with pytest.raises(ValueError, match="hidden states"):
        output_loss(torch.zeros(1, 2), as_they_are, OutputTargets(torch.zeros(1, dtype=torch.long), kl_weight=1.0), 2)
