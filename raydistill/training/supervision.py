"""What a micro-batch is taught: runs the student, gets the teacher's side from the cache or live, returns loss sums."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from raydistill.config.run import Loss, Method
from raydistill.data.batches import Examples
from raydistill.model import forms
from raydistill.model.shrink import Plan
from raydistill.training.losses import hidden_mse, output_losses
from raydistill.training.teacher_cache import Ragged, source_tensors, target_tensor


@dataclass(frozen=True)
class Supervision:
    """Everything the loss of a batch of examples depends on.

    `encoder_shared`: the student's encoder and embeddings are the teacher's and frozen, so encoder states may come
    from `encoded` (their store) or from one pass without gradients. `decoded`: the teacher decoder's stores by layer.
    `teacher` may be None where no teacher takes part (sft and pl).
    """

    student: PreTrainedModel
    teacher: PreTrainedModel | None
    examples: Examples
    method: Method
    loss: Loss
    plan: Plan | None = None
    encoder_shared: bool = False
    encoded: Ragged | None = None
    decoded: dict[int, Ragged] = field(default_factory=dict)

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
        return weights

    def alphas(self) -> dict[str, float]:
        """The coefficient of each term."""
        loss = self.loss
        return {
            "data": loss.alpha_data,
            "logits": loss.alpha_logits,
            "hidden": loss.alpha_hidden,
            "encoder_hidden": loss.alpha_hidden,
        }

    def sums(self, batch: Sequence[int]) -> dict[str, Tensor]:
        """The sum of each loss term over a micro-batch of examples."""
        kd = self.method == "kd"
        labels = target_tensor(self.student, [self.examples.targets[i] for i in batch])
        encoded, mask, terms = self._encoded(batch)
        hidden_wanted = kd and self.loss.alpha_hidden > 0
        ours = forms.decode(self.student, forms.shift_right(self.student, labels), encoded, mask, layers=hidden_wanted)
        real = labels != -100
        theirs = self._teacher_layers(batch, labels, encoded, mask) if kd else {}
        last = max(theirs) if theirs else None
        ce, kl = output_losses(
            ours.last[real],
            lambda h: forms.head(self.student, h),
            labels[real],
            smoothing=self.loss.label_smoothing,
            teacher_hidden=theirs[last] if last is not None and self.loss.alpha_logits > 0 else None,
            teacher_head=self._teacher_head,
            temperature=self.loss.temperature,
            vocabulary=self.student.config.vocab_size,
        )
        terms["data"] = ce
        if kl is not None:
            terms["logits"] = kl
        if hidden_wanted and self.plan is not None:
            pairs = zip(ours.layers, self.plan.supervised_decoder, strict=True)
            terms["hidden"] = torch.stack(
                [hidden_mse(layer[real], theirs[phi], self.loss.normalize_hidden) for layer, phi in pairs]
            ).sum()
        return terms

    @property
    def layers_needed(self) -> list[int]:
        """The teacher decoder layers that this run is supervised by; the last one gives the logits."""
        if self.method != "kd" or self.plan is None or self.teacher is None:
            return []
        last = forms.depths(self.teacher.config)[1] - 1
        hidden = self.plan.supervised_decoder if self.loss.alpha_hidden > 0 else []
        return sorted({*hidden, last})

    @property
    def _encoder_taught(self) -> bool:
        return not self.encoder_shared and self.plan is not None and not self.plan.encoder_complete

    def _teacher_head(self, hidden: Tensor) -> Tensor:
        assert self.teacher is not None
        return forms.head(self.teacher, hidden.to(self.teacher.dtype))

    def _encoded(self, batch: Sequence[int]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The student's encoder states and their mask; with a taught encoder, its hidden loss too."""
        rows = [self.examples.rows[i] for i in batch]
        if self.encoder_shared and self.encoded is not None:
            states, mask = (t.to(self.student.device) for t in self.encoded.padded(rows))
            return states.to(self.student.dtype), mask, {}
        ids, mask = source_tensors(self.student, [self.examples.sources[row] for row in rows])
        if self.encoder_shared:
            with torch.no_grad():
                return forms.encode(self.student, ids, mask).last, mask, {}
        taught = self.method == "kd" and self._encoder_taught and self.loss.alpha_hidden > 0
        ours = forms.encode(self.student, ids, mask, layers=taught)
        terms = {}
        if taught and self.teacher is not None and self.plan is not None:
            with torch.no_grad():
                theirs = forms.encode(self.teacher, ids, mask, layers=True).layers
            real = mask.bool()
            pairs = zip(ours.layers, self.plan.supervised_encoder, strict=True)
            terms["encoder_hidden"] = torch.stack(
                [hidden_mse(layer[real], theirs[phi][real], self.loss.normalize_hidden) for layer, phi in pairs]
            ).sum()
        return ours.last, mask, terms

    def _teacher_layers(self, batch: Sequence[int], labels: Tensor, encoded: Tensor, mask: Tensor) -> dict[int, Tensor]:
        """The teacher decoder's outputs at the layers needed, real tokens only, [tokens, width] each."""
        if self.decoded:
            return {layer: self.decoded[layer].flat(batch).to(self.student.device) for layer in self.layers_needed}
        assert self.teacher is not None
        real = labels != -100
        with torch.no_grad():
            if not self.encoder_shared:
                # The teacher's decoder reads the teacher's encoder, never a student's.
                ids, mask = source_tensors(self.teacher, [self.examples.sources[self.examples.rows[i]] for i in batch])
                encoded = forms.encode(self.teacher, ids, mask).last
            decoder_ids = forms.shift_right(self.teacher, labels)
            layers = forms.decode(self.teacher, decoder_ids, encoded, mask, layers=True).layers
        return {layer: layers[layer][real] for layer in self.layers_needed}
