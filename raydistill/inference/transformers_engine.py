"""The reference engine: `generate()` of transformers without copies of the source's keys and values at every token."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from transformers import GenerationConfig, PreTrainedTokenizerBase

from raydistill.inference.decoding import (
    BeamSearchParams,
    Hypothesis,
    Workload,
    benchmark_inputs,
    clamp_to_positions,
    fixed_length_params,
    generate_longest_first,
    tokenize_and_clamp,
    torch_threads,
)
from raydistill.inference.shortlist import Shortlist
from raydistill.models.tokenization import decode_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# To return scores, generate() keeps the fp32 log-probabilities of the whole vocabulary for every step: 39 GB for mBART
# (250,000 tokens), 128 rows, 5 beams and 61 tokens. The limit per call, by device:
MAX_SCORE_BYTES = {"cpu": 2**30, "cuda": 2**34}


class _CrossAttentionCache(transformers.DynamicCache):
    """Keys and values of the source, one copy per beam.

    All beams of a row have equal copies. Beam search changes the order of beams within a row only, so the copies need
    no reordering; `DynamicCache` would copy them at every token.
    """

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Do nothing."""


class _AllowedTokens(transformers.LogitsProcessor):
    """Limits the outputs to some tokens and divides all probability among them, as CTranslate2 does."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        limited = torch.full_like(scores, -torch.inf)
        limited[:, self.ids] = scores[:, self.ids].log_softmax(-1)
        return cast(torch.FloatTensor, limited)


@contextmanager
def _eval_mode(model: "PreTrainedModel") -> Iterator[None]:
    """Disable dropout inside the block."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class TransformersEngine:
    """Generates with a loaded model, such as a student in training; the model's train or eval mode is restored.

    `threads`: CPU threads of torch; None leaves torch's number. `shortlist`: limits the tokens of the outputs.
    """

    name = "transformers"

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: PreTrainedTokenizerBase,
        threads: int | None = None,
        shortlist: Shortlist | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.threads = threads
        self.shortlist = shortlist
        self.generation_config = model.generation_config
        self.device = str(model.device)
        self.precision = next(name for name, dtype in TORCH_DTYPES.items() if dtype == model.dtype)

    def generate(
        self,
        texts: list[str],
        beam: BeamSearchParams,
        *,
        max_source_tokens: int,
        batch_size: int = 32,
        n_best: int = 1,
    ) -> list[list[Hypothesis]]:
        beam = clamp_to_positions(beam, n_best, self.model.config)
        rows = tokenize_and_clamp(self.tokenizer, texts, max_source_tokens, self.model.config)
        settings = self._generation_config(beam)
        settings.num_return_sequences = n_best
        size = min(
            batch_size, _max_batch_rows(MAX_SCORE_BYTES[self.model.device.type], beam, self.model.config.vocab_size)
        )
        return generate_longest_first(
            texts, rows, size, lambda batch: self._generate_batch(batch, settings, beam.length_penalty)
        )

    def make_benchmark_call(self, workload: Workload, texts: Sequence[str] = ()) -> Callable[[], None]:
        rows = benchmark_inputs(self.tokenizer, self.model.config, workload, texts, self.shortlist)
        settings = self._generation_config(fixed_length_params(workload))

        def call() -> None:
            self._call_generate(rows, settings)
            if self.model.device.type == "cuda":
                torch.cuda.synchronize(self.model.device)

        return call

    def _generation_config(self, beam: BeamSearchParams) -> GenerationConfig:
        """Return the model's generation config with the values of `beam` and without sampling."""
        settings = copy.deepcopy(self.generation_config)
        beam_search = beam.beams > 1
        settings.update(
            do_sample=False,
            temperature=None,
            top_k=None,
            top_p=None,
            num_beams=beam.beams,
            length_penalty=beam.length_penalty if beam_search else None,
            early_stopping=beam.early_stopping if beam_search else None,
            min_length=beam.min_length,
            max_length=beam.max_length,
            min_new_tokens=None,
            max_new_tokens=None,
            no_repeat_ngram_size=beam.no_repeat_ngram,
            forced_bos_token_id=beam.forced_bos_token_id,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=not beam_search,
        )
        return settings

    @torch.inference_mode()
    def _call_generate(self, rows: list[list[int]], settings: GenerationConfig) -> Any:
        batch = self.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self.model.device)
        with torch_threads(self.threads if self.model.device.type == "cpu" else None), _eval_mode(self.model):
            # These caches grow with the decoder's layers. By default, transformers 5.23 gives T5's cache as many layers
            # as the encoder has.
            caches = transformers.EncoderDecoderCache(transformers.DynamicCache(), _CrossAttentionCache())
            return self.model.generate(  # type: ignore[operator]
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                generation_config=settings,
                past_key_values=caches,
                logits_processor=transformers.LogitsProcessorList(self._processors(rows)),
            )

    def _processors(self, rows: list[list[int]]) -> list[_AllowedTokens]:
        """Return the processor that applies the shortlist to a batch, if there is a shortlist."""
        if self.shortlist is None:
            return []
        return [_AllowedTokens(torch.from_numpy(self.shortlist.allowed(rows)).to(self.model.device))]

    def _generate_batch(
        self, rows: list[list[int]], settings: GenerationConfig, length_penalty: float
    ) -> list[list[Hypothesis]]:
        out = self._call_generate(rows, settings)
        sequences = out.sequences.tolist()
        if settings.num_beams == 1:
            for processor in self._processors(rows):
                out.logits = tuple(processor(out.sequences, logits.float()) for logits in out.logits)
            scores = _greedy_scores(out, self.model.config.eos_token_id, length_penalty)
        else:
            scores = out.sequences_scores.tolist()
        n = settings.num_return_sequences or 1
        padding = self.model.config.pad_token_id
        hypotheses = [
            Hypothesis(decode_text(self.tokenizer, s), float(x), sum(token != padding for token in s[1:]))
            for s, x in zip(sequences, scores, strict=True)
        ]
        return [hypotheses[i : i + n] for i in range(0, len(hypotheses), n)]


def _max_batch_rows(max_bytes: int, beam: BeamSearchParams, vocab_size: int) -> int:
    """Return the number of rows per call, at least 1, whose scores fit into `max_bytes`.

    Beam search keeps one score per beam, step and token of the vocabulary; greedy search keeps scores and logits.
    """
    values_per_token = beam.beams if beam.beams > 1 else 2
    return max(1, max_bytes // (4 * values_per_token * beam.max_length * vocab_size))


def _greedy_scores(out: Any, eos_token_id: int, length_penalty: float) -> list[float]:
    """Return the score of each row as beam search defines it: a forced token adds to the length, not to the sum."""
    written = out.sequences[:, -len(out.logits) :]
    steps = zip(out.logits, written.T, strict=True)  # step by step: one stacked tensor would double the memory
    log_probs = [logits.float().log_softmax(-1).gather(-1, ids[:, None])[:, 0] for logits, ids in steps]
    chosen = torch.stack(log_probs, dim=1)
    num_allowed = torch.stack([scores.isfinite().sum(-1) for scores in out.scores], dim=1)
    chosen = chosen.masked_fill(num_allowed == 1, 0.0)
    ended_before = ((written == eos_token_id).cumsum(1) - (written == eos_token_id).long()) > 0
    lengths = (~ended_before).sum(1)
    return (chosen.masked_fill(ended_before, 0.0).sum(1) / lengths**length_penalty).tolist()
