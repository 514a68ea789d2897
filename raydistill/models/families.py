"""One interface to all families of models: sizes, encoder, decoder, LM head, parameter groups."""

import contextlib
import copy
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, PretrainedConfig

if TYPE_CHECKING:  # transformers' modelling code takes seconds to load, and many processes run no model
    from transformers import PreTrainedModel

WEIGHTS_BEFORE_DROPOUT = "eager_before_dropout"  # name of an attention implementation
BYTES_PER_PARAMETER = {"fp32": 4, "bf16": 2, "fp16": 2, "int8_float16": 1, "int8": 1}


@dataclass(frozen=True)
class Family:
    """The names and the properties in which families of encoder-decoders differ.

    Attributes:
        encoder_layers: Key of config.json with the number of encoder layers.
        decoder_layers: Key with the number of decoder layers.
        encoder_ffn: Key with the feed-forward units of an encoder layer.
        decoder_ffn: Key with the feed-forward units of a decoder layer; equal to `encoder_ffn` if both sides share it.
        decoder: Keys that decide the shapes of a decoder layer.
        dropout: Key of the residual dropout.
        layers: Attribute of an encoder or decoder stack that lists its layers.
        relative_positions: Whether positions are biases of the attention, so that a text can have any length.
        pre_norm: Whether the norm of a layer comes before attention and feed-forward layer.
        embedding_norm: Whether the embeddings are normalised.
    """

    encoder_layers: str = "encoder_layers"
    decoder_layers: str = "decoder_layers"
    encoder_ffn: str = "encoder_ffn_dim"
    decoder_ffn: str = "decoder_ffn_dim"
    decoder: tuple[str, ...] = ("d_model", "decoder_ffn_dim", "decoder_attention_heads", "activation_function")
    dropout: str = "dropout"
    layers: str = "layers"
    relative_positions: bool = False
    pre_norm: bool = False
    embedding_norm: bool = False

    @property
    def one_ffn_width(self) -> bool:
        """Whether encoder and decoder have the same number of feed-forward units."""
        return self.encoder_ffn == self.decoder_ffn


_T5 = Family(
    encoder_layers="num_layers",
    decoder_layers="num_decoder_layers",
    encoder_ffn="d_ff",
    decoder_ffn="d_ff",
    decoder=("d_model", "d_kv", "d_ff", "num_heads", "feed_forward_proj"),
    dropout="dropout_rate",
    layers="block",
    relative_positions=True,
    pre_norm=True,
)
# By `model_type` in config.json. NLLB-200 has the type of M2M100, and mBART-50 the type of mBART. T5 1.1, Flan-T5 and
# MADLAD-400 have the type of T5.
FAMILIES = {
    "bart": Family(embedding_norm=True),
    "pegasus": Family(pre_norm=True),
    "mbart": Family(pre_norm=True, embedding_norm=True),
    "marian": Family(),
    "m2m_100": Family(pre_norm=True),
    "t5": _T5,
    "mt5": _T5,
}


@dataclass(frozen=True)
class StackOutputs:
    """Outputs of an encoder or decoder stack.

    `last_hidden_state`: [batch, tokens, width]. `layers`: the output of each layer, same shape, only if requested; the
    last entry is taken after the final norm of the stack (of pre-norm families), so it equals `last_hidden_state`.
    `attentions`: for each decoder layer the weights of self-attention [batch, heads, tokens, tokens] and of
    cross-attention [batch, heads, tokens, source tokens], only if requested.
    """

    last_hidden_state: Tensor
    layers: tuple[Tensor, ...] = ()
    attentions: tuple[tuple[Tensor, Tensor], ...] = ()


# Configurations


def family_of(config: PretrainedConfig) -> Family:
    """Return the family of a model."""
    return FAMILIES[config.model_type]


def num_layers(config: PretrainedConfig) -> tuple[int, int]:
    """Return the numbers of encoder and decoder layers."""
    family = family_of(config)
    return getattr(config, family.encoder_layers), getattr(config, family.decoder_layers)


def size_name(config: PretrainedConfig) -> str:
    """Return the size, such as "12-3": encoder layers, decoder layers."""
    return "-".join(map(str, num_layers(config)))


def with_num_layers(config: PretrainedConfig, encoder: int, decoder: int) -> PretrainedConfig:
    """Return a copy of the config with other numbers of layers."""
    config = copy.deepcopy(config)
    family = family_of(config)
    setattr(config, family.encoder_layers, encoder)
    setattr(config, family.decoder_layers, decoder)
    config.num_hidden_layers = encoder
    return config


def without_layerdrop(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy of the config with which training never skips a layer.

    Published M2M100 models skip 5 % of the layers in training (LayerDrop, Fan et al. 2019). Losses that compare the
    outputs of layers need every layer.
    """
    config = copy.deepcopy(config)
    for key in ("encoder_layerdrop", "decoder_layerdrop"):
        if getattr(config, key, 0.0):
            setattr(config, key, 0.0)
    return config


def ffn_units(config: PretrainedConfig) -> tuple[int, int]:
    """Return the feed-forward units of an encoder and of a decoder layer."""
    family = family_of(config)
    return getattr(config, family.encoder_ffn), getattr(config, family.decoder_ffn)


def with_ffn_units(config: PretrainedConfig, encoder: int, decoder: int) -> PretrainedConfig:
    """Return a copy of the config with other numbers of feed-forward units.

    T5 has one number for both sides, so `encoder` and `decoder` must be equal.
    """
    family = family_of(config)
    assert encoder == decoder or not family.one_ffn_width
    config = copy.deepcopy(config)
    setattr(config, family.encoder_ffn, encoder)
    setattr(config, family.decoder_ffn, decoder)
    return config


def decoder_architecture(config: PretrainedConfig) -> dict[str, Any]:
    """Return the settings in which two models must agree to exchange decoder layers."""
    family = family_of(config)
    names = (*family.decoder, family.decoder_layers)
    return {"model_type": config.model_type, **{name: getattr(config, name) for name in names}}


def has_own_lm_head(config: PretrainedConfig) -> bool:
    """Return whether the LM head of a T5 model has weights of its own: T5 1.1, Flan-T5, MADLAD-400 and mT5.

    In other models the LM head is the embedding.
    """
    return config.model_type == "mt5" or not getattr(config, "scale_decoder_outputs", True)


def untie_lm_head(model: "PreTrainedModel") -> "PreTrainedModel":
    """Give the LM head weights of its own where `has_own_lm_head`, in place, and return the model.

    transformers 5 creates all T5 models with a tied head. `from_pretrained` unties a head only if its weights differ.
    """
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if has_own_lm_head(model.config) and head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(embedding.weight.detach().clone())
        model.all_tied_weights_keys.pop("lm_head.weight", None)
    return model


def count_parameters(config: PretrainedConfig) -> int:
    """Return the number of parameters of a model with this config, tied weights once; allocates no weights."""
    with torch.device("meta"):
        model = untie_lm_head(AutoModelForSeq2SeqLM.from_config(config))
    return sum(weight.numel() for weight in model.parameters())


def weights_mb(config: PretrainedConfig, precision: str = "fp32") -> float:
    """Return the megabytes (10^6 bytes) of the parameters in fp32, bf16, fp16, int8_float16 or int8.

    Activations and caches are not included. With int8, the few norms and biases that stay fp32 count as int8.
    """
    return count_parameters(config) * BYTES_PER_PARAMETER[precision] / 1e6


def max_positions(config: PretrainedConfig) -> int | None:
    """Return the largest number of tokens that the model has positions for; None (T5) means no limit."""
    return None if family_of(config).relative_positions else int(config.max_position_embeddings)


# Forward passes


def encode(model: "PreTrainedModel", ids: Tensor, mask: Tensor, layers: bool = False) -> StackOutputs:
    """Run the encoder on `ids` [batch, tokens] with the attention `mask` [batch, tokens]."""
    out = model.get_encoder()(input_ids=ids, attention_mask=mask, output_hidden_states=layers)
    return _to_stack_outputs(out)


def decode(
    model: "PreTrainedModel", ids: Tensor, encoded: Tensor, mask: Tensor, layers: bool = False, attentions: bool = False
) -> StackOutputs:
    """Run the decoder, teacher-forced and without the LM head.

    `ids`: decoder input ids [batch, target tokens]; `encoded`: encoder states [batch, tokens, width]; `mask`: the
    attention mask of the source [batch, tokens].
    """
    with _eager_attention(model) if attentions else contextlib.nullcontext():
        out = model.get_decoder()(
            input_ids=ids,
            encoder_hidden_states=encoded,
            **(sdpa_masks(model, ids, mask) if ids.is_cuda else {"encoder_attention_mask": mask}),
            output_hidden_states=layers,
            output_attentions=attentions,
            use_cache=False,
        )
    result = _to_stack_outputs(out)
    if not attentions:
        return result
    return replace(result, attentions=tuple(zip(out.attentions, out.cross_attentions, strict=True)))


def sdpa_masks(model: "PreTrainedModel", ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return the decoder's masks as torch's attention reads them.

    Both are boolean: the causal mask [1, 1, targets, targets] and the source mask [batch, 1, 1, tokens].

    Given a 2-D mask, transformers tests in each forward pass whether all of its values are one. On a GPU the test waits
    for all kernels queued so far, so the next step would not be prepared in the meantime.
    """
    # Biases of relative positions are added to the masks.
    if model.config._attn_implementation != "sdpa" or family_of(model.config).relative_positions:
        return {"encoder_attention_mask": mask}
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
    return {"attention_mask": causal[None, None], "encoder_attention_mask": mask.bool()[:, None, None, :]}


@contextlib.contextmanager
def _eager_attention(model: "PreTrainedModel") -> Iterator[None]:
    """Use an attention implementation that returns its weights; fused kernels do not compute them."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(WEIGHTS_BEFORE_DROPOUT, _attention_with_weights)
    AttentionMaskInterface.register(WEIGHTS_BEFORE_DROPOUT, eager_mask)
    implementation = model.config._attn_implementation
    model.set_attn_implementation(WEIGHTS_BEFORE_DROPOUT)
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)


def _attention_with_weights(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """The eager attention of a model's module, with the weights before dropout.

    The implementation of transformers returns weights of which dropout has zeroed a part and scaled the others.

    Returns:
        The outputs [batch, tokens, heads, width of a head], with dropout, and the weights [batch, heads, tokens, keys].
    """
    eager = sys.modules[type(module).__module__].eager_attention_forward
    dropout = options.pop("dropout", 0.0)
    output, weights = eager(module, query, key, value, attention_mask, dropout=0.0, **options)
    if module.training and dropout:
        output = (torch.nn.functional.dropout(weights, dropout) @ value).transpose(1, 2).contiguous()
    return output, weights


def lm_head(model: "PreTrainedModel", hidden: Tensor, lm_head_weight: Tensor | None = None) -> Tensor:
    """Return the logits [..., vocabulary] of decoder outputs [..., width], as the model's own forward pass does.

    BART, Pegasus, mBART and Marian add `final_logits_bias`; T5 with tied embeddings first scales by width ** -0.5.
    `lm_head_weight` [rows, width] replaces the output embedding, usually by a copy in another precision. Rows beyond
    the vocabulary give no logits.
    """
    if getattr(model.config, "scale_decoder_outputs", False):
        hidden = hidden * model.config.d_model**-0.5
    project: Any = model.lm_head
    bias: Any = getattr(model, "final_logits_bias", None)
    if lm_head_weight is None:
        logits = project(hidden)
        return logits if bias is None else logits + bias.to(logits.dtype)
    vocabulary = project.weight.shape[0]
    if bias is not None:
        bias = torch.nn.functional.pad(bias[0].to(lm_head_weight.dtype), (0, len(lm_head_weight) - vocabulary))
    return torch.nn.functional.linear(hidden.to(lm_head_weight.dtype), lm_head_weight, bias)[..., :vocabulary]


def shift_right(model: "PreTrainedModel", labels: Tensor) -> Tensor:
    """Return the decoder input ids of labels [batch, tokens], where -100 is padding, by the model's own rule."""
    if model.config.model_type == "m2m_100":  # shifts the labels in its forward pass only
        from transformers.models.m2m_100.modeling_m2m_100 import shift_tokens_right

        return shift_tokens_right(labels, model.config.pad_token_id, model.config.decoder_start_token_id)
    shift: Any = model.prepare_decoder_input_ids_from_labels
    return shift(labels)


# Feed-forward layers

FfnRole = Literal["in", "out"]
# A layer computes W_out act(W_in x + b_in) + b_out; gated T5 multiplies act(W_in x) by a second product W_in2 x.
_FFN_IN = re.compile(r"fc1\.(?:weight|bias)|(?:.*\.)?DenseReluDense\.wi(?:_[01])?\.weight")
_FFN_OUT = re.compile(r"fc2\.weight|(?:.*\.)?DenseReluDense\.wo\.weight")


def ffn_role(tensor_name: str) -> FfnRole | None:
    """Return the role of a layer's tensor in its feed-forward layer; None if the units do not index the tensor.

    Args:
        tensor_name: Name within the layer, such as "fc1.weight".

    Returns:
        "in" for weights [units, width] and biases [units] that compute the units, "out" for the weight
        [width, units] that they are multiplied by.
    """
    if _FFN_IN.fullmatch(tensor_name):
        return "in"
    return "out" if _FFN_OUT.fullmatch(tensor_name) else None


def decoder_layers(model: "PreTrainedModel") -> torch.nn.ModuleList:
    """Return the decoder layers, in order."""
    stack: Any = model.get_decoder()
    layers: torch.nn.ModuleList = getattr(stack, family_of(model.config).layers)
    return layers


def ffn_output_layers(stack: torch.nn.Module) -> list[torch.nn.Linear]:
    """Return the output projection of the feed-forward layer of each layer of an encoder or decoder, in order.

    Its inputs are the activations of the units [..., units], its weight is [width, units].
    """
    return [
        module
        for name, module in stack.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in ("fc2", "wo")
    ]


# Groups of parameters


def trainable_lm_head_parameters(model: "PreTrainedModel") -> list[torch.nn.Parameter]:
    """Return the trainable parameters of the LM head."""
    project: Any = model.lm_head
    return [p for p in project.parameters() if p.requires_grad]


def embedding_parameters(model: "PreTrainedModel") -> list[torch.nn.Parameter]:
    """Return token and position embeddings, and thus the tied LM head, each once."""
    parts = ("shared.", "embed_tokens.", "embed_positions.", "lm_head.")
    by_id = {id(p): p for name, p in model.named_parameters() if any(part in name for part in parts)}
    return list(by_id.values())


def encoder_parameters(model: "PreTrainedModel") -> list[torch.nn.Parameter]:
    """Return the parameters of the encoder without its embeddings."""
    embeddings = {id(p) for p in embedding_parameters(model)}
    return [p for p in model.get_encoder().parameters() if id(p) not in embeddings]


def _to_stack_outputs(out: object) -> StackOutputs:
    hidden = getattr(out, "hidden_states", None)
    return StackOutputs(out.last_hidden_state, tuple(hidden[1:]) if hidden else ())  # type: ignore[attr-defined]
