"""Calibration rows: the training examples on which units and layers of a teacher are compared before training."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from raydistill.data.batching import Examples, bucket_by_length
from raydistill.models.tensors import make_attention_mask, pad_to_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CALIBRATION_ROWS = 256
BATCH_TOKENS = 8192  # padded source tokens of a batch


@dataclass(frozen=True)
class Calibration:
    """Some examples of a training set: `rows` are their indices."""

    examples: Examples
    rows: list[int]

    @classmethod
    def of(cls, examples: Examples, max_rows: int = CALIBRATION_ROWS) -> "Calibration":
        """At most `max_rows` examples at equal distances, the same examples at every call."""
        count = min(max_rows, len(examples))
        return cls(examples, [i * len(examples) // count for i in range(count)])

    def batches(self) -> Iterator[list[int]]:
        """Indices of examples in batches of sources of similar lengths."""
        for positions in bucket_by_length([len(self._source(row)) for row in self.rows], BATCH_TOKENS):
            yield [self.rows[position] for position in positions]

    def tensors(self, batch: Sequence[int], model: "PreTrainedModel") -> tuple[Tensor, Tensor, Tensor]:
        """Source ids and their attention mask [rows, source tokens], and labels [rows, target tokens].

        Padding is -100 in the labels. The tensors are on the device of the model.
        """
        sources = [self._source(row) for row in batch]
        ids = pad_to_tensor(sources, model.config.pad_token_id)
        labels = pad_to_tensor([self.examples.targets[row] for row in batch], -100)
        return ids.to(model.device), make_attention_mask(sources).to(model.device), labels.to(model.device)

    def _source(self, row: int) -> list[int]:
        return self.examples.sources[self.examples.source_indices[row]]
