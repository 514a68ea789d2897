"""What differs between BART, Pegasus, mBART, Marian and T5: depth, encoder, decoder and output head by one name."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class States:
    """A stack's outputs: `last` [batch, tokens, width]; `layers`, one such per layer, empty unless asked for.

    `layers[l]` is the output of layer l (counted from 0); the last entry follows the final norm where the
    form has one (Pegasus, mBART, T5), so it equals `last`. `attentions`, too only where asked for: of each decoder
    layer the weights of its self-attention [batch, heads, tokens, tokens] and of its attention to the source
    [batch, heads, tokens, source tokens].
    """

    last: Tensor
    layers: tuple[Tensor, ...] = ()
    attentions: tuple[tuple[Tensor, Tensor], ...] = ()


def depths(config: PretrainedConfig) -> tuple[int, int]:
    """Encoder and decoder layers."""
    if config.model_type == "t5":
        return config.num_layers, config.num_decoder_layers
    return config.encoder_layers, config.decoder_layers


def size_name(config: PretrainedConfig) -> str:
    """ "12-3": encoder and decoder layers."""
    return "-".join(map(str, depths(config)))


def with_depths(config: PretrainedConfig, encoder: int, decoder: int) -> PretrainedConfig:
    """A copy of the config with other depths."""
    config = copy.deepcopy(config)
    if config.model_type == "t5":
        config.num_layers, config.num_decoder_layers = encoder, decoder
    else:
        config.encoder_layers, config.decoder_layers = encoder, decoder
        config.num_hidden_layers = encoder
    return config


def decoder_shape(config: PretrainedConfig) -> dict[str, Any]:
    """What two models must have in common for one's decoder layers to fit into the other's decoder."""
    t5 = ("d_model", "d_kv", "d_ff", "num_heads", "feed_forward_proj", "num_decoder_layers")
    others = ("d_model", "decoder_ffn_dim", "decoder_attention_heads", "activation_function", "decoder_layers")
    keys = t5 if config.model_type == "t5" else others
    return {"model_type": config.model_type, **{key: getattr(config, key) for key in keys}}


def encode(model: PreTrainedModel, ids: Tensor, mask: Tensor, layers: bool = False) -> States:
    """Encoder outputs for ids and mask [batch, tokens]."""
    out = model.get_encoder()(input_ids=ids, attention_mask=mask, output_hidden_states=layers)
    return _states(out)


def decode(
    model: PreTrainedModel, ids: Tensor, encoded: Tensor, mask: Tensor, layers: bool = False, attentions: bool = False
) -> States:
    """Decoder outputs for decoder input ids [batch, target tokens], reading `encoded` [batch, tokens, width]."""
    with _weights_returned(model) if attentions else contextlib.nullcontext():
        out = model.get_decoder()(
            input_ids=ids,
            encoder_hidden_states=encoded,
            **(known_masks(model, ids, mask) if ids.is_cuda else {"encoder_attention_mask": mask}),
            output_hidden_states=layers,
            output_attentions=attentions,
            use_cache=False,
        )
    found = _states(out)
    return (
        replace(found, attentions=tuple(zip(out.attentions, out.cross_attentions, strict=True)))
        if attentions
        else found
    )


def known_masks(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The decoder's masks as torch's attention reads them, [1, 1, targets, targets] and, `mask`, [batch, 1, 1, tokens].

    Of plain ones transformers asks in every pass whether they are all ones, and a GPU's answer comes only when all that
    it was given before is done: the next step's work would not be prepared meanwhile.
    """
    if model.config._attn_implementation != "sdpa" or model.config.model_type == "t5":  # T5 adds its biases to them
        return {"encoder_attention_mask": mask}
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
    return {"attention_mask": causal[None, None], "encoder_attention_mask": mask.bool()[:, None, None, :]}


@contextlib.contextmanager
def _weights_returned(model: PreTrainedModel) -> Iterator[None]:
    """A block in which attention is computed so that its weights can be returned: fused kernels never have them."""
    fast = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(fast)


def head(model: PreTrainedModel, hidden: Tensor, table: Tensor | None = None) -> Tensor:
    """Logits [..., vocabulary] of the decoder's last output [..., width], as the model's own forward makes them.

    BART and its kin add `final_logits_bias`; T5 with tied embeddings scales by width ** -0.5 first. `table`
    [vocabulary, width] stands in for the output embedding: a copy of it in another precision.
    """
    if getattr(model.config, "scale_decoder_outputs", False):
        hidden = hidden * model.config.d_model**-0.5
    project: Any = model.lm_head
    bias: Any = getattr(model, "final_logits_bias", None)
    if table is None:
        logits = project(hidden)
        return logits if bias is None else logits + bias.to(logits.dtype)
    return torch.nn.functional.linear(hidden.to(table.dtype), table, None if bias is None else bias[0].to(table.dtype))


def head_parameters(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """The output head's parameters that are trained."""
    project: Any = model.lm_head
    return [p for p in project.parameters() if p.requires_grad]


def shift_right(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """Decoder input ids for labels [batch, tokens] (-100: none), by the model's own rule."""
    shift: Any = model.prepare_decoder_input_ids_from_labels
    return shift(labels)


def embeddings(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """Token and position embeddings (and with them the tied output head), each once."""
    found: dict[int, torch.nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("shared.", "embed_tokens.", "embed_positions.", "lm_head.")):
            found[id(parameter)] = parameter
    return list(found.values())


def encoder_layers(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """The encoder's parameters without its embeddings."""
    shared = {id(p) for p in embeddings(model)}
    return [p for p in model.get_encoder().parameters() if id(p) not in shared]


def _states(out: object) -> States:
    hidden = getattr(out, "hidden_states", None)
    return States(out.last_hidden_state, tuple(hidden[1:]) if hidden else ())  # type: ignore[attr-defined]
