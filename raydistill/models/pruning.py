"""Chooses the feed-forward units that a student keeps: the units with the largest outputs, or random units.

Unit j of a feed-forward layer has an activation a_j, a number per token, and adds a_j w_j to the output of the layer,
where w_j is column j of the output weight. Removing the unit removes this vector.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PretrainedConfig

from raydistill.models import families
from raydistill.models.calibration import Calibration
from raydistill.models.shrinking import KeptUnits, LayerPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIDES = ("encoder", "decoder")

# By side, the score of each unit of each layer [units]
UnitScores = dict[str, list[Tensor]]


def random_units(teacher: PretrainedConfig, plan: LayerPlan, seed: int) -> KeptUnits:
    """Return units drawn uniformly without replacement, for each side whose units the plan reduces.

    Each teacher layer has its own draw, which depends on `seed`, side and layer only.
    """
    available, layers = families.ffn_units(teacher), families.num_layers(teacher)
    kept: KeptUnits = {}
    for index, (side, num_kept) in enumerate(zip(SIDES, plan.ffn, strict=True)):
        if num_kept is not None:
            generator = torch.Generator().manual_seed(2 * seed + index)
            draws = (torch.randperm(available[index], generator=generator) for _ in range(layers[index]))
            kept[side] = [draw[:num_kept].sort().values for draw in draws]
    return kept


def best_units(
    teacher: "PreTrainedModel", plan: LayerPlan, calibration: Calibration, decoder_from: "PreTrainedModel | None" = None
) -> KeptUnits:
    """Return the units with the highest scores, for each side whose units the plan reduces.

    `decoder_from` is the model whose decoder layers are copied, if that is not the teacher.
    """
    kept = {side: count for side, count in zip(SIDES, plan.ffn, strict=True) if count is not None}
    scores = score_units(teacher, calibration) if kept else {}
    if "decoder" in kept and decoder_from is not None:
        scores["decoder"] = score_units(decoder_from, calibration)["decoder"]
    return {side: [_highest(layer, count) for layer in scores[side]] for side, count in kept.items()}


def score_units(model: "PreTrainedModel", calibration: Calibration) -> UnitScores:
    """Return the root mean square over tokens of the norm of each unit's output, sqrt(mean(a_j^2)) ||w_j||.

    Activation times norm of the outgoing weights, as Minitron (Muralidharan et al., 2024, "Compact Language Models via
    Pruning and Knowledge Distillation", section 2) scores units by activation; the product is the exact size of what a
    removed unit takes from the output of its layer. Padding does not count.
    """
    encoder = _ActivationSquares(families.ffn_output_layers(model.get_encoder()))
    decoder = _ActivationSquares(families.ffn_output_layers(model.get_decoder()))
    with torch.inference_mode():
        for batch in calibration.batches():
            ids, mask, labels = calibration.tensors(batch, model)
            with encoder.recorded(mask.bool()):
                states = families.encode(model, ids, mask).last_hidden_state
            with decoder.recorded(labels != -100):
                families.decode(model, families.shift_right(model, labels), states, mask)
    return {"encoder": encoder.scores(), "decoder": decoder.scores()}


class _ActivationSquares:
    """The sums over tokens of the squared activations of feed-forward units.

    Args:
        layers: The output projection of each layer, whose inputs are the activations.
    """

    def __init__(self, layers: list[torch.nn.Linear]) -> None:
        self._layers = layers
        self._sums = [torch.zeros(layer.in_features, dtype=torch.float64) for layer in layers]
        self._num_tokens = 0

    @contextmanager
    def recorded(self, tokens: Tensor) -> Iterator[None]:
        """Add the activations of the forward pass in the block, at the `tokens` [batch, tokens] that are true."""
        self._num_tokens += int(tokens.sum())
        hooks = [
            layer.register_forward_pre_hook(partial(self._add, total=total, tokens=tokens))
            for layer, total in zip(self._layers, self._sums, strict=True)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def scores(self) -> list[Tensor]:
        """The root mean square of each unit's activation times the norm of its output weights, by layer [units]."""
        return [
            (total / self._num_tokens).sqrt() * layer.weight.detach().to("cpu", torch.float64).norm(dim=0)
            for layer, total in zip(self._layers, self._sums, strict=True)
        ]

    @staticmethod
    def _add(_layer: torch.nn.Module, inputs: tuple[Tensor, ...], *, total: Tensor, tokens: Tensor) -> None:
        total += inputs[0][tokens].double().square().sum(0).cpu()


def _highest(scores: Tensor, count: int) -> Tensor:
    """The indices of the `count` highest scores, in ascending order."""
    return scores.topk(count).indices.sort().values
