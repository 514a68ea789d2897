"""Freezes parts of a student: by default the embeddings, and the encoder if it is a complete copy of the teacher's."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from raydistill.config.run import Run
from raydistill.core.errors import UserError
from raydistill.models import families
from raydistill.models.shrinking import LayerPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class FrozenParts:
    """Which parts of a student are not trained.

    `encoder_shared`: the student's encoder states equal the teacher's, since encoder and embeddings are frozen copies.
    """

    encoder: bool
    embeddings: bool
    encoder_shared: bool


def resolve_frozen_parts(run: Run, layer_plan: LayerPlan | None) -> FrozenParts:
    """Return the parts that the run freezes.

    The defaults for a shrunk student are frozen embeddings and, if the whole encoder is copied, a frozen encoder. A
    student is shrunk if the run sets a `size`, even the teacher's own, removes feed-forward units or trims the
    vocabulary; otherwise the teacher is fine-tuned.
    """
    shrunk = layer_plan is not None and (run.student.size is not None or run.student.is_pruned)
    shrunk |= layer_plan is not None and run.student.vocabulary is not None
    full_encoder = layer_plan is not None and layer_plan.copies_full_encoder
    embeddings = run.training.freeze_embeddings
    encoder = run.training.freeze_encoder
    embeddings = shrunk if embeddings is None else embeddings
    encoder = shrunk and full_encoder if encoder is None else encoder
    return FrozenParts(encoder, embeddings, encoder and embeddings and full_encoder)


def freeze(student: "PreTrainedModel", frozen: FrozenParts) -> None:
    """Turn gradients off for the frozen parts, in place.

    Raises:
        UserError: No trainable parameter is left.
    """
    for parameter in families.embedding_parameters(student) if frozen.embeddings else []:
        parameter.requires_grad_(False)
    for parameter in families.encoder_parameters(student) if frozen.encoder else []:
        parameter.requires_grad_(False)
    if not any(p.requires_grad for p in student.parameters()):
        raise UserError(
            "nothing is left to train: encoder, embeddings and decoder are all frozen; set training.freeze_encoder or "
            "training.freeze_embeddings to false"
        )
    _keep_padding_row_zero(student)


def _keep_padding_row_zero(model: "PreTrainedModel") -> None:
    """Keep a padding row of zeros at zero: CTranslate2 starts Marian's decoder from zeros, whatever the row holds."""
    for parameter in families.embedding_parameters(model):
        pad_id = model.config.pad_token_id
        if not parameter.requires_grad or pad_id >= len(parameter) or parameter[pad_id].any():
            continue

        def clear(gradient: Tensor, row: int = pad_id) -> Tensor:
            gradient = gradient.clone()
            gradient[row] = 0
            return gradient

        parameter.register_hook(clear)
