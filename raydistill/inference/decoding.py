"""What decoding is, whichever engine does it: the beam, its results, the engine's contract, and what engines share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from raydistill.config.run import Decoding
from raydistill.core.errors import UserError
from raydistill.models import loading

Progress = Callable[[int, int], None]  # rows done, rows in all

DEFAULT_BEAMS = 4


@dataclass(frozen=True)
class Beam:
    """Resolved decoding. Lengths are tokens counted as `generate()` does: the decoder's start token too."""

    beams: int
    length_penalty: float
    min_length: int
    max_length: int
    no_repeat_ngram: int
    early_stopping: bool
    forced_first: int | None


@dataclass(frozen=True)
class Hypothesis:
    """A text, its sum of log-probabilities divided by (tokens written, end included) ** length penalty, its tokens."""

    text: str
    score: float
    tokens: int = 0


@dataclass(frozen=True)
class Sample:
    """A few real rows and how they will be decoded: what a converted model has to prove itself on."""

    texts: tuple[str, ...]
    beam: Beam
    max_source_tokens: int


class Engine(Protocol):
    """Writes texts. `name` is ctranslate2 or transformers, `precision` fp32, bf16, fp16 or int8."""

    name: str
    precision: str
    device: str
    tokenizer: PreTrainedTokenizerBase
    generation: GenerationConfig

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
        """The `n_best` hypotheses of each text, best first, in the order of the texts.

        A blank text has one empty hypothesis (CTranslate2 reads none). Sources are cut to
        `max_source_tokens`, or to the model's positions where those are fewer, and outputs to its
        positions. ValueError where `n_best` is more than the beams.
        """

    def timed(self, source_tokens: int, output_tokens: int, batch: int, beams: int) -> Callable[[], None]:
        """A call that reads `batch` made-up rows of `source_tokens` and writes exactly `output_tokens` each."""


def resolve_decoding(
    asked: Decoding,
    checkpoint: PreTrainedModel | GenerationConfig | None,
    preset: Decoding | None,
    max_target_tokens: int,
) -> Beam:
    """What to decode with: asked, else the checkpoint's generation config, else the preset, else defaults.

    The defaults are 4 beams, length penalty 1, and room for `max_target_tokens` after the start token.
    """
    own = checkpoint.generation_config if isinstance(checkpoint, PreTrainedModel) else checkpoint
    own = own if own is not None else GenerationConfig()
    preset = preset or Decoding()
    own_max = own.max_length if own.max_new_tokens is None else own.max_new_tokens + 1

    def first(*values: Any) -> Any:
        return next(value for value in values if value is not None)

    max_length = first(asked.max_length, own_max, preset.max_length, max_target_tokens + 1)
    min_length = first(asked.min_length, own.min_length, preset.min_length, 0)
    if min_length > max_length:
        if asked.min_length is not None:
            raise UserError(f"decoding: min_length {min_length} is above max_length {max_length}")
        min_length = max_length
    return Beam(
        beams=first(asked.beams, own.num_beams, preset.beams, DEFAULT_BEAMS),
        length_penalty=float(first(asked.length_penalty, own.length_penalty, preset.length_penalty, 1.0)),
        min_length=min_length,
        max_length=max_length,
        no_repeat_ngram=first(asked.no_repeat_ngram, own.no_repeat_ngram_size, preset.no_repeat_ngram, 0),
        early_stopping=own.early_stopping is True,
        forced_first=own.forced_bos_token_id,
    )


def write_longest_first(
    texts: list[str],
    rows: list[list[int]],
    size: int,
    write: Callable[[list[list[int]]], list[list[Hypothesis]]],
    on_progress: Progress | None,
) -> list[list[Hypothesis]]:
    """What `write` makes of the tokenised texts, `size` rows at a time, in the order of the texts.

    What needs most memory comes first, so the first row of a call is its longest; blank texts are not written at all.
    """
    found = [[Hypothesis("", 0.0)] for _ in texts]
    order = sorted((i for i, text in enumerate(texts) if text.strip()), key=lambda i: -len(rows[i]))
    for start in range(0, len(order), size):
        picked = order[start : start + size]
        for i, hypotheses in zip(picked, write([rows[i] for i in picked]), strict=True):
            found[i] = hypotheses
        if on_progress is not None:
            on_progress(start + len(picked), len(order))
    return found


def checked(beam: Beam, n_best: int, config: Any) -> Beam:
    """The beam within the model's positions."""
    if n_best > beam.beams:
        raise ValueError(f"n_best {n_best} is more than the {beam.beams} beams")
    limit = loading.max_positions(config) or beam.max_length
    longest = min(beam.max_length, limit)
    return Beam(**{**beam.__dict__, "max_length": longest, "min_length": min(beam.min_length, longest)})


def fixed_length(output_tokens: int, beams: int) -> Beam:
    """Exactly `output_tokens` after the start token."""
    return Beam(beams, 1.0, output_tokens + 1, output_tokens + 1, 0, False, None)


def made_up(tokenizer: PreTrainedTokenizerBase, config: Any, source_tokens: int, batch: int) -> list[list[int]]:
    """`batch` rows of ordinary tokens that end as a source does."""
    limit = loading.max_positions(config)
    if limit is not None and source_tokens > limit:
        raise ValueError(f"{source_tokens} source tokens are more than the model's {limit} positions")
    special = set(tokenizer.all_special_ids)
    words = min(config.vocab_size, len(tokenizer))
    ordinary = [i for i in range(words) if i not in special]
    draw = torch.Generator().manual_seed(0)
    picks = torch.randint(len(ordinary), (batch, source_tokens - 1), generator=draw).tolist()
    return [[*[ordinary[i] for i in row], config.eos_token_id] for row in picks]


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
