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
from raydistill.models.shrinking import Plan
from raydistill.teacher_cache.builder import Ragged, mask_of, padded
from raydistill.training.losses import Targets, attention_mse, cosine_distance, hidden_mse, output_loss

# Of each decoder layer the weights of its self-attention and of its attention to the source (`forms.States`).
Maps = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class Batch:
    """A micro-batch as tensors: all that is read from memory and disk, nothing that a model works out.

    `labels` [rows, target tokens], -100 where there is none; `real` [tokens], where in the flattened labels a token
    stands, known before so that a GPU is not asked; `mask` [rows, source tokens]; `ids` the source tokens where an
    encoder has to run, else None; `encoded` the cached encoder states, else None; `taught` the teacher decoder's cached
    outputs by layer, real tokens only, [tokens, width] each.
    """

    labels: Tensor
    real: Tensor
    mask: Tensor
    ids: Tensor | None = None
    encoded: Tensor | None = None
    taught: dict[int, Tensor] = field(default_factory=dict)

    def to(self, device: str) -> "Batch":
        """The same on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """The same in memory from which a GPU copies without waiting."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(
            change(self.labels),
            change(self.real),
            change(self.mask),
            None if self.ids is None else change(self.ids),
            None if self.encoded is None else change(self.encoded),
            {layer: change(states) for layer, states in self.taught.items()},
        )


@dataclass(frozen=True)
class Supervision:
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
    plan: Plan | None = None
    encoder_shared: bool = False
    head_shared: bool = False
    encoded: Ragged | None = None
    decoded: dict[int, Ragged] = field(default_factory=dict)
    table: Tensor | None = None

    def weights(self, batch: Sequence[int]) -> dict[str, float]:
        """The global batch's weight of each term, known from lengths alone, so that no worker has to ask another."""
        tokens = float(self.examples.target_tokens(batch))
        weights = {"data": tokens}
        if self.method == "kd" and self.loss.alpha_logits > 0:
            weights["logits"] = tokens
        if self.method == "kd" and self.loss.alpha_hidden > 0:
            weights["hidden"] = tokens
            if self._encoder_taught:
                weights["encoder_hidden"] = float(self.examples.source_tokens(batch))
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

    def read(self, batch: Sequence[int]) -> Batch:
        """The tensors of a micro-batch of examples, in the main memory; safe in another thread."""
        rows = [self.examples.rows[i] for i in batch]
        labels = padded([self.examples.targets[i] for i in batch], -100)
        real = (labels != -100).flatten().nonzero()[:, 0]
        taught = {layer: self.decoded[layer].flat(batch) for layer in self.layers_needed} if self.decoded else {}
        sources = [self.examples.sources[row] for row in rows]
        if self.encoder_shared and self.encoded is not None:
            return Batch(labels, real, mask_of(sources), None, self.encoded.padded(rows), taught)
        return Batch(labels, real, mask_of(sources), padded(sources, self.student.config.pad_token_id), None, taught)

    def terms(self, batch: Batch, scales: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch, the terms' sums times their `scales`; and each term's sum, without gradient."""
        hidden_wanted = "hidden" in scales
        encoded, loss, sums = self._encode(batch, scales)
        ours = families.decode(
            self.student,
            families.shift_right(self.student, batch.labels),
            encoded,
            batch.mask,
            layers=hidden_wanted,
            attentions="attention" in scales,
        )
        theirs, maps = self._taught(batch, encoded, "attention" in scales) if self.method == "kd" else ({}, ())
        last = _picked(ours.last, batch.real)
        targets = Targets(
            labels=batch.labels.flatten()[batch.real],
            data=scales["data"],
            smoothing=self.loss.label_smoothing,
            logits=scales.get("logits", 0.0),
            temperature=self.loss.temperature,
            teacher=theirs[max(theirs)] if "logits" in scales else None,
            teacher_head=self._teacher_head,
        )
        output, sums["data"], divergence = output_loss(
            last, self._head, targets, self.student.config.vocab_size, families.head_parameters(self.student)
        )
        loss = loss + output
        if "logits" in scales:
            sums["logits"] = divergence
        if hidden_wanted and self.plan is not None:
            pairs = zip(ours.layers, self.plan.supervised_decoder, strict=True)
            hidden = torch.stack(
                [hidden_mse(_picked(own, batch.real), theirs[phi], self.loss.normalize_hidden) for own, phi in pairs]
            ).sum()
            loss, sums["hidden"] = loss + scales["hidden"] * hidden, hidden.detach()
        if "cosine" in scales:
            cosine = cosine_distance(last, theirs[max(theirs)])
            loss, sums["cosine"] = loss + scales["cosine"] * cosine, cosine.detach()
        if "attention" in scales:
            attention = self._attention(batch, ours.attentions, maps)
            loss, sums["attention"] = loss + scales["attention"] * attention, attention.detach()
        return loss, sums

    @property
    def layers_needed(self) -> list[int]:
        """The teacher decoder layers that this run is supervised by; the last one gives the logits."""
        if self.method != "kd" or self.plan is None or self.teacher is None:
            return sorted(self.decoded)
        last = families.depths(self.teacher.config)[1] - 1
        hidden = self.plan.supervised_decoder if self.loss.alpha_hidden > 0 else []
        return sorted({*hidden, last})

    @property
    def _encoder_taught(self) -> bool:
        return not self.encoder_shared and self.plan is not None and not self.plan.encoder_complete

    def _head(self, hidden: Tensor) -> Tensor:
        return families.head(self.student, hidden, self.table)

    @torch.no_grad()
    def _teacher_head(self, hidden: Tensor) -> Tensor:
        if self.head_shared:
            return families.head(self.student, hidden.to(self.student.dtype), self.table)
        assert self.teacher is not None
        return families.head(self.teacher, hidden.to(self.teacher.dtype))

    def _encode(self, batch: Batch, scales: dict[str, float]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The student's encoder states; with a taught encoder, its hidden loss too."""
        nothing = torch.zeros((), device=batch.labels.device)
        if batch.encoded is not None:
            # Under autocast the decoder takes them as they are.
            cast = torch.is_autocast_enabled(batch.encoded.device.type)
            return batch.encoded if cast else batch.encoded.to(self.student.dtype), nothing, {}
        assert batch.ids is not None
        if self.encoder_shared:
            with torch.no_grad():
                return families.encode(self.student, batch.ids, batch.mask).last, nothing, {}
        taught = "encoder_hidden" in scales
        ours = families.encode(self.student, batch.ids, batch.mask, layers=taught)
        if not taught:
            return ours.last, nothing, {}
        assert self.teacher is not None
        assert self.plan is not None
        with torch.no_grad():
            theirs = families.encode(self.teacher, batch.ids, batch.mask, layers=True).layers
        real = batch.mask.bool()
        pairs = zip(ours.layers, self.plan.supervised_encoder, strict=True)
        hidden = torch.stack(
            [hidden_mse(layer[real], theirs[phi][real], self.loss.normalize_hidden) for layer, phi in pairs]
        ).sum()
        return ours.last, scales["encoder_hidden"] * hidden, {"encoder_hidden": hidden.detach()}

    def _taught(self, batch: Batch, encoded: Tensor, attentions: bool) -> tuple[dict[int, Tensor], Maps]:
        """The teacher decoder's outputs at the layers needed, real tokens only, [tokens, width] each; and its maps.

        Maps, where asked for, are in no cache: the teacher's decoder runs live, on the cached encoder states if any.
        """
        if batch.taught and not attentions:
            return batch.taught, ()
        found = self._teacher_decoder(batch, encoded, layers=not batch.taught, attentions=attentions)
        return batch.taught or {n: _picked(found.layers[n], batch.real) for n in self.layers_needed}, found.attentions

    def _attention(self, batch: Batch, ours: Maps, theirs: Maps) -> Tensor:
        """The attention maps' loss, summed over layers and both kinds of attention."""
        assert self.plan is not None
        real = batch.labels != -100
        pairs = zip(ours, self.plan.supervised_decoder, strict=True)
        found = [
            attention_mse(own, taught, real, keys)
            for layer, phi in pairs
            for own, taught, keys in zip(layer, theirs[phi], (real.sum(-1), batch.mask.sum(-1)), strict=True)
        ]
        return torch.stack(found).sum()

    @torch.no_grad()
    def _teacher_decoder(self, batch: Batch, encoded: Tensor, **wanted: bool) -> families.States:
        """The teacher's decoder, run on a micro-batch; `encoded` are the student's encoder states."""
        assert self.teacher is not None
        if not self.encoder_shared:
            # The teacher's decoder reads the teacher's encoder, never a student's.
            assert batch.ids is not None
            encoded = families.encode(self.teacher, batch.ids, batch.mask).last
        return families.decode(
            self.teacher, families.shift_right(self.teacher, batch.labels), encoded, batch.mask, **wanted
        )


def _picked(states: Tensor, real: Tensor) -> Tensor:
    """Of states [rows, tokens, width] the `real` ones, [real tokens, width]."""
    return states.flatten(0, 1).index_select(0, real)
