"""The loss of a micro-batch: read its tensors, run the student on them, and compute the loss terms.

The teacher's states are read from the teacher cache, or computed by the teacher where the cache lacks them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raydistill.config.run import Loss, Method
from raydistill.data.batching import Examples
from raydistill.models import families
from raydistill.models.shrinking import LayerPlan
from raydistill.models.tensors import make_attention_mask, pad_to_tensor
from raydistill.teacher_cache.reader import RaggedArray
from raydistill.teacher_cache.storage_dtypes import from_storage
from raydistill.training.losses import (
    OutputTargets,
    attention_mse,
    cosine_distance,
    layerwise_hidden_mse,
    output_loss,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Self-attention and cross-attention weights of each decoder layer, [rows, heads, tokens, keys].
AttentionMaps = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class MicroBatch:
    """The tensors of a micro-batch that are read from memory and disk, before any model runs.

    Attributes:
        labels: Target token ids [rows, target tokens]; -100 for padding.
        token_positions: Indices of the real tokens in the flattened labels [tokens]. They are computed on the CPU, so
            that a step does not wait for a GPU to count them.
        source_mask: 1 for real source tokens [rows, source tokens].
        source_ids: Source token ids of equal shape; None where no encoder has to run.
        encoder_states: Cached encoder states as stored [rows, source tokens, stored width]; None where they are not
            cached.
        teacher_states: Cached outputs of the teacher's decoder layers as stored, real tokens only, [tokens, stored
            width] by layer.
    """

    labels: Tensor
    token_positions: Tensor
    source_mask: Tensor
    source_ids: Tensor | None = None
    encoder_states: Tensor | None = None
    teacher_states: dict[int, Tensor] = field(default_factory=dict)

    def to(self, device: str) -> "MicroBatch":
        """A copy on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "MicroBatch":
        """A copy in pinned memory, from which a GPU copies asynchronously."""
        return self._map(Tensor.pin_memory)

    def _map(self, fn: Callable[[Tensor], Tensor]) -> "MicroBatch":
        return MicroBatch(
            fn(self.labels),
            fn(self.token_positions),
            fn(self.source_mask),
            None if self.source_ids is None else fn(self.source_ids),
            None if self.encoder_states is None else fn(self.encoder_states),
            {layer: fn(states) for layer, states in self.teacher_states.items()},
        )


@dataclass(frozen=True)
class DistillationStep:
    """Everything that the loss of a batch of examples depends on.

    Attributes:
        student: The model that is trained.
        teacher: The frozen teacher; None where no teacher has to run.
        examples: The training pairs.
        method: "sft", "kd" or "pl".
        loss: Coefficients and options of the loss terms.
        layer_plan: The teacher layers that supervise the student's layers; None for a random start.
        encoder_shared: The student's encoder and embeddings are the teacher's and frozen: encoder states come from
            the cache or from one pass without gradients, and serve both models.
        lm_head_shared: The LM head is the teacher's and frozen, and serves both models.
        cached_encoder_states: Encoder states of every source.
        cached_decoder_states: Outputs of the teacher's decoder layers for every example, by layer.
        lm_head_weight: A copy of the frozen LM head's weight in the autocast dtype, which saves a cast per chunk; may
            have further rows of zeros.
    """

    student: "PreTrainedModel"
    teacher: "PreTrainedModel | None"
    examples: Examples
    method: Method
    loss: Loss
    layer_plan: LayerPlan | None = None
    encoder_shared: bool = False
    lm_head_shared: bool = False
    cached_encoder_states: RaggedArray | None = None
    cached_decoder_states: dict[int, RaggedArray] = field(default_factory=dict)
    lm_head_weight: Tensor | None = None

    def term_weights(self, batch: Sequence[int]) -> dict[str, float]:
        """The weight of each loss term in a global batch: the number of its tokens.

        The weights depend on lengths alone, so that every worker computes them without communication.
        """
        tokens = float(self.examples.count_target_tokens(batch))
        weights = {"data": tokens}
        if self.method != "kd":
            return weights
        if self.loss.alpha_logits > 0:
            weights["logits"] = tokens
        if self.loss.alpha_hidden > 0:
            weights["hidden"] = tokens
            if self.encoder_supervised:
                weights["encoder_hidden"] = float(self.examples.count_source_tokens(batch))
        if self.loss.alpha_attention > 0:
            weights["attention"] = tokens
        if self.loss.alpha_cosine > 0:
            weights["cosine"] = tokens
        return weights

    def alphas(self) -> dict[str, float]:
        """The coefficient of each loss term."""
        loss = self.loss
        return {
            "data": loss.alpha_data,
            "logits": loss.alpha_logits,
            "hidden": loss.alpha_hidden,
            "encoder_hidden": loss.alpha_hidden,
            "attention": loss.alpha_attention,
            "cosine": loss.alpha_cosine,
        }

    @property
    def layers_needed(self) -> list[int]:
        """The teacher decoder layers whose outputs the loss reads; the last layer gives the logits."""
        if self.method != "kd" or self.layer_plan is None or self.teacher is None:
            return sorted(self.cached_decoder_states)
        last_layer = families.num_layers(self.teacher.config)[1] - 1
        hidden_layers = self.layer_plan.supervised_decoder if self.loss.alpha_hidden > 0 else []
        return sorted({*hidden_layers, last_layer})

    @property
    def encoder_supervised(self) -> bool:
        """Whether the teacher's encoder supervises the student's encoder, which has fewer layers."""
        return not self.encoder_shared and self.layer_plan is not None and not self.layer_plan.copies_full_encoder

    def read_ahead(self, batch: Sequence[int]) -> None:
        """Let the kernel read the cached states of examples into memory in the background, before `read_batch`."""
        if self.cached_decoder_states:
            for layer in self.layers_needed:
                self.cached_decoder_states[layer].read_ahead(batch)
        if self.encoder_shared and self.cached_encoder_states is not None:
            self.cached_encoder_states.read_ahead(self.examples.source_indices[i] for i in batch)

    def read_batch(self, batch: Sequence[int]) -> MicroBatch:
        """The tensors of a micro-batch of examples, on the CPU; may be called in another thread."""
        rows = [self.examples.source_indices[i] for i in batch]
        sources = [self.examples.sources[row] for row in rows]
        labels = pad_to_tensor([self.examples.targets[i] for i in batch], -100)
        source_ids = encoder_states = None
        teacher_states: dict[int, Tensor] = {}
        if self.cached_decoder_states:
            teacher_states = {layer: self.cached_decoder_states[layer].read_flat(batch) for layer in self.layers_needed}
        if self.encoder_shared and self.cached_encoder_states is not None:
            encoder_states = self.cached_encoder_states.read_padded(rows)
        else:
            source_ids = pad_to_tensor(sources, self.student.config.pad_token_id)
        return MicroBatch(
            labels,
            (labels != -100).flatten().nonzero()[:, 0],
            make_attention_mask(sources),
            source_ids,
            encoder_states,
            teacher_states,
        )

    def loss_terms(self, batch: MicroBatch, scales: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch.

        Args:
            batch: The micro-batch, on the device of the models.
            scales: The factor of each term's sum in the loss. Terms without a factor are not computed.

        Returns:
            The loss, a scalar with gradient: the sum over terms of scale times sum. And the sum of each term over the
            tokens of the micro-batch, without gradient.
        """
        encoder_states, loss, sums = self._encode(batch, scales)
        student = families.decode(
            self.student,
            families.shift_right(self.student, batch.labels),
            encoder_states,
            batch.source_mask,
            layers="hidden" in scales,
            attentions="attention" in scales,
        )
        last_hidden = select_tokens(student.last_hidden_state, batch.token_positions)
        teacher_states: dict[int, Tensor] = {}
        teacher_maps: AttentionMaps = ()
        if self.method == "kd":
            teacher_states, teacher_maps = self._teacher_states(batch, encoder_states, "attention" in scales)
        last_teacher_hidden = teacher_states[max(teacher_states)] if teacher_states else None

        output, sums["data"], divergence = self._output_loss(batch, last_hidden, last_teacher_hidden, scales)
        loss = loss + output
        if "logits" in scales:
            sums["logits"] = divergence
        terms = {}
        if "hidden" in scales and self.layer_plan is not None:
            terms["hidden"] = layerwise_hidden_mse(
                [select_tokens(states, batch.token_positions) for states in student.layers],
                [teacher_states[layer] for layer in self.layer_plan.supervised_decoder],
                self.loss.normalize_hidden,
            )
        if "cosine" in scales and last_teacher_hidden is not None:
            terms["cosine"] = cosine_distance(last_hidden, last_teacher_hidden)
        if "attention" in scales:
            terms["attention"] = self._attention_loss(batch, student.attentions, teacher_maps)
        for name, term in terms.items():
            loss, sums[name] = loss + scales[name] * term, term.detach()
        return loss, sums

    def _encode(self, batch: MicroBatch, scales: dict[str, float]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The student's encoder states; and the loss and the sum of the encoder's hidden term, where it is computed."""
        no_loss = torch.zeros((), device=batch.labels.device)
        if batch.encoder_states is not None:
            device = batch.encoder_states.device.type
            # Under autocast every layer of the decoder would cast them again.
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.student.dtype
            return from_storage(batch.encoder_states, dtype), no_loss, {}
        assert batch.source_ids is not None
        supervised = "encoder_hidden" in scales
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.encoder_shared):
            student = families.encode(self.student, batch.source_ids, batch.source_mask, layers=supervised)
        if not supervised:
            return student.last_hidden_state, no_loss, {}
        assert self.teacher is not None
        assert self.layer_plan is not None
        with torch.no_grad():
            teacher = families.encode(self.teacher, batch.source_ids, batch.source_mask, layers=True)
        is_token = batch.source_mask.bool()
        hidden = layerwise_hidden_mse(
            [states[is_token] for states in student.layers],
            [teacher.layers[layer][is_token] for layer in self.layer_plan.supervised_encoder],
            self.loss.normalize_hidden,
        )
        return student.last_hidden_state, scales["encoder_hidden"] * hidden, {"encoder_hidden": hidden.detach()}

    def _output_loss(
        self, batch: MicroBatch, hidden: Tensor, teacher_hidden: Tensor | None, scales: dict[str, float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of the output layer, and the sums of cross-entropy and KL divergence."""
        targets = OutputTargets(
            labels=batch.labels.flatten()[batch.token_positions],
            ce_weight=scales["data"],
            label_smoothing=self.loss.label_smoothing,
            kl_weight=scales.get("logits", 0.0),
            temperature=self.loss.temperature,
            teacher_hidden=teacher_hidden if "logits" in scales else None,
            teacher_lm_head=self._teacher_lm_head,
        )
        parameters = families.trainable_lm_head_parameters(self.student)
        return output_loss(hidden, self._lm_head, targets, self.student.config.vocab_size, parameters)

    def _attention_loss(self, batch: MicroBatch, student_maps: AttentionMaps, teacher_maps: AttentionMaps) -> Tensor:
        """The attention term, summed over layers, self-attention and cross-attention."""
        assert self.layer_plan is not None
        token_mask = batch.labels != -100
        num_keys = (token_mask.sum(-1), batch.source_mask.sum(-1))
        layers = zip(student_maps, self.layer_plan.supervised_decoder, strict=True)
        losses = [
            attention_mse(student, teacher, token_mask, keys)
            for layer_maps, teacher_layer in layers
            for student, teacher, keys in zip(layer_maps, teacher_maps[teacher_layer], num_keys, strict=True)
        ]
        return torch.stack(losses).sum()

    def _teacher_states(
        self, batch: MicroBatch, encoder_states: Tensor, with_attentions: bool
    ) -> tuple[dict[int, Tensor], AttentionMaps]:
        """Outputs of the teacher's decoder at `layers_needed`, [tokens, width] by layer; and its attention maps.

        Attention maps are not cached: for them the teacher's decoder runs, on cached encoder states where available.
        """
        cached_states = {layer: from_storage(states, torch.float32) for layer, states in batch.teacher_states.items()}
        if cached_states and not with_attentions:
            return cached_states, ()
        output = self._run_teacher_decoder(batch, encoder_states, layers=not cached_states, attentions=with_attentions)
        states = cached_states or {
            layer: select_tokens(output.layers[layer], batch.token_positions) for layer in self.layers_needed
        }
        return states, output.attentions

    @torch.no_grad()
    def _run_teacher_decoder(self, batch: MicroBatch, encoder_states: Tensor, **outputs: bool) -> families.StackOutputs:
        """Run the teacher's decoder on a micro-batch; `encoder_states` are the student's encoder states."""
        assert self.teacher is not None
        if not self.encoder_shared:
            # The teacher's decoder attends to the teacher's encoder, never to the student's.
            assert batch.source_ids is not None
            encoder_states = families.encode(self.teacher, batch.source_ids, batch.source_mask).last_hidden_state
        decoder_ids = families.shift_right(self.teacher, batch.labels)
        return families.decode(self.teacher, decoder_ids, encoder_states, batch.source_mask, **outputs)

    def _lm_head(self, hidden: Tensor) -> Tensor:
        return families.lm_head(self.student, hidden, self.lm_head_weight)

    @torch.no_grad()
    def _teacher_lm_head(self, hidden: Tensor) -> Tensor:
        if self.lm_head_shared:
            return families.lm_head(self.student, hidden.to(self.student.dtype), self.lm_head_weight)
        assert self.teacher is not None
        return families.lm_head(self.teacher, hidden.to(self.teacher.dtype))


def select_tokens(states: Tensor, token_positions: Tensor) -> Tensor:
    """The real tokens of states [rows, tokens, width], as [real tokens, width]."""
    return states.flatten(0, 1).index_select(0, token_positions)
