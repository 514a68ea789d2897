"""Losses against values computed by float64 numpy, independent of this code (tests/training/kd_loss.json)."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from raydistill.training import losses
from raydistill.training.losses import OutputTargets, attention_mse, cosine_distance, hidden_mse, output_loss

GOLDEN = json.loads((Path(__file__).parent / "kd_loss.json").read_text())
STUDENT = torch.tensor(GOLDEN["student_logits"], dtype=torch.float64)
TEACHER = torch.tensor(GOLDEN["teacher_logits"], dtype=torch.float64)
LABELS = torch.tensor(GOLDEN["labels"])
REAL = LABELS != -100


def identity_head(logits):
    """An LM head whose hidden states are the logits."""
    return logits * 1


def sums(student, teacher=None, labels=LABELS[REAL], **options):
    """The sums of CE and KL of given logits."""
    weight = 0.0 if teacher is None else 1.0
    targets = OutputTargets(labels, kl_weight=weight, teacher_hidden=teacher, teacher_lm_head=identity_head, **options)
    _, entropy, divergence = output_loss(student, identity_head, targets, student.shape[-1])
    return float(entropy), float(divergence)


def test_cross_entropy_equals_the_reference_sum():
    assert sums(STUDENT[REAL])[0] == pytest.approx(GOLDEN["ce_sum"], rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_kl_is_from_teacher_to_student_times_squared_temperature(temperature):
    divergence = sums(STUDENT[REAL], TEACHER[REAL], temperature=temperature)[1]
    assert divergence == pytest.approx(GOLDEN["kl_sum"][str(temperature)], rel=1e-5)


def test_kl_is_zero_for_equal_distributions_and_not_symmetric():
    assert sums(TEACHER[REAL], TEACHER[REAL], temperature=2.0)[1] == pytest.approx(0, abs=1e-6)
    forward, reverse = sums(STUDENT[REAL], TEACHER[REAL])[1], sums(TEACHER[REAL], STUDENT[REAL])[1]
    assert forward != pytest.approx(reverse, rel=1e-3)


def hidden_sum():
    """The hidden loss summed over layers and tokens."""
    pairs = zip(GOLDEN["student_hidden"], GOLDEN["teacher_hidden"], strict=True)
    return sum(hidden_mse(torch.tensor(s)[REAL], torch.tensor(t)[REAL]) for s, t in pairs)


def test_hidden_loss_is_summed_over_layers_and_averaged_over_width():
    assert float(hidden_sum()) / GOLDEN["tokens"] == pytest.approx(GOLDEN["hidden"], rel=1e-5)


def test_total_loss_equals_the_reference():
    total = GOLDEN["total_mean"]
    tokens = GOLDEN["tokens"]
    targets = OutputTargets(
        LABELS[REAL],
        ce_weight=total["alpha_data"] / tokens,
        kl_weight=total["alpha_logits"] / tokens,
        temperature=total["temperature"],
        teacher_hidden=TEACHER[REAL],
        teacher_lm_head=identity_head,
    )
    output, _, _ = output_loss(STUDENT[REAL], identity_head, targets, STUDENT.shape[-1])
    value = output + total["alpha_hidden"] * hidden_sum() / tokens
    assert float(value) == pytest.approx(total["value"], rel=1e-6)


def test_normalized_hidden_loss_ignores_scale_and_shift():
    a, b = torch.randn(4, 8), torch.randn(4, 8)
    assert float(hidden_mse(a, a * 3 + 2, normalize=True)) == pytest.approx(0, abs=1e-5)
    assert float(hidden_mse(a * 5, b - 1, normalize=True)) == pytest.approx(
        float(hidden_mse(a, b, normalize=True)), rel=1e-4
    )


WIDTH, VOCABULARY, TOKENS = 6, 11, 17


def problem(dtype=torch.float32):
    """Two heads, hidden states of both models, and labels."""
    torch.manual_seed(0)
    student_head, teacher_head = (torch.nn.Linear(WIDTH, VOCABULARY, dtype=dtype) for _ in range(2))
    hidden, teacher = (torch.randn(TOKENS, WIDTH, dtype=dtype) for _ in range(2))
    return student_head, teacher_head, hidden, teacher, torch.randint(0, VOCABULARY, (TOKENS,))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("logits", [0.0, 0.8])
@pytest.mark.parametrize("chunk", [2**25, 5 * VOCABULARY, 1])
def test_chunked_losses_and_gradients_equal_autograd_over_all_logits(smoothing, trained, logits, chunk, monkeypatch):
    """Compares with torch's cross_entropy and kl_div, for chunks of several sizes and a trained or frozen head."""
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(losses, "FLOAT32_CHUNK_ELEMENTS", {"cpu": 2 * VOCABULARY})
    student_head, teacher_head, base, teacher, labels = problem()
    student_head.requires_grad_(trained)
    parameters = list(student_head.parameters()) if trained else []

    def gradients(loss, hidden):
        student_head.zero_grad()
        (3 * loss).backward()
        return [hidden.grad, *(p.grad.clone() for p in parameters)]

    hidden = base.clone().requires_grad_()
    with torch.no_grad():
        q = F.log_softmax(teacher_head(teacher) / 2, -1)
    entropy = F.cross_entropy(student_head(hidden), labels, reduction="sum", label_smoothing=smoothing)
    kl = F.kl_div(F.log_softmax(student_head(hidden) / 2, -1), q, reduction="sum", log_target=True) * 4
    expected = gradients(0.5 * entropy + logits * kl, hidden)

    hidden = base.clone().requires_grad_()
    targets = OutputTargets(labels, 0.5, smoothing, logits, 2.0, teacher, lambda h: teacher_head(h).detach())
    loss, chunked_entropy, chunked_kl = output_loss(hidden, student_head, targets, VOCABULARY, parameters)
    assert float(loss.detach()) == pytest.approx(float((0.5 * entropy + logits * kl).detach()), rel=1e-5)
    assert float(chunked_entropy) == pytest.approx(float(entropy.detach()), rel=1e-5)
    assert float(chunked_kl) == pytest.approx(float(kl.detach()) if logits else 0.0, rel=1e-5)
    assert not chunked_entropy.requires_grad
    for a, b in zip(gradients(loss, hidden), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("logits", [0.0, 0.8])
@pytest.mark.parametrize("chunk", [2**25, 5 * VOCABULARY, 1])
def test_gradients_of_a_trained_head_under_autocast_equal_autograd_within_bf16(smoothing, logits, chunk, monkeypatch):
    """Observed: gradients differ by up to 0.0042 of their norm, as much as either differs from float32."""
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(losses, "FLOAT32_CHUNK_ELEMENTS", {"cpu": 2 * VOCABULARY})
    student_head, teacher_head, base, teacher, labels = problem()
    parameters = list(student_head.parameters())

    def gradients(loss, hidden):
        student_head.zero_grad()
        (3 * loss).backward()
        return [hidden.grad, *(p.grad.clone() for p in parameters)]

    hidden = base.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logits_of = student_head(hidden).float()
        q = F.log_softmax(teacher_head(teacher).detach().float() / 2, -1)
        entropy = F.cross_entropy(logits_of, labels, reduction="sum", label_smoothing=smoothing)
        kl = F.kl_div(F.log_softmax(logits_of / 2, -1), q, reduction="sum", log_target=True) * 4
    expected = gradients(0.5 * entropy + logits * kl, hidden)

    hidden = base.clone().requires_grad_()
    targets = OutputTargets(labels, 0.5, smoothing, logits, 2.0, teacher, lambda h: teacher_head(h).detach())
    with torch.autocast("cpu", torch.bfloat16):
        assert student_head(hidden).dtype == torch.bfloat16
        loss, chunked_entropy, chunked_kl = output_loss(hidden, student_head, targets, VOCABULARY, parameters)
    assert float(chunked_entropy) == pytest.approx(float(entropy.detach()), rel=1e-6)
    assert float(chunked_kl) == pytest.approx(float(kl.detach()) if logits else 0.0, rel=1e-6)
    for a, b in zip(gradients(loss, hidden), expected, strict=True):
        assert a.dtype == torch.float32
        assert float((a - b).norm() / b.norm()) < 0.008


def test_gradients_match_finite_differences():
    student_head, teacher_head, base, teacher, labels = problem(torch.float64)
    targets = OutputTargets(labels, 0.5, 0.1, 0.8, 2.0, teacher, lambda h: teacher_head(h).detach())
    hidden = base.clone().requires_grad_()
    output_loss(hidden, student_head, targets, VOCABULARY, list(student_head.parameters()))[0].backward()
    step = 1e-3  # the sums are float32
    for row, column in ((0, 0), (3, 4), (16, 5)):
        moved = torch.zeros_like(base)
        moved[row, column] = step
        up, down = (float(output_loss(base + s * moved, student_head, targets, VOCABULARY)[0]) for s in (1, -1))
        assert float(hidden.grad[row, column]) == pytest.approx((up - down) / (2 * step), rel=2e-2, abs=2e-3)


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor of each dtype that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements[tensor.dtype] = max(self.elements.get(tensor.dtype, 0), tensor.numel())
        return out


@pytest.mark.parametrize("trained", [True, False])
def test_float32_logits_of_all_tokens_never_exist(trained, monkeypatch):
    width, vocabulary, tokens = 8, 1000, 300
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 20 * vocabulary)
    torch.manual_seed(0)
    student_head, teacher_head = (torch.nn.Linear(width, vocabulary, bias=False) for _ in range(2))
    student_head.requires_grad_(trained)
    hidden = torch.randn(tokens, width, requires_grad=True)
    targets = OutputTargets(
        torch.randint(0, vocabulary, (tokens,)),
        1.0,
        0.1,
        1.0,
        2.0,
        torch.randn(tokens, width),
        lambda h: teacher_head(h).detach(),
    )
    with LargestTensor() as largest:
        loss, _, _ = output_loss(
            hidden, student_head, targets, vocabulary, list(student_head.parameters()) if trained else []
        )
        loss.backward()
    assert 15 * vocabulary < largest.elements[torch.float32] <= 20 * vocabulary
    with LargestTensor() as reference:
        F.cross_entropy(student_head(hidden), targets.labels).backward()
    assert reference.elements[torch.float32] == tokens * vocabulary


def test_kl_weight_without_teacher_states_is_rejected():
    with pytest.raises(ValueError, match="hidden states"):
        output_loss(torch.zeros(1, 2), identity_head, OutputTargets(torch.zeros(1, dtype=torch.long), kl_weight=1.0), 2)


def test_cosine_distance_is_summed_over_tokens():
    a = torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]])
    b = torch.tensor([[4.0, 3.0], [0.0, 5.0], [-1.0, 0.0]])
    # cosines: (12 + 12) / 25, 0 and -1
    assert float(cosine_distance(a, b)) == pytest.approx(1 - 24 / 25 + 1 + 2)
    assert float(cosine_distance(a, 7 * a)) == pytest.approx(0, abs=1e-6)


def test_attention_mse_averages_heads_and_keys_and_sums_tokens():
    # one row, two heads, two tokens, two keys
    student = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0], [0.2, 0.8]]]])
    teacher = torch.tensor([[[[1.0, 0.0], [0.1, 0.9]], [[1.0, 0.0], [0.2, 0.8]]]])
    token_mask, num_keys = torch.tensor([[True, True]]), torch.tensor([2])
    # only the second token of the first head differs: (0.4 ** 2 + 0.4 ** 2) / 2 keys / 2 heads
    assert float(attention_mse(student, teacher, token_mask, num_keys)) == pytest.approx(0.08)
    assert float(attention_mse(student, teacher, torch.tensor([[True, False]]), num_keys)) == 0
