"""The loss terms of distillation, each summed over tokens.

The loss of a batch is (Shleifer and Rush 2020, "Pre-trained Summarization Distillation", equations 1 to 5)

    L = alpha_data * CE + alpha_logits * KL + alpha_hidden * hidden

and, where the run sets their weights, `+ alpha_attention * attention + alpha_cosine * cosine` (section 6.3).
T is the number of target tokens, l a layer of the student, phi(l) the teacher layer that supervises l. CE and KL are in
nats.

    CE        = -(1/T) sum_t log p_s(y_t | y_<t, x)                  cross-entropy with the label y_t
    KL        = tau^2 (1/T) sum_t KL(teacher_t || student_t)          both distributions at temperature tau
    hidden    = (1/T) sum_t sum_l mean_width (student[l, t] - teacher[phi(l), t])^2
    attention = (1/T) sum_t sum_l mean_heads,keys (student - teacher)^2  self-attention plus cross-attention
    cosine    = (1/T) sum_t (1 - cos(student[last, t], teacher[last, t]))

The functions of this module return the sums over tokens, not the means. The caller divides by the number of tokens of
the whole global batch, so that gradients of micro-batches and workers add up to the gradient of the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

LMHead = Callable[[Tensor], Tensor]
# Elements of a chunk of logits, in the LM head's dtype: 2**25 are 667 tokens of BART's vocabulary, 64 MB in bf16.
CHUNK_ELEMENTS = 2**25
# Elements of a chunk that are converted to float32 at a time. Few on a CPU, so that they stay in its cache.
FLOAT32_CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**25}


@dataclass(frozen=True)
class OutputTargets:
    """The targets of the output layer at each of T tokens: its label and, with a teacher, the teacher's distribution.

    The loss is `ce_weight * CE + kl_weight * temperature**2 * KL(teacher || student)`, both summed over tokens. The
    factor `temperature**2` keeps the scale of the gradient when the temperature changes (Hinton et al. 2015,
    "Distilling the Knowledge in a Neural Network", section 2).

    Attributes:
        labels: Token ids [T].
        ce_weight: Weight of the cross-entropy.
        label_smoothing: Probability mass spread evenly over the vocabulary (Szegedy et al. 2016, section 7).
        kl_weight: Weight of the KL divergence; 0 leaves the teacher out.
        temperature: Divisor of both models' logits in the KL divergence.
        teacher_hidden: The teacher's last hidden states [T, width].
        teacher_lm_head: Maps `teacher_hidden` to the teacher's logits [T, vocabulary].
    """

    labels: Tensor
    ce_weight: float = 1.0
    label_smoothing: float = 0.0
    kl_weight: float = 0.0
    temperature: float = 1.0
    teacher_hidden: Tensor | None = None
    teacher_lm_head: LMHead | None = None

    def teacher_logits(self, tokens: slice) -> Tensor | None:
        """The teacher's logits [tokens, vocabulary] of a slice of tokens; None if the KL divergence has no weight."""
        if not self.kl_weight or self.teacher_hidden is None or self.teacher_lm_head is None:
            return None
        return self.teacher_lm_head(self.teacher_hidden[tokens])


def output_loss(
    hidden: Tensor,
    lm_head: LMHead,
    targets: OutputTargets,
    vocab_size: int,
    lm_head_parameters: Sequence[Parameter] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of the output layer from the student's last hidden states.

    The logits and their gradient are computed chunk by chunk in the forward pass: the logits of a whole batch never
    exist, neither for the student nor for the teacher, and no logits are computed twice.

    Args:
        hidden: Last hidden states of the student [T, width].
        lm_head: Maps hidden states to logits [T, vocabulary].
        targets: Labels, weights and the teacher's states.
        vocab_size: V, the number of logits of a token.
        lm_head_parameters: The trained parameters of the LM head, which receive gradients.

    Returns:
        The weighted loss, the sum of the cross-entropy and the sum of `temperature**2 * KL`; scalars in nats. Only the
        loss has a gradient.

    Raises:
        ValueError: The KL divergence has a weight but the teacher's hidden states are missing.
    """
    if targets.kl_weight and targets.teacher_hidden is None:
        raise ValueError("a weight for the teacher's logits needs the teacher's hidden states")
    return _OutputLoss.apply(hidden, (lm_head, targets, vocab_size), *lm_head_parameters)


def hidden_mse(student: Tensor, teacher: Tensor, normalize: bool = False) -> Tensor:
    """Squared error of hidden states: mean over the width, sum over tokens.

    The hidden loss of Shleifer and Rush 2020. With `normalize`, both sides are layer-normalised first, without gain or
    bias.

    Args:
        student: Hidden states of one student layer [T, width].
        teacher: Hidden states of the teacher layer that supervises it [T, width].
        normalize: Whether to normalise both sides over the width.

    Returns:
        A scalar in float32.
    """
    student, teacher = student.float(), teacher.float()
    if normalize:
        student = F.layer_norm(student, student.shape[-1:])
        teacher = F.layer_norm(teacher, teacher.shape[-1:])
    return (student - teacher).pow(2).mean(dim=-1).sum()


def layerwise_hidden_mse(
    student_layers: Sequence[Tensor], teacher_layers: Sequence[Tensor], normalize: bool = False
) -> Tensor:
    """`hidden_mse` summed over pairs of a student layer and the teacher layer that supervises it.

    Raises:
        ValueError: The two sequences differ in length.
    """
    pairs = zip(student_layers, teacher_layers, strict=True)
    return torch.stack([hidden_mse(student, teacher, normalize) for student, teacher in pairs]).sum()


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine similarity of hidden states, summed over tokens.

    Sanh et al. 2019, "DistilBERT". Both arguments are [T, width]; returns a scalar between 0 and 2 T.
    """
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).sum()


def attention_mse(student: Tensor, teacher: Tensor, token_mask: Tensor, num_keys: Tensor) -> Tensor:
    """Squared error of attention weights: mean over heads and keys, sum over tokens.

    Jiao et al. 2019, "TinyBERT", equation 7, on attention weights (after the softmax) instead of scores. Padded keys
    have weight zero on both sides and add nothing.

    Args:
        student: Attention weights of one student layer [rows, heads, tokens, keys].
        teacher: Attention weights of the teacher layer that supervises it, of equal shape.
        token_mask: True for real tokens [rows, tokens].
        num_keys: Number of real keys of each row [rows].

    Returns:
        A scalar in float32.
    """
    squared = (student.float() - teacher.float()).pow(2).sum(dim=-1).mean(dim=1)
    return (squared / num_keys[:, None])[token_mask].sum()


class _OutputLoss(torch.autograd.Function):
    """Computes the gradient in the forward pass, while the logits of a chunk exist; the backward pass scales it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, options: tuple[LMHead, OutputTargets, int], *lm_head_parameters: Parameter
    ) -> tuple[Tensor, Tensor, Tensor]:
        lm_head, targets, vocab_size = options
        needs_grad = ctx.needs_input_grad[0] or any(ctx.needs_input_grad[2:])
        differentiated = [hidden, *lm_head_parameters] if needs_grad else []
        gradients = [torch.zeros_like(tensor) for tensor in differentiated]
        sums = hidden.new_zeros(2, dtype=torch.float32)
        chunk_size = max(1, CHUNK_ELEMENTS // vocab_size)
        for start in range(0, len(hidden), chunk_size):
            chunk = slice(start, start + chunk_size)
            teacher_logits = targets.teacher_logits(chunk)
            with torch.set_grad_enabled(needs_grad):
                states = hidden[chunk].detach().requires_grad_(needs_grad)
                logits = lm_head(states)
            # The gradient with respect to the logits overwrites them: the LM head does not read the logits again.
            grad_logits = logits.detach()
            sums += _chunk_losses(grad_logits, teacher_logits, targets.labels[chunk], targets, needs_grad)
            if needs_grad:
                chunk_gradients = torch.autograd.grad(logits, [states, *lm_head_parameters], grad_logits)
                gradients[0][chunk] = chunk_gradients[0]
                for total, gradient in zip(gradients[1:], chunk_gradients[1:], strict=True):
                    total += gradient
        ctx.save_for_backward(*gradients)
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
    """Sums of CE and tau^2 KL over a chunk of logits [tokens, vocabulary]; a float32 tensor [2].

    With `needs_grad`, the loss's gradient with respect to the logits z overwrites `logits`:
    dCE/dz = softmax(z) - target, where target is 1 - smoothing at the label, plus smoothing / V everywhere;
    d(tau^2 KL)/dz = tau (softmax(z / tau) - softmax(z_teacher / tau)).
    """
    vocab_size = logits.shape[-1]
    num_rows = max(1, FLOAT32_CHUNK_ELEMENTS.get(logits.device.type, 2**25) // vocab_size)
    smoothing, temperature = targets.label_smoothing, targets.temperature
    sums = logits.new_zeros(2, dtype=torch.float32)
    for start in range(0, len(labels), num_rows):
        rows = slice(start, start + num_rows)
        label = labels[rows, None]
        log_p = torch.log_softmax(logits[rows], dim=-1, dtype=torch.float32)
        sums[0] -= (1 - smoothing) * log_p.gather(-1, label).sum()
        if smoothing:
            sums[0] -= smoothing / vocab_size * log_p.sum()
        # At the temperature: the student's log-probabilities and the teacher's probabilities.
        log_p_t = teacher_p_t = None
        if teacher_logits is not None:
            log_p_t = _log_softmax(logits[rows], temperature)
            teacher_log_p_t = _log_softmax(teacher_logits[rows], temperature)
            teacher_p_t = teacher_log_p_t.exp()
            sums[1] += temperature**2 * (teacher_log_p_t.sub_(log_p_t)).mul_(teacher_p_t).sum()
        if needs_grad:
            grad = log_p.exp_().mul_(targets.ce_weight)
            if smoothing:
                grad -= targets.ce_weight * smoothing / vocab_size
            grad.scatter_add_(
                -1, label, torch.full_like(label, -targets.ce_weight * (1 - smoothing), dtype=torch.float32)
            )
            if log_p_t is not None and teacher_p_t is not None:
                grad.add_(log_p_t.exp_().sub_(teacher_p_t), alpha=targets.kl_weight * temperature)
            logits[rows] = grad
    return sums


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities in float32 at a temperature; a new tensor."""
    return torch.log_softmax(logits.to(torch.float32, copy=True).div_(temperature), dim=-1)
