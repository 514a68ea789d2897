"""Creates students: plans which teacher layers are copied and which supervise, and copies the weights."""

import copy
import re
from dataclasses import dataclass, replace
from math import floor
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PretrainedConfig

from raydistill.config.run import LayerChoice, Student, parse_size
from raydistill.config.shapes import Units
from raydistill.core.errors import UserError
from raydistill.models import families
from raydistill.models.layer_choice import layers_to_copy, layers_to_supervise

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYER_NAME_PATTERN = re.compile(r"^((?:model\.)?(encoder|decoder)\.(?:layers|block))\.(\d+)\.(.+)$")
# Relative to the largest logit. A correct copy computes the same sums in the same order, so any excess is an error.
MAX_RELATIVE_LOGIT_DIFF = 1e-5
T5_RELATIVE_BIAS = "layer.0.SelfAttention.relative_attention_bias.weight"


@dataclass(frozen=True)
class LayerPlan:
    """For each student layer, the teacher layer that it copies and the teacher layer that supervises it.

    Layers count from 0. `decoder` is None if the decoder layers are randomly initialised. `size` is the student's
    numbers of encoder and decoder layers. `ffn` is the feed-forward units of an encoder and of a decoder layer, None
    for the teacher's. `copies_full_encoder` is false if units of the encoder are removed.
    """

    encoder: list[int]
    decoder: list[int] | None
    supervised_encoder: list[int]
    supervised_decoder: list[int]
    size: tuple[int, int]
    copies_full_encoder: bool
    ffn: tuple[int | None, int | None] = (None, None)

    @property
    def copied(self) -> dict[str, list[int] | None]:
        """The copied layers by side, as in `raydistill.json`."""
        return {"encoder": self.encoder, "decoder": self.decoder}

    @property
    def kept_ffn(self) -> dict[str, int | None] | None:
        """The feed-forward units per layer by side, as in `raydistill.json`; None if all are kept."""
        return None if self.ffn == (None, None) else dict(zip(("encoder", "decoder"), self.ffn, strict=True))

    @property
    def supervised(self) -> dict[str, list[int]]:
        """The supervising layers by side, as in `raydistill.json`."""
        return {"encoder": self.supervised_encoder, "decoder": self.supervised_decoder}


# The units that a student keeps, by side ("encoder", "decoder"): for each teacher layer the indices [units kept]
KeptUnits = dict[str, list[Tensor]]


def plan_student(teacher: PretrainedConfig, student: Student) -> LayerPlan:
    """Return the plan of a student for a teacher with this config: layers and feed-forward units.

    Raises:
        UserError: As `plan_layers`; or a side keeps more units than the teacher has, or T5's sides differ.
    """
    plan = plan_layers(families.num_layers(teacher), student)
    encoder, decoder = families.ffn_units(teacher)
    ffn = (
        _resolve_units("encoder", student.encoder_ffn, encoder),
        _resolve_units("decoder", student.decoder_ffn, decoder),
    )
    if families.family_of(teacher).one_ffn_width and ffn[0] != ffn[1]:
        raise UserError(
            f"T5 has one feed-forward width for both sides, so student.encoder_ffn and student.decoder_ffn must have "
            f"the same value; got {ffn[0] or 'all'} and {ffn[1] or 'all'} of {encoder} units"
        )
    return replace(plan, ffn=ffn, copies_full_encoder=plan.copies_full_encoder and ffn[0] is None)


def student_config(teacher: PretrainedConfig, plan: LayerPlan) -> PretrainedConfig:
    """Return the config of a planned student."""
    config = families.without_layerdrop(families.with_num_layers(teacher, *plan.size))
    encoder, decoder = families.ffn_units(teacher)
    return families.with_ffn_units(config, plan.ffn[0] or encoder, plan.ffn[1] or decoder)


def plan_layers(teacher_layers: tuple[int, int], student: Student) -> LayerPlan:
    """Return the plan of the layers alone for a teacher with `teacher_layers` (encoder, decoder) layers.

    Raises:
        UserError: The student is deeper than the teacher, a layer is out of range, or the numbers of layers differ.
    """
    try:
        encoder, decoder = parse_size(student.size) if student.size else teacher_layers
    except ValueError as error:
        raise UserError(str(error)) from None
    _check_depths((encoder, decoder), teacher_layers)
    _check_layers("copied", student.copied, teacher_layers)
    _check_layers("supervised", student.supervised, teacher_layers)
    from_encoder = student.copied.encoder or layers_to_copy(teacher_layers[0], encoder)
    random_decoder = student.init == "random" and student.copied.decoder is None
    from_decoder = student.copied.decoder or layers_to_copy(teacher_layers[1], decoder, student.init)
    if len(from_encoder) != encoder or len(from_decoder) != decoder:
        raise UserError(
            f"size {encoder}-{decoder} does not fit the layers to copy: encoder {from_encoder}, decoder {from_decoder}"
        )
    return LayerPlan(
        encoder=from_encoder,
        decoder=None if random_decoder else from_decoder,
        supervised_encoder=student.supervised.encoder or layers_to_supervise(teacher_layers[0], encoder),
        supervised_decoder=student.supervised.decoder or layers_to_supervise(teacher_layers[1], decoder),
        size=(encoder, decoder),
        copies_full_encoder=from_encoder == list(range(teacher_layers[0])),
    )


def shrink(
    teacher: "PreTrainedModel",
    plan: LayerPlan,
    seed: int = 0,
    decoder_from: "PreTrainedModel | None" = None,
    units: KeptUnits | None = None,
) -> "PreTrainedModel":
    """Return a student in eval mode with copies of the planned layers and of the teacher's embeddings, norms and head.

    If `plan.decoder` is None, the decoder layers are initialised randomly with `seed`. `decoder_from` is another model
    of the same architecture whose decoder layers are copied instead ("From" in the paper's Table 8). `units` are the
    feed-forward units to keep, from `models.pruning`, for each side whose units the plan reduces. A student of full
    depth and with all units has exactly the teacher's logits; a student of full depth with fewer units has the logits
    of the teacher without the outputs of the other units.

    Raises:
        UserError: The decoder of `decoder_from` has another architecture.
    """
    if decoder_from is not None:
        check_same_decoder(teacher.config, decoder_from.config, str(decoder_from.config.name_or_path))
    config = student_config(teacher.config, plan)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = families.untie_lm_head(type(teacher)(config))
    state = student.state_dict()
    layer_map = {"encoder": plan.encoder, "decoder": plan.decoder}
    teacher_state = teacher.state_dict()
    decoder_state = teacher_state if decoder_from is None else decoder_from.state_dict()
    for key in state:
        name = _teacher_tensor_name(key, layer_map)
        if name is not None:
            tensor = (decoder_state if _is_decoder_layer_name(key) else teacher_state)[name]
            state[key] = _keep_units(name, tensor, plan, units or {})
    student.load_state_dict(state)
    torch.nn.Module.to(student, next(teacher.parameters()).dtype).eval()
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


def check_full_depth_copy(teacher: "PreTrainedModel", name: str) -> float:
    """Check that a full-depth copy of a teacher has the teacher's logits for one fixed input.

    Returns:
        The largest absolute difference of a logit, divided by the largest absolute logit or by 1 if that is larger.

    Raises:
        UserError: The difference is too large, so no student of this teacher would be correct.
    """
    student = shrink(teacher, plan_student(teacher.config, Student()))
    ids = torch.arange(1, 9)[None].remainder(teacher.config.vocab_size)
    with torch.inference_mode():
        expected, actual = (
            model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=ids, use_cache=False).logits
            for model in (teacher, student)
        )
    max_diff = float((expected - actual).abs().max())
    relative_diff = max_diff / max(1.0, float(expected.abs().max()))
    if not relative_diff <= MAX_RELATIVE_LOGIT_DIFF:
        raise UserError(
            f"teacher {name}: the logits of a full-depth copy differ by {max_diff:.2g}, so this teacher "
            f"cannot be shrunk"
        )
    return relative_diff


def check_same_decoder(teacher: PretrainedConfig, other: PretrainedConfig, name: str) -> None:
    """Check that the decoder layers of model `other`, called `name` in the message, fit into the teacher's decoder.

    Raises:
        UserError: The architectures differ.
    """
    expected, actual = families.decoder_architecture(teacher), families.decoder_architecture(other)
    if expected != actual:
        differences = ", ".join(
            f"{key} {actual.get(key)} and not {value}" for key, value in expected.items() if actual.get(key) != value
        )
        raise UserError(f"student.copy_from {name}: its decoder architecture differs from the teacher's: {differences}")


def _keep_units(name: str, tensor: Tensor, plan: LayerPlan, units: KeptUnits) -> Tensor:
    """Return the part of the teacher's tensor that belongs to the kept feed-forward units; usually the whole tensor."""
    match = LAYER_NAME_PATTERN.match(name)
    role = families.ffn_role(match[4]) if match else None
    if match is None or role is None or plan.ffn[("encoder", "decoder").index(match[2])] is None:
        return tensor
    return tensor.index_select(0 if role == "in" else 1, units[match[2]][int(match[3])])


def _resolve_units(side: str, requested: Units | None, available: int) -> int | None:
    """Return the number of feed-forward units that a layer keeps; None for all of them."""
    if requested is None:
        return None
    if requested > available:
        raise UserError(
            f"student.{side}_ffn {requested}: the teacher has {available} feed-forward units in each {side} layer, "
            f"so a student can keep at most {available}"
        )
    num_units = int(requested) if requested > 1 else max(1, floor(requested * available + 0.5))
    return None if num_units == available else num_units


def _is_decoder_layer_name(key: str) -> bool:
    """Return whether a tensor belongs to one decoder layer; T5's relative position bias belongs to the stack."""
    match = LAYER_NAME_PATTERN.match(key)
    return match is not None and match[2] == "decoder" and match[4] != T5_RELATIVE_BIAS


def _teacher_tensor_name(key: str, layer_map: dict[str, list[int] | None]) -> str | None:
    """Return the teacher's name of a student tensor, or None if the tensor stays random."""
    match = LAYER_NAME_PATTERN.match(key)
    if not match:
        return key
    stack, side, layer, rest = match[1], match[2], int(match[3]), match[4]
    # T5 stores the relative position bias of all layers in the first layer.
    if rest == T5_RELATIVE_BIAS:
        return f"{stack}.0.{rest}"
    layers = layer_map[side]
    return None if layers is None else f"{stack}.{layers[layer]}.{rest}"


def _check_depths(size: tuple[int, int], teacher_layers: tuple[int, int]) -> None:
    for side, depth, limit in zip(("encoder", "decoder"), size, teacher_layers, strict=True):
        if depth > limit:
            raise UserError(
                f"size {size[0]}-{size[1]}: the teacher has {limit} {side} layers, "
                f"so a student can have 1 to {limit}, not {depth}"
            )


def _check_layers(field: str, choice: LayerChoice, teacher_layers: tuple[int, int]) -> None:
    for side, layers, depth in zip(
        ("encoder", "decoder"), (choice.encoder, choice.decoder), teacher_layers, strict=True
    ):
        out_of_range = [layer for layer in layers or [] if not 0 <= layer < depth]
        if out_of_range:
            raise UserError(
                f"{field}.{side}: layer {out_of_range[0]} is out of range; "
                f"the teacher's {side} layers are 0 to {depth - 1}"
            )
