"""Which parts of a student keep the teacher's weights: the embeddings and a fully copied encoder, by default."""

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from raydistill.config.run import Run
from raydistill.core.errors import UserError
from raydistill.models import families
from raydistill.models.shrinking import Plan


@dataclass(frozen=True)
class Frozen:
    """What stays as the teacher has it; `shared`: the student's encoder states are the teacher's."""

    encoder: bool
    embeddings: bool
    shared: bool


def what_is_frozen(run: Run, layers: Plan | None) -> Frozen:
    """What the run asks to freeze; by default, of a shrunk student, the embeddings and a fully copied encoder.

    A student is shrunk where the run gives a `size`, be it the teacher's own; without one a teacher is fine-tuned.
    """
    shrunk = layers is not None and run.student.size is not None
    complete = layers is not None and layers.encoder_complete
    embeddings = run.training.freeze_embeddings
    encoder = run.training.freeze_encoder
    embeddings = shrunk if embeddings is None else embeddings
    encoder = shrunk and complete if encoder is None else encoder
    return Frozen(encoder, embeddings, encoder and embeddings and complete)


def freeze(student: PreTrainedModel, frozen: Frozen) -> None:
    """Freeze it; UserError where nothing is left to train."""
    for parameter in families.embeddings(student) if frozen.embeddings else []:
        parameter.requires_grad_(False)
    for parameter in families.encoder_layers(student) if frozen.encoder else []:
        parameter.requires_grad_(False)
    if not any(p.requires_grad for p in student.parameters()):
        raise UserError("nothing is left to train: encoder, embeddings and decoder are all frozen")
    _hold_padding_row(student)


def _hold_padding_row(model: PreTrainedModel) -> None:
    """Keep a zero padding row zero: CTranslate2 starts Marian's decoder from zero, whatever that row holds."""
    for parameter in families.embeddings(model):
        pad_id = model.config.pad_token_id
        if not parameter.requires_grad or pad_id >= len(parameter) or parameter[pad_id].any():
            continue

        def clear(gradient: Tensor, row: int = pad_id) -> Tensor:
            gradient = gradient.clone()
            gradient[row] = 0
            return gradient

        parameter.register_hook(clear)
