"""Chooses the decoder layers that a student copies by the divergence of the untrained student from its teacher."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raydistill.models import families
from raydistill.models.calibration import Calibration
from raydistill.models.layer_choice import layers_to_copy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RULES = ("spaced", "first", "middle", "last")

Layers = tuple[int, ...]


@dataclass(frozen=True)
class _Batch:
    """Decoder inputs of calibration rows, and the teacher's outputs at the real tokens.

    Attributes:
        ids: Decoder input ids [rows, tokens].
        is_token: True at real tokens, false at padding [rows, tokens].
        encoded: Encoder states [rows, source tokens, width].
        mask: Attention mask of the source [rows, source tokens].
        hidden: The teacher's last decoder states [real tokens, width].
    """

    ids: Tensor
    is_token: Tensor
    encoded: Tensor
    mask: Tensor
    hidden: Tensor


def measure_layers(teacher: "PreTrainedModel", num_layers: int, calibration: Calibration) -> dict[Layers, float]:
    """Return the divergences of sets of `num_layers` decoder layers, the lowest first.

    The candidates are the choices of the rules in `RULES` (the paper's table is "spaced") and one set from greedy
    removal: starting with all layers, the layer whose removal gives the lowest divergence is removed until `num_layers`
    remain.

    The divergence of a set is the mean over target tokens of KL(teacher || student) in nats, where the student is the
    teacher without the other layers of its decoder, has seen the same target prefix, and was not trained.
    """
    depth = families.num_layers(teacher.config)[1]
    divergences: dict[Layers, float] = {}
    with torch.inference_mode():
        batches = [_make_batch(teacher, calibration, rows) for rows in calibration.batches()]

        def measure(layers: Layers) -> float:
            if layers not in divergences:
                divergences[layers] = _divergence(teacher, batches, layers)
            return divergences[layers]

        remaining = tuple(range(depth))
        while len(remaining) > num_layers:
            smaller = [tuple(other for other in remaining if other != layer) for layer in remaining]
            remaining = min(smaller, key=measure)
        candidates = {remaining, *(tuple(layers_to_copy(depth, num_layers, rule)) for rule in RULES)}
        return {layers: measure(layers) for layers in sorted(candidates, key=lambda layers: (measure(layers), layers))}


def _make_batch(teacher: "PreTrainedModel", calibration: Calibration, rows: Sequence[int]) -> _Batch:
    source_ids, mask, labels = calibration.tensors(rows, teacher)
    encoded = families.encode(teacher, source_ids, mask).last_hidden_state
    ids, is_token = families.shift_right(teacher, labels), labels != -100
    hidden = families.decode(teacher, ids, encoded, mask).last_hidden_state[is_token]
    return _Batch(ids, is_token, encoded, mask, hidden)


def _divergence(teacher: "PreTrainedModel", batches: Sequence[_Batch], layers: Layers) -> float:
    """The mean over the tokens of all batches of the KL divergence from the teacher to its decoder with `layers`."""
    total, num_tokens = 0.0, 0
    with _only_layers(teacher, layers):
        for batch in batches:
            hidden = families.decode(teacher, batch.ids, batch.encoded, batch.mask).last_hidden_state[batch.is_token]
            log_p, log_q = (F.log_softmax(families.lm_head(teacher, h), -1) for h in (batch.hidden, hidden))
            total += float(F.kl_div(log_q, log_p, reduction="sum", log_target=True))
            num_tokens += len(hidden)
    return total / num_tokens


@contextmanager
def _only_layers(model: "PreTrainedModel", layers: Layers) -> Iterator[None]:
    """Let the other decoder layers return their input. T5's first layer still computes the bias of all layers."""
    skipped = [layer for i, layer in enumerate(families.decoder_layers(model)) if i not in layers]
    hooks = [layer.register_forward_hook(_return_input, with_kwargs=True) for layer in skipped]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _return_input(_layer: torch.nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    hidden = inputs[0] if inputs else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
