"""Which teacher layers a student copies and is supervised by, and the student made from them."""

import copy
import re
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel

from raydistill.config.run import LayerChoice, Student, parse_size
from raydistill.core.errors import UserError
from raydistill.models import families
from raydistill.models.layer_choice import layers_to_copy, layers_to_supervise
from raydistill.models.onednn_linear import quicken

LAYER_KEY = re.compile(r"^((?:model\.)?(encoder|decoder)\.(?:layers|block))\.(\d+)\.(.+)$")
ALIGNED = 1e-5  # of the largest logit; the same sums in the same order are the same numbers, so this is generous
RELATIVE_BIAS = "layer.0.SelfAttention.relative_attention_bias.weight"


@dataclass(frozen=True)
class Plan:
    """A student's layers: for each side, the teacher layer copied (None: random) and the one it is taught by."""

    encoder: list[int]
    decoder: list[int] | None
    supervised_encoder: list[int]
    supervised_decoder: list[int]
    size: tuple[int, int]
    encoder_complete: bool

    @property
    def copied(self) -> dict[str, list[int] | None]:
        """As `raydistill.json` holds it."""
        return {"encoder": self.encoder, "decoder": self.decoder}

    @property
    def supervised(self) -> dict[str, list[int]]:
        """As `raydistill.json` holds it."""
        return {"encoder": self.supervised_encoder, "decoder": self.supervised_decoder}


def plan(teacher: tuple[int, int], student: Student) -> Plan:
    """The layers of a student of a teacher with (encoder, decoder) layers; UserError where one is out of range."""
    try:
        encoder, decoder = parse_size(student.size) if student.size else teacher
    except ValueError as error:
        raise UserError(str(error)) from None
    for side, wanted, depth in (("encoder", encoder, teacher[0]), ("decoder", decoder, teacher[1])):
        if wanted > depth:
            raise UserError(
                f"size {encoder}-{decoder}: the teacher has {depth} {side} layers, "
                f"so a student can have 1 to {depth}, not {wanted}"
            )
    _check_layers("copied", student.copied, teacher)
    _check_layers("supervised", student.supervised, teacher)
    from_encoder = student.copied.encoder or layers_to_copy(teacher[0], encoder)
    random = student.init == "random" and student.copied.decoder is None
    from_decoder = student.copied.decoder or layers_to_copy(teacher[1], decoder, student.init)
    if len(from_encoder) != encoder or len(from_decoder) != decoder:
        raise UserError(
            f"size {encoder}-{decoder} does not fit the layers to copy: encoder {from_encoder}, decoder {from_decoder}"
        )
    return Plan(
        encoder=from_encoder,
        decoder=None if random else from_decoder,
        supervised_encoder=student.supervised.encoder or layers_to_supervise(teacher[0], encoder),
        supervised_decoder=student.supervised.decoder or layers_to_supervise(teacher[1], decoder),
        size=(encoder, decoder),
        encoder_complete=from_encoder == list(range(teacher[0])),
    )


def shrink(
    teacher: PreTrainedModel, layers: Plan, seed: int = 0, decoder_from: PreTrainedModel | None = None
) -> PreTrainedModel:
    """A student in eval mode whose layers are copies of the teacher's; all else (embeddings, norms, head) is copied.

    Where `layers.decoder` is None the decoder layers keep a random start, drawn with `seed`. `decoder_from` is
    another model of the teacher's shape whose decoder layers are copied instead (the paper's "From": Table 8). A
    student of full depth equals its teacher, logit by logit.
    """
    if decoder_from is not None:
        check_same_shape(teacher.config, decoder_from.config, str(decoder_from.config.name_or_path))
    config = families.with_depths(teacher.config, *layers.size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = type(teacher)(config)
    state = student.state_dict()
    sources = {"encoder": layers.encoder, "decoder": layers.decoder}
    theirs = teacher.state_dict()
    others = theirs if decoder_from is None else decoder_from.state_dict()
    for key in state:
        wanted = _teacher_key(key, sources)
        if wanted is not None:
            state[key] = (others if _of_decoder_layer(key) else theirs)[wanted]
    student.load_state_dict(state)
    quicken(student)  # as its teacher was when it was loaded
    torch.nn.Module.to(student, next(teacher.parameters()).dtype).eval()
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


def check_alignment(teacher: PreTrainedModel, name: str) -> float:
    """How far a copy of full depth is off the teacher's own logits, as a share of the largest (or of 1).

    UserError where it is not the same model: then no student can be trusted. One made-up row of tokens in, all logits
    compared; it is asked of every teacher that is trained from.
    """
    copy_of_all = shrink(teacher, plan(families.depths(teacher.config), Student()))
    ids = torch.arange(1, 9)[None].remainder(teacher.config.vocab_size)
    with torch.inference_mode():
        wanted, found = (
            model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=ids, use_cache=False).logits
            for model in (teacher, copy_of_all)
        )
    apart = float((wanted - found).abs().max())
    share = apart / max(1.0, float(wanted.abs().max()))
    if not share <= ALIGNED:
        raise UserError(
            f"teacher {name}: a copy of full depth is off by {apart:.2g} in its logits; it cannot be shrunk"
        )
    return share


def check_same_shape(teacher: PretrainedConfig, other: PretrainedConfig, name: str) -> None:
    """UserError where decoder layers of `other`, called `name`, cannot take the place of the teacher's."""
    wanted, found = families.decoder_shape(teacher), families.decoder_shape(other)
    if wanted != found:
        differ = ", ".join(f"{k} {found.get(k)} and not {v}" for k, v in wanted.items() if found.get(k) != v)
        raise UserError(f"student.copy_from {name}: its decoder is not of the teacher's shape: {differ}")


def _of_decoder_layer(key: str) -> bool:
    """Whether a tensor belongs to a single decoder layer; T5's relative position bias is the stack's."""
    match = LAYER_KEY.match(key)
    return match is not None and match[2] == "decoder" and match[4] != RELATIVE_BIAS


def _teacher_key(key: str, sources: dict[str, list[int] | None]) -> str | None:
    """The teacher's name of a student's tensor, or None where it stays random."""
    match = LAYER_KEY.match(key)
    if not match:
        return key
    stack, side, layer, rest = match[1], match[2], int(match[3]), match[4]
    # T5 keeps the relative position bias of all layers in its first one: it is the stack's, not the layer's.
    if rest == RELATIVE_BIAS:
        return f"{stack}.0.{rest}"
    layers = sources[side]
    return None if layers is None else f"{stack}.{layers[layer]}.{rest}"


def _check_layers(word: str, choice: LayerChoice, teacher: tuple[int, int]) -> None:
    for side, layers, depth in (
        ("encoder", choice.encoder, teacher[0]),
        ("decoder", choice.decoder, teacher[1]),
    ):
        wrong = [layer for layer in layers or [] if not 0 <= layer < depth]
        if wrong:
            raise UserError(
                f"{word}.{side}: layer {wrong[0]} is out of range; the teacher's {side} layers are 0 to {depth - 1}"
            )
