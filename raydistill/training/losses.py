"""The losses. Each is a sum over tokens, already times its weight, so that micro-batches and workers simply add up.

`L = alpha_data * CE + alpha_logits * KL + alpha_hidden * hidden` (Shleifer and Rush 2020, equations 1 to 5), and where
asked for `+ alpha_attention * attention + alpha_cosine * cosine` (their section 6.3).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

LMHead = Callable[[Tensor], Tensor]
# Elements of one chunk of logits, as the head gives them: 2**25 are 667 tokens of BART's vocabulary, 64 MB in bf16.
CHUNK_ELEMENTS = 2**25
# Elements of a chunk that are worked out in float32 at a time. On a CPU few, so that they stay in its cache.
FLOAT32_CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**25}


@dataclass(frozen=True)
class OutputTargets:
    """What the output layer is taught at each token: its label, and where there is a teacher, its distribution.

    `labels` [tokens]. The loss is `data` * CE + `logits` * KL(teacher || student) * temperature ** 2, both summed over
    tokens. The square keeps the gradient's scale when the temperature changes (Hinton et al. 2015, section 2). The
    teacher's logits are `teacher_head` of its last hidden states `teacher` [tokens, width].
    """

    labels: Tensor
    ce_weight: float = 1.0
    label_smoothing: float = 0.0
    kl_weight: float = 0.0
    temperature: float = 1.0
    teacher_hidden: Tensor | None = None
    teacher_lm_head: LMHead | None = None


def output_loss(
    hidden: Tensor,
    lm_head: LMHead,
    targets: OutputTargets,
    vocab_size: int,
    lm_head_parameters: Sequence[Parameter] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """The output layer's loss from last hidden states [tokens, width]; also the sums of CE and of KL, without gradient.

    `lm_head_parameters`: those of the head that are trained. Logits are made chunk by chunk, and with each chunk its
    gradient: neither model ever has the logits of a whole batch, and none are made twice.
    """
    if targets.kl_weight and targets.teacher_hidden is None:
        raise ValueError("a weight for the teacher's logits needs the teacher's hidden states")
    return _OutputLoss.apply(hidden, (lm_head, targets, vocab_size), *lm_head_parameters)


def hidden_mse(student: Tensor, teacher: Tensor, normalize: bool = False) -> Tensor:
    """Sum over tokens of the squared error's mean over the width; both [tokens, width].

    `normalize` layer-norms both sides first (without gain or bias).
    """
    student, teacher = student.float(), teacher.float()
    if normalize:
        student = F.layer_norm(student, student.shape[-1:])
        teacher = F.layer_norm(teacher, teacher.shape[-1:])
    return (student - teacher).pow(2).mean(dim=-1).sum()


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over tokens of 1 - the cosine of the angle between both sides; both [tokens, width] (Sanh et al. 2019)."""
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).sum()


def attention_mse(student: Tensor, teacher: Tensor, token_mask: Tensor, num_keys: Tensor) -> Tensor:
    """Sum over real tokens of the squared error of attention weights, a mean over heads and real keys.

    Both [rows, heads, tokens, keys]; `token_mask` [rows, tokens], true for real tokens; `num_keys` [rows], how many
    keys of a row
    are real. Padding has no weight on either side, so it adds nothing (Jiao et al. 2019, on weights and not on scores).
    """
    squared = (student.float() - teacher.float()).pow(2).sum(dim=-1).mean(dim=1)
    return (squared / num_keys[:, None])[token_mask].sum()


class _OutputLoss(torch.autograd.Function):
    """The gradient is worked out on the way forward, while a chunk's logits are there; backward only scales it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, options: tuple[LMHead, OutputTargets, int], *lm_head_parameters: Parameter
    ) -> tuple[Tensor, Tensor, Tensor]:
        head, targets, vocabulary = options
        needed = [hidden, *lm_head_parameters] if ctx.needs_input_grad[0] or any(ctx.needs_input_grad[2:]) else []
        gradients = [torch.zeros_like(tensor) for tensor in needed]
        sums = hidden.new_zeros(2, dtype=torch.float32)
        size = max(1, CHUNK_ELEMENTS // vocabulary)
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            theirs = None
            if targets.kl_weight and targets.teacher_hidden is not None and targets.teacher_lm_head is not None:
                theirs = targets.teacher_lm_head(targets.teacher_hidden[part])
            with torch.set_grad_enabled(bool(needed)):
                states = hidden[part].detach().requires_grad_(bool(needed))
                logits = head(states)
            # From here on the logits' own memory holds the loss's slope at them: the head does not read them again.
            slopes = logits.detach()
            sums += _chunk_losses(slopes, theirs, targets.labels[part], targets, bool(needed))
            if needed:
                found = torch.autograd.grad(logits, [states, *lm_head_parameters], slopes)
                gradients[0][part] = found[0]
                for total, gradient in zip(gradients[1:], found[1:], strict=True):
                    total += gradient
        ctx.save_for_backward(*gradients)
        ctx.parameters = len(lm_head_parameters)
        cross_entropy, divergence = sums.unbind()
        ctx.mark_non_differentiable(cross_entropy, divergence)
        return targets.ce_weight * cross_entropy + targets.kl_weight * divergence, cross_entropy, divergence

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        hidden, *parameters = [gradient * grad_outputs[0] for gradient in ctx.saved_tensors]
        return hidden, None, *parameters


def _chunk_losses(
    logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, targets: OutputTargets, needs_grad: bool
) -> Tensor:
    """Sums of CE and KL of a chunk [tokens, vocabulary]; with `needs_grad`, `logits` become the loss's derivative.

    dCE/dz = softmax(z) - target, where the target holds (1 - smoothing) at the label and smoothing / V everywhere;
    d(T**2 KL)/dz = T (softmax(z / T) - softmax(teacher / T)).
    """
    vocabulary = logits.shape[-1]
    rows = max(1, FLOAT32_CHUNK_ELEMENTS.get(logits.device.type, 2**25) // vocabulary)
    smoothing, temperature = targets.label_smoothing, targets.temperature
    sums = logits.new_zeros(2, dtype=torch.float32)
    for start in range(0, len(labels), rows):
        part = slice(start, start + rows)
        label = labels[part, None]
        log_p = torch.log_softmax(logits[part], dim=-1, dtype=torch.float32)
        sums[0] -= (1 - smoothing) * log_p.gather(-1, label).sum()
        if smoothing:
            sums[0] -= smoothing / vocabulary * log_p.sum()
        warm = warm_teacher = None
        if teacher_logits is not None:
            warm = _log_softmax(logits[part], temperature)
            log_q = _log_softmax(teacher_logits[part], temperature)
            warm_teacher = log_q.exp()
            sums[1] += temperature**2 * (log_q.sub_(warm)).mul_(warm_teacher).sum()
        if needs_grad:
            slope = log_p.exp_().mul_(targets.ce_weight)
            if smoothing:
                slope -= targets.ce_weight * smoothing / vocabulary
            slope.scatter_add_(
                -1, label, torch.full_like(label, -targets.ce_weight * (1 - smoothing), dtype=torch.float32)
            )
            if warm is not None and warm_teacher is not None:
                slope.add_(warm.exp_().sub_(warm_teacher), alpha=targets.kl_weight * temperature)
            logits[part] = slope
    return sums


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits.to(torch.float32, copy=True).div_(temperature), dim=-1)
