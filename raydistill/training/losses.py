"""The losses. Each returns a sum; the caller divides by the weight of the global batch.

`L = alpha_data * CE + alpha_logits * KL + alpha_hidden * hidden` (Shleifer and Rush 2020, equations 1 to 5).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]
# Elements of one chunk of logits: 2**26 float32 are 256 MB; vocabulary size decides how many tokens that is.
CHUNK_ELEMENTS = 2**26


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Sum over tokens of the cross-entropy; logits [tokens, vocabulary], labels [tokens]."""
    return F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing)


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Sum over tokens of KL(teacher || student) at a temperature, times its square; both [tokens, vocabulary].

    The square keeps the gradient's scale when the temperature changes (Hinton et al. 2015, section 2).
    """
    ours = F.log_softmax(student.float() / temperature, dim=-1)
    theirs = F.log_softmax(teacher.float() / temperature, dim=-1)
    return F.kl_div(ours, theirs, reduction="sum", log_target=True) * temperature**2


def hidden_mse(student: Tensor, teacher: Tensor, normalize: bool = False) -> Tensor:
    """Sum over tokens of the squared error's mean over the width; both [tokens, width].

    `normalize` layer-norms both sides first (without gain or bias).
    """
    student, teacher = student.float(), teacher.float()
    if normalize:
        student = F.layer_norm(student, student.shape[-1:])
        teacher = F.layer_norm(teacher, teacher.shape[-1:])
    return (student - teacher).pow(2).mean(dim=-1).sum()


def output_losses(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    smoothing: float = 0.0,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
    temperature: float = 1.0,
    vocabulary: int,
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy and, with a teacher, KL, summed over tokens, from last hidden states [tokens, width].

    Logits are made chunk by chunk, and again in the backward pass, so that no [tokens, vocabulary] tensor of a
    whole batch exists for either model.
    """

    def chunk_losses(h: Tensor, y: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = head(h)
        ce = cross_entropy(logits, y, smoothing)
        if t is None or teacher_head is None:
            return ce, ce.new_zeros(())
        with torch.no_grad():
            theirs = teacher_head(t)
        return ce, kl_divergence(logits, theirs, temperature)

    size = max(1, CHUNK_ELEMENTS // vocabulary)
    if len(labels) <= size:
        ce, kl = chunk_losses(hidden, labels, teacher_hidden)
        return ce, None if teacher_hidden is None else kl
    ce_total, kl_total = hidden.new_zeros((), dtype=torch.float32), hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(labels), size):
        part = slice(start, start + size)
        theirs = None if teacher_hidden is None else teacher_hidden[part]
        ce, kl = checkpoint(chunk_losses, hidden[part], labels[part], theirs, use_reentrant=False)
        ce_total, kl_total = ce_total + ce, kl_total + kl
    return ce_total, None if teacher_hidden is None else kl_total
