"""The reference engine: `generate()` of `transformers`, which holds the source's keys and values once per row.

`generate()` gives every beam of a row a copy of them, copies all at every token where beams change their order, and
reads all. Here the beams of a row are so many queries of the same text.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from raydistill.inference.ctranslate2_conversion import sources_of, torch_threads
from raydistill.inference.decoding import (
    Beam,
    Hypothesis,
    Progress,
    checked,
    fixed_length,
    made_up,
    text_of,
    write_longest_first,
)

TORCH_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# generate() tells a hypothesis's score only where it keeps the fp32 log-probabilities of the whole vocabulary at every
# step: 39 GB for mBART (250,000 words), 128 rows of 5 beams and 61 tokens. What one call may keep, where it runs:
KEPT_BYTES = {"cpu": 2**30, "cuda": 2**34}


SHARED_SOURCE = "raydistill_shared_source"


class _SourceCache(transformers.DynamicCache):
    """Keys and values of the source, [rows, heads, tokens, head size]: of a row's beams, which are alike, the first."""

    def __init__(self, beams: int) -> None:
        super().__init__()
        self.beams = beams

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().update(key_states[:: self.beams], value_states[:: self.beams], layer_idx, *args, **kwargs)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Leave them: beams change places within their row only."""


def _shared_source_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """torch's attention, [rows * beams, queries, heads, head size]; `key` and `value` may be of rows only."""
    beams = query.shape[0] // key.shape[0]
    if beams == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    _, heads, queries, size = query.shape
    folded = query.view(-1, beams, heads, queries, size).transpose(1, 2).flatten(2, 3)
    mask = None if attention_mask is None else attention_mask[::beams, :, :1]  # of the source: alike for all queries
    out, _ = sdpa_attention_forward(module, folded, key, value, mask, **{**kwargs, "is_causal": False})
    return out.reshape(-1, queries, heads, size), None


AttentionInterface.register(SHARED_SOURCE, _shared_source_attention)
AttentionMaskInterface.register(SHARED_SOURCE, sdpa_mask)


@contextmanager
def _writing(model: PreTrainedModel) -> Iterator[None]:
    """The model without dropout and, where it uses torch's attention, with a shared source; afterwards as it was."""
    training, attention = model.training, model.config._attn_implementation
    model.eval()
    if attention == "sdpa":
        model.set_attn_implementation(SHARED_SOURCE)
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        model.train(training)


class TransformersEngine:
    """`generate()` of a loaded model, such as a student in training; the model is left in its mode."""

    name = "transformers"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, threads: int | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.threads = threads
        self.generation = model.generation_config
        self.device = str(model.device)
        self.precision = next(name for name, dtype in TORCH_TYPES.items() if dtype == model.dtype)

    def generate(
        self,
        texts: list[str],
        beam: Beam,
        *,
        max_source_tokens: int,
        batch_size: int = 32,
        n_best: int = 1,
        on_progress: Progress | None = None,
    ) -> list[list[Hypothesis]]:
        beam = checked(beam, n_best, self.model.config)
        rows = sources_of(self.tokenizer, texts, max_source_tokens, self.model.config)
        settings = self._settings(beam)
        settings.num_return_sequences = n_best
        size = min(batch_size, _rows_within(KEPT_BYTES[self.model.device.type], beam, self.model.config.vocab_size))
        return write_longest_first(
            texts, rows, size, lambda batch: self._batch(batch, settings, beam.length_penalty), on_progress
        )

    def timed(self, source_tokens: int, output_tokens: int, batch: int, beams: int) -> Callable[[], None]:
        rows = made_up(self.tokenizer, self.model.config, source_tokens, batch)
        settings = self._settings(fixed_length(output_tokens, beams))

        def call() -> None:
            self._run(rows, settings)
            if self.model.device.type == "cuda":
                torch.cuda.synchronize(self.model.device)

        return call

    def _settings(self, beam: Beam) -> GenerationConfig:
        """The model's own generation config with the beam's values; nothing is sampled."""
        settings = copy.deepcopy(self.generation)
        searching = beam.beams > 1
        settings.update(
            do_sample=False,
            temperature=None,
            top_k=None,
            top_p=None,
            num_beams=beam.beams,
            length_penalty=beam.length_penalty if searching else None,
            early_stopping=beam.early_stopping if searching else None,
            min_length=beam.min_length,
            max_length=beam.max_length,
            min_new_tokens=None,
            max_new_tokens=None,
            no_repeat_ngram_size=beam.no_repeat_ngram,
            forced_bos_token_id=beam.forced_first,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=not searching,
        )
        return settings

    @torch.inference_mode()
    def _run(self, rows: list[list[int]], settings: GenerationConfig) -> Any:
        batch = self.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self.model.device)
        with torch_threads(self.threads if self.model.device.type == "cpu" else None), _writing(self.model):
            shared = self.model.config._attn_implementation == SHARED_SOURCE
            # Both grow with the decoder's depth; transformers 5.23 would make T5's as deep as its encoder.
            source = _SourceCache(settings.num_beams if shared else 1)
            return self.model.generate(  # type: ignore[operator]
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                generation_config=settings,
                past_key_values=transformers.EncoderDecoderCache(transformers.DynamicCache(), source),
            )

    def _batch(self, rows: list[list[int]], settings: GenerationConfig, penalty: float) -> list[list[Hypothesis]]:
        out = self._run(rows, settings)
        sequences = out.sequences.tolist()
        if settings.num_beams == 1:
            scores = _greedy_scores(out, self.model.config.eos_token_id, penalty)
        else:
            scores = out.sequences_scores.tolist()
        n = settings.num_return_sequences or 1
        padding = self.model.config.pad_token_id
        made = [
            Hypothesis(text_of(self.tokenizer, s), float(x), sum(token != padding for token in s[1:]))
            for s, x in zip(sequences, scores, strict=True)
        ]
        return [made[i : i + n] for i in range(0, len(made), n)]


def _rows_within(kept_bytes: int, beam: Beam, vocabulary: int) -> int:
    """How many rows generate() may take at once, at least 1; beam search keeps scores, greedy search logits too."""
    kept = beam.beams if beam.beams > 1 else 2
    return max(1, kept_bytes // (4 * kept * beam.max_length * vocabulary))


def _greedy_scores(out: Any, end: int, penalty: float) -> list[float]:
    """Each row's scores as beam search counts them: a forced token adds to the length and not to the sum."""
    written = out.sequences[:, -len(out.logits) :]
    steps = zip(out.logits, written.T, strict=True)  # one by one: together they would take their memory again
    chosen = torch.stack([kept.float().log_softmax(-1).gather(-1, w[:, None])[:, 0] for kept, w in steps], dim=1)
    allowed = torch.stack([kept.isfinite().sum(-1) for kept in out.scores], dim=1)
    chosen = chosen.masked_fill(allowed == 1, 0.0)
    ended_before = ((written == end).cumsum(1) - (written == end).long()) > 0
    lengths = (~ended_before).sum(1)
    return (chosen.masked_fill(ended_before, 0.0).sum(1) / lengths**penalty).tolist()
