"""Decoding independent of the engine: search parameters, hypotheses, the `Engine` protocol and shared helpers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from raydistill.config.run import Decoding
from raydistill.config.serving import ThroughputSetting
from raydistill.core.console import ProgressBar
from raydistill.core.errors import UserError
from raydistill.inference.shortlist import Shortlist
from raydistill.models import families, tokenization

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LogFunction = Callable[[str], None]

DEFAULT_NUM_BEAMS = 4
DEFAULT_TARGET_TOKENS = 128  # of a checkpoint that names no length


@dataclass(frozen=True)
class BeamSearchParams:
    """Resolved decoding parameters. Lengths are in tokens and include the start token, as in `generate()`."""

    beams: int
    length_penalty: float
    min_length: int
    max_length: int
    no_repeat_ngram: int
    early_stopping: bool
    forced_bos_token_id: int | None


@dataclass(frozen=True)
class Hypothesis:
    """An output text, its score and its length in tokens, end token included.

    The score is the sum of log-probabilities divided by (tokens, end token included) ** length penalty.
    """

    text: str
    score: float
    num_tokens: int = 0


@dataclass(frozen=True)
class CalibrationRows:
    """Source texts and the decoding used for them; a converted model is validated on these rows."""

    texts: tuple[str, ...]
    beam: BeamSearchParams
    max_source_tokens: int


@dataclass(frozen=True)
class Workload:
    """A fixed-size decoding task for latency measurements: `batch` rows of exactly the given lengths in tokens."""

    source_tokens: int
    output_tokens: int
    batch: int
    beams: int


@dataclass(frozen=True)
class EngineOptions:
    """Options of `open_engine`.

    `precision` is auto, fp32, bf16, fp16, int8_float16 or int8; auto means fp32 on the CPU and bf16 on a GPU.
    `languages` are the (source, target) languages of multilingual models and T5. `source_prefix` is the text before
    every source (default: the checkpoint's own). `cache_dir` holds converted models (default:
    HOME/cache/ctranslate2). With `allow_fallback`, a model that CTranslate2 cannot decode is decoded by
    transformers. `shortlist` is a vocabulary map, which limits the tokens of the outputs (see `inference.shortlist`).

    CTranslate2 decodes `inter_threads` batches at the same time, each with `threads` threads, of up to `batch_tokens`
    source tokens (default: by the batch size in rows, at most 2,400 on a CPU). The transformers engine decodes one
    batch at a time and ignores both.
    """

    device: str = "cpu"
    threads: int = 1
    precision: str = "auto"
    languages: tokenization.Languages | None = None
    source_prefix: str | None = None
    cache_dir: Path | None = None
    allow_fallback: bool = True
    shortlist: Path | None = None
    inter_threads: int = 1
    batch_tokens: int | None = None

    def with_setting(self, setting: ThroughputSetting) -> "EngineOptions":
        """The options with other threads and batches."""
        return replace(
            self,
            threads=setting.intra_threads,
            inter_threads=setting.inter_threads,
            batch_tokens=setting.batch_tokens,
        )


class Engine(Protocol):
    """Generates texts. `name` is ctranslate2 or transformers; `precision` is fp32, bf16, fp16, int8_float16 or int8."""

    name: str
    precision: str
    device: str
    tokenizer: PreTrainedTokenizerBase
    generation_config: GenerationConfig

    def generate(
        self,
        texts: list[str],
        beam: BeamSearchParams,
        *,
        max_source_tokens: int,
        batch_size: int = 32,
        n_best: int = 1,
    ) -> list[list[Hypothesis]]:
        """Return the `n_best` hypotheses of each text, best first, in the order of `texts`.

        A blank text has one empty hypothesis. Sources are truncated to `max_source_tokens` and to the positions of
        the model, outputs to the positions of the model.

        Raises:
            ValueError: `n_best` exceeds the number of beams.
        """

    def make_benchmark_call(self, workload: Workload, texts: Sequence[str] = ()) -> Callable[[], None]:
        """Return a function that decodes rows of the workload's lengths: of `texts`, or random rows without them.

        Raises:
            ValueError: There are no texts, and the engine has a shortlist that depends on the source.
        """


def engine_label(engine: Engine) -> str:
    """Return name and precision of an engine, as records hold them: "ctranslate2 int8"."""
    return f"{engine.name} {engine.precision}"


def resolve_decoding(
    requested: Decoding,
    checkpoint: "PreTrainedModel | GenerationConfig | None",
    preset: Decoding | None,
    max_target_tokens: int,
) -> BeamSearchParams:
    """Return the decoding parameters: the requested value, else the checkpoint's, else the preset's, else a default.

    The checkpoint's values come from its generation config. The defaults are 4 beams, length penalty 1 and
    `max_target_tokens` after the start token. The preset's `max_length` is before the checkpoint's: some checkpoints
    allow several times the length of any target, and a collapsed student would decode that far.

    Raises:
        UserError: The requested `min_length` exceeds `max_length`.
    """
    if checkpoint is None:
        own = GenerationConfig()
    else:
        own = checkpoint if isinstance(checkpoint, GenerationConfig) else checkpoint.generation_config
    preset = preset or Decoding()
    own_max = own.max_length if own.max_new_tokens is None else own.max_new_tokens + 1

    def first(*values: Any) -> Any:
        return next(value for value in values if value is not None)

    max_length = first(requested.max_length, preset.max_length, own_max, max_target_tokens + 1)
    min_length = first(requested.min_length, own.min_length, preset.min_length, 0)
    if min_length > max_length:
        if requested.min_length is not None:
            raise UserError(f"decoding: min_length {min_length} is above max_length {max_length}")
        min_length = max_length
    return BeamSearchParams(
        beams=first(requested.beams, own.num_beams, preset.beams, DEFAULT_NUM_BEAMS),
        length_penalty=float(first(requested.length_penalty, own.length_penalty, preset.length_penalty, 1.0)),
        min_length=min_length,
        max_length=max_length,
        no_repeat_ngram=first(requested.no_repeat_ngram, own.no_repeat_ngram_size, preset.no_repeat_ngram, 0),
        early_stopping=own.early_stopping is True,
        forced_bos_token_id=own.forced_bos_token_id,
    )


def generate_longest_first(
    texts: list[str],
    token_ids: list[list[int]],
    batch_size: int,
    generate_batch: Callable[[list[list[int]]], list[list[Hypothesis]]],
) -> list[list[Hypothesis]]:
    """Call `generate_batch` on `batch_size` rows at a time and return the hypotheses in the order of `texts`.

    Long rows come first, because they need the most memory: the first row of each call is its longest. A blank text is
    not decoded and has one empty hypothesis. Progress is printed if decoding takes longer than 5 s.
    """
    results = [[Hypothesis("", 0.0)] for _ in texts]
    order = sorted((i for i, text in enumerate(texts) if text.strip()), key=lambda i: -len(token_ids[i]))
    total_tokens = sum(len(token_ids[i]) for i in order)
    with closing(ProgressBar("decoding", total_tokens, delayed=True)) as progress:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            for i, hypotheses in zip(indices, generate_batch([token_ids[i] for i in indices]), strict=True):
                results[i] = hypotheses
            progress.advance(sum(len(token_ids[i]) for i in indices), f"{start + len(indices)}/{len(order)} rows")
    return results


def clamp_to_positions(beam: BeamSearchParams, n_best: int, config: Any) -> BeamSearchParams:
    """Return `beam` with its lengths limited to the positions of the model.

    Raises:
        ValueError: `n_best` exceeds the number of beams.
    """
    if n_best > beam.beams:
        raise ValueError(f"n_best {n_best} is more than the {beam.beams} beams")
    limit = families.max_positions(config) or beam.max_length
    max_length = min(beam.max_length, limit)
    return replace(beam, max_length=max_length, min_length=min(beam.min_length, max_length))


def fixed_length_params(workload: Workload) -> BeamSearchParams:
    """Return parameters with which every output has exactly `workload.output_tokens` after the start token."""
    length = workload.output_tokens + 1
    return BeamSearchParams(workload.beams, 1.0, length, length, 0, False, None)


def benchmark_inputs(
    tokenizer: PreTrainedTokenizerBase,
    config: Any,
    workload: Workload,
    texts: Sequence[str],
    shortlist: Shortlist | None,
) -> list[list[int]]:
    """Return the workload's batch of source rows; see `Engine.make_benchmark_call`.

    Texts are truncated to the workload's source tokens; shorter texts are followed by the next text.
    """
    if not texts:
        if shortlist is not None and shortlist.by_source:
            raise ValueError(
                "random rows have no likely translations: time a shortlist that depends on the source on real texts"
            )
        return random_inputs(tokenizer, config, workload)
    length = workload.source_tokens - 1
    tokens = [
        token
        for row in tokenization.tokenize_sources(tokenizer, list(texts), workload.source_tokens)
        for token in row
        if token != config.eos_token_id
    ]
    tokens *= -(-workload.batch * length // len(tokens))
    return [[*tokens[i * length : (i + 1) * length], config.eos_token_id] for i in range(workload.batch)]


def random_inputs(tokenizer: PreTrainedTokenizerBase, config: Any, workload: Workload) -> list[list[int]]:
    """Return the workload's batch of random source rows: ordinary tokens, then the end token; equal at every call.

    Raises:
        ValueError: The model has fewer positions than the workload has source tokens.
    """
    limit = families.max_positions(config)
    if limit is not None and workload.source_tokens > limit:
        raise ValueError(f"{workload.source_tokens} source tokens are more than the model's {limit} positions")
    vocab_size = min(config.vocab_size, len(tokenizer))
    rows = random_token_rows(tokenizer, vocab_size, workload.batch, workload.source_tokens - 1)
    return [[*row, config.eos_token_id] for row in rows]


def random_token_rows(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, num_rows: int, length: int
) -> list[list[int]]:
    """Return rows of random token ids below `vocab_size`, special tokens excluded; equal at every call."""
    special = set(tokenizer.all_special_ids)
    ordinary = [i for i in range(vocab_size) if i not in special]
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(ordinary), (num_rows, length), generator=generator).tolist()
    return [[ordinary[i] for i in row] for row in picks]


def tokenize_and_clamp(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], max_tokens: int, config: Any
) -> list[list[int]]:
    """Return the token ids of source texts, truncated to `max_tokens` and to the positions of the model."""
    limit = families.max_positions(config) or max_tokens
    return tokenization.tokenize_sources(tokenizer, texts, min(max_tokens, limit))


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Set the number of CPU threads of torch inside the block; None leaves the number unchanged."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
