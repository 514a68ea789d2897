"""The cross-entropy of sources given labels, by a model of the opposite direction.

The cross-entropy is low where a label has the meaning of its source.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from raydistill.data.batching import bucket_by_length
from raydistill.models import families
from raydistill.models.loading import load_config, load_model
from raydistill.models.tensors import make_attention_mask, pad_to_tensor
from raydistill.models.tokenization import Languages, load_tokenizer, tokenize_sources, tokenize_targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_TOKENS = 512  # of a label and of a source; longer texts are cut
BATCH_TOKENS = 4096  # padded tokens of a batch of sources
CHUNK_TOKENS = 512  # tokens whose logits are in memory at a time


class ReverseModel:
    """A model that was fine-tuned in the opposite direction, such as from the teacher's target language to its source.

    Args:
        checkpoint: A folder or a hub name.
        languages: Source and target of the teacher, where the tokenizer needs them; they are exchanged.
    """

    def __init__(self, checkpoint: str | Path, languages: Languages | None = None) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model: PreTrainedModel = torch.nn.Module.to(load_model(checkpoint), device).eval()
        self._tokenizer = load_tokenizer(checkpoint, (languages[1], languages[0]) if languages else None)
        self._max_tokens = min(MAX_TOKENS, families.max_positions(load_config(checkpoint)) or MAX_TOKENS)

    def losses(self, labels: list[str], sources: list[str]) -> list[float]:
        """The cross-entropy of each source given its label, in nats per token of the source."""
        inputs = tokenize_sources(self._tokenizer, labels, self._max_tokens)
        outputs = tokenize_targets(self._tokenizer, sources, self._max_tokens)
        lengths = [max(map(len, pair)) for pair in zip(inputs, outputs, strict=True)]
        result = [0.0] * len(labels)
        with torch.inference_mode():
            for batch in bucket_by_length(lengths, BATCH_TOKENS):
                losses = self._batch_losses([inputs[i] for i in batch], [outputs[i] for i in batch])
                for i, loss in zip(batch, losses.tolist(), strict=True):
                    result[i] = loss
        return result

    def _batch_losses(self, inputs: list[list[int]], outputs: list[list[int]]) -> Tensor:
        """The mean cross-entropy of each row, [rows]."""
        model = self._model
        ids = pad_to_tensor(inputs, model.config.pad_token_id).to(model.device)
        mask = make_attention_mask(inputs).to(model.device)
        targets = pad_to_tensor(outputs, -100).to(model.device)
        states = families.encode(model, ids, mask).last_hidden_state
        hidden = families.decode(model, families.shift_right(model, targets), states, mask).last_hidden_state
        is_token = targets != -100
        pairs = zip(hidden[is_token].split(CHUNK_TOKENS), targets[is_token].split(CHUNK_TOKENS), strict=True)
        losses = torch.cat([F.cross_entropy(families.lm_head(model, h).float(), t, reduction="none") for h, t in pairs])
        rows = is_token.nonzero()[:, 0]
        totals = torch.zeros(len(inputs), device=model.device).index_add_(0, rows, losses)
        return totals / is_token.sum(dim=1)
