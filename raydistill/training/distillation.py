"""What a micro-batch is taught: its tensors are read ahead, the student is run on them, and the loss terms come out.

The teacher's side is read from the cache, or worked out live where the cache does not hold it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from raydistill.config.run import Loss, Method
from raydistill.data.batching import Examples
from raydistill.models import families
from raydistill.models.shrinking import LayerPlan
from raydistill.models.tensors import make_attention_mask, pad_to_tensor
from raydistill.teacher_cache.reader import RaggedArray
from raydistill.training.losses import OutputTargets, attention_mse, cosine_distance, hidden_mse, output_loss

# Of each decoder layer the weights of its self-attention and of its attention to the source (`forms.States`).
AttentionMaps = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch as tensors: all that is read from memory and disk, nothing that a model works out.

    `labels` [rows, target tokens], -100 where there is none; `real` [tokens], where in the flattened labels a token
    stands, known before so that a GPU is not asked; `mask` [rows, source tokens]; `ids` the source tokens where an
    encoder has to run, else None; `encoded` the cached encoder states, else None; `taught` the teacher decoder's cached
    outputs by layer, real tokens only, [tokens, width] each.
    """

    labels: Tensor
    token_positions: Tensor
    source_mask: Tensor
    source_ids: Tensor | None = None
    encoder_states: Tensor | None = None
    teacher_states: dict[int, Tensor] = field(default_factory=dict)

    def to(self, device: str) -> "MicroBatch":
        """The same on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "MicroBatch":
        """The same in memory from which a GPU copies without waiting."""
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
    """Everything the loss of a batch of examples depends on.

    `encoder_shared`: the student's encoder and embeddings are the teacher's and frozen, so encoder states may come
    from `encoded` (their store) or from one pass without gradients. `head_shared`: the output head is the teacher's
    and frozen, so it serves for both. `decoded`: the teacher decoder's stores by layer. `table`: a copy of the frozen
    output embedding in the precision of training, so that it is not cast anew for every chunk. `teacher` may be None
    where no teacher has to run.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel | None
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
        """The global batch's weight of each term, known from lengths alone, so that no worker has to ask another."""
        tokens = float(self.examples.count_target_tokens(batch))
        weights = {"data": tokens}
        if self.method == "kd" and self.loss.alpha_logits > 0:
            weights["logits"] = tokens
        if self.method == "kd" and self.loss.alpha_hidden > 0:
            weights["hidden"] = tokens
            if self._encoder_supervised:
                weights["encoder_hidden"] = float(self.examples.count_source_tokens(batch))
        if self.method == "kd" and self.loss.alpha_attention > 0:
            weights["attention"] = tokens
        if self.method == "kd" and self.loss.alpha_cosine > 0:
            weights["cosine"] = tokens
        return weights

    def alphas(self) -> dict[str, float]:
        """The coefficient of each term."""
        loss = self.loss
        return {
            "data": loss.alpha_data,
            "logits": loss.alpha_logits,
            "hidden": loss.alpha_hidden,
            "encoder_hidden": loss.alpha_hidden,
            "attention": loss.alpha_attention,
            "cosine": loss.alpha_cosine,
        }

    def read_batch(self, batch: Sequence[int]) -> MicroBatch:
        """The tensors of a micro-batch of examples, in the main memory; safe in another thread."""
        rows = [self.examples.source_indices[i] for i in batch]
        labels = pad_to_tensor([self.examples.targets[i] for i in batch], -100)
        real = (labels != -100).flatten().nonzero()[:, 0]
        taught = (
            {layer: self.cached_decoder_states[layer].read_flat(batch) for layer in self.layers_needed}
            if self.cached_decoder_states
            else {}
        )
        sources = [self.examples.sources[row] for row in rows]
        if self.encoder_shared and self.cached_encoder_states is not None:
            return MicroBatch(
                labels, real, make_attention_mask(sources), None, self.cached_encoder_states.read_padded(rows), taught
            )
        return MicroBatch(
            labels,
            real,
            make_attention_mask(sources),
            pad_to_tensor(sources, self.student.config.pad_token_id),
            None,
            taught,
        )

    def loss_terms(self, batch: MicroBatch, scales: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch, the terms' sums times their `scales`; and each term's sum, without gradient."""
        hidden_wanted = "hidden" in scales
        encoded, loss, sums = self._encode_with_loss(batch, scales)
        ours = families.decode(
            self.student,
            families.shift_right(self.student, batch.labels),
            encoded,
            batch.source_mask,
            layers=hidden_wanted,
            attentions="attention" in scales,
        )
        theirs, maps = self._teacher_states(batch, encoded, "attention" in scales) if self.method == "kd" else ({}, ())
        last = select_tokens(ours.last_hidden_state, batch.token_positions)
        targets = OutputTargets(
            labels=batch.labels.flatten()[batch.token_positions],
            ce_weight=scales["data"],
            label_smoothing=self.loss.label_smoothing,
            kl_weight=scales.get("logits", 0.0),
            temperature=self.loss.temperature,
            teacher_hidden=theirs[max(theirs)] if "logits" in scales else None,
            teacher_lm_head=self._teacher_lm_head,
        )
        output, sums["data"], divergence = output_loss(
            last,
            self._lm_head,
            targets,
            self.student.config.vocab_size,
            families.trainable_lm_head_parameters(self.student),
        )
        loss = loss + output
        if "logits" in scales:
            sums["logits"] = divergence
        if hidden_wanted and self.layer_plan is not None:
            pairs = zip(ours.layers, self.layer_plan.supervised_decoder, strict=True)
            hidden = torch.stack(
                [
                    hidden_mse(select_tokens(own, batch.token_positions), theirs[phi], self.loss.normalize_hidden)
                    for own, phi in pairs
                ]
            ).sum()
            loss, sums["hidden"] = loss + scales["hidden"] * hidden, hidden.detach()
        if "cosine" in scales:
            cosine = cosine_distance(last, theirs[max(theirs)])
            loss, sums["cosine"] = loss + scales["cosine"] * cosine, cosine.detach()
        if "attention" in scales:
            attention = self._attention_loss(batch, ours.attentions, maps)
            loss, sums["attention"] = loss + scales["attention"] * attention, attention.detach()
        return loss, sums

    @property
    def layers_needed(self) -> list[int]:
        """The teacher decoder layers that this run is supervised by; the last one gives the logits."""
        if self.method != "kd" or self.layer_plan is None or self.teacher is None:
            return sorted(self.cached_decoder_states)
        last = families.num_layers(self.teacher.config)[1] - 1
        hidden = self.layer_plan.supervised_decoder if self.loss.alpha_hidden > 0 else []
        return sorted({*hidden, last})

    @property
    def _encoder_supervised(self) -> bool:
        return not self.encoder_shared and self.layer_plan is not None and not self.layer_plan.copies_full_encoder

    def _lm_head(self, hidden: Tensor) -> Tensor:
        return families.lm_head(self.student, hidden, self.lm_head_weight)

    @torch.no_grad()
    def _teacher_lm_head(self, hidden: Tensor) -> Tensor:
        if self.lm_head_shared:
            return families.lm_head(self.student, hidden.to(self.student.dtype), self.lm_head_weight)
        assert self.teacher is not None
        return families.lm_head(self.teacher, hidden.to(self.teacher.dtype))

    def _encode_with_loss(
        self, batch: MicroBatch, scales: dict[str, float]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The student's encoder states; with a taught encoder, its hidden loss too."""
        nothing = torch.zeros((), device=batch.labels.device)
        if batch.encoder_states is not None:
            # Under autocast the decoder takes them as they are.
            cast = torch.is_autocast_enabled(batch.encoder_states.device.type)
            return batch.encoder_states if cast else batch.encoder_states.to(self.student.dtype), nothing, {}
        assert batch.source_ids is not None
        if self.encoder_shared:
            with torch.no_grad():
                return families.encode(self.student, batch.source_ids, batch.source_mask).last_hidden_state, nothing, {}
        taught = "encoder_hidden" in scales
        ours = families.encode(self.student, batch.source_ids, batch.source_mask, layers=taught)
        if not taught:
            return ours.last_hidden_state, nothing, {}
        assert self.teacher is not None
        assert self.layer_plan is not None
        with torch.no_grad():
            theirs = families.encode(self.teacher, batch.source_ids, batch.source_mask, layers=True).layers
        real = batch.source_mask.bool()
        pairs = zip(ours.layers, self.layer_plan.supervised_encoder, strict=True)
        hidden = torch.stack(
            [hidden_mse(layer[real], theirs[phi][real], self.loss.normalize_hidden) for layer, phi in pairs]
        ).sum()
        return ours.last_hidden_state, scales["encoder_hidden"] * hidden, {"encoder_hidden": hidden.detach()}

    def _teacher_states(
        self, batch: MicroBatch, encoder_states: Tensor, with_attentions: bool
    ) -> tuple[dict[int, Tensor], AttentionMaps]:
        """The teacher decoder's outputs at the layers needed, real tokens only, [tokens, width] each; and its maps.

        Maps, where asked for, are in no cache: the teacher's decoder runs live, on the cached encoder states if any.
        """
        if batch.teacher_states and not with_attentions:
            return batch.teacher_states, ()
        found = self._run_teacher_decoder(
            batch, encoder_states, layers=not batch.teacher_states, attentions=with_attentions
        )
        return batch.teacher_states or {
            n: select_tokens(found.layers[n], batch.token_positions) for n in self.layers_needed
        }, found.attentions

    def _attention_loss(self, batch: MicroBatch, student_maps: AttentionMaps, teacher_maps: AttentionMaps) -> Tensor:
        """The attention maps' loss, summed over layers and both kinds of attention."""
        assert self.layer_plan is not None
        real = batch.labels != -100
        pairs = zip(student_maps, self.layer_plan.supervised_decoder, strict=True)
        found = [
            attention_mse(own, taught, real, keys)
            for layer, phi in pairs
            for own, taught, keys in zip(
                layer, teacher_maps[phi], (real.sum(-1), batch.source_mask.sum(-1)), strict=True
            )
        ]
        return torch.stack(found).sum()

    @torch.no_grad()
    def _run_teacher_decoder(self, batch: MicroBatch, encoder_states: Tensor, **outputs: bool) -> families.StackOutputs:
        """The teacher's decoder, run on a micro-batch; `encoder_states` are the student's encoder states."""
        assert self.teacher is not None
        if not self.encoder_shared:
            # The teacher's decoder reads the teacher's encoder, never a student's.
            assert batch.source_ids is not None
            encoder_states = families.encode(self.teacher, batch.source_ids, batch.source_mask).last_hidden_state
        return families.decode(
            self.teacher, families.shift_right(self.teacher, batch.labels), encoder_states, batch.source_mask, **outputs
        )


def select_tokens(states: Tensor, token_positions: Tensor) -> Tensor:
    """Of states [rows, tokens, width] the `token_positions` ones, [real tokens, width]."""
    return states.flatten(0, 1).index_select(0, token_positions)
