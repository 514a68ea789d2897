"""Beam search behind one small contract: CTranslate2 for speed, `transformers` as the reference.

Where nothing binds, both write the same texts. Where `min_length` or `no_repeat_ngram` binds, CTranslate2
spreads the probability of what is forbidden over the rest and `generate()` does not, and some differ.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import transformers
from filelock import FileLock
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from raydistill.config.console import home
from raydistill.config.errors import UserError
from raydistill.config.files import write_json_atomic
from raydistill.config.run import Decoding
from raydistill.model import teachers
from raydistill.model.convert import (
    RefusedError,
    converted,
    disagreement,
    load_ctranslate2,
    open_translator,
    prefix_of,
    sources_of,
    torch_threads,
    unsupported,
    words_of,
)

Kind = Literal["auto", "ctranslate2", "transformers"]
Say = Callable[[str], None]
Progress = Callable[[int, int], None]  # rows done, rows in all

DEFAULT_BEAMS = 4
# Mean difference of log-probabilities per token on a real row: fp32 1e-4, int8 0.01 on a trained model; one whose
# conversion is wrong differs by whole units.
ROW_TOLERANCE = 0.3
# Source tokens at once in CTranslate2 on a CPU. More leave its caches: BART-base, 300 tokens a row, int8, two processes
# of one thread, wrote 6.0 rows/s with 8 rows at once and 4.6 with 20; fp32 3.0 and 3.1.
CPU_TOKENS = 2_400
CT2_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8"}
TORCH_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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


def open_engine(
    checkpoint: str | Path,
    kind: Kind = "auto",
    *,
    device: str = "cpu",
    threads: int = 1,
    precision: str = "auto",
    languages: teachers.Languages | None = None,
    cache: Path | None = None,
    allow_fallback: bool = True,
    say: Say | None = None,
    sample: Sample | None = None,
) -> Engine:
    """An engine for a checkpoint; `auto` is CTranslate2 where it can and `transformers` where it cannot.

    `precision` auto is fp32 on the CPU and bf16 on a GPU. `cache` holds conversions (default: under
    `home()/cache`). What CTranslate2 cannot do falls back with a line to `say`, or is a UserError where
    `allow_fallback` is False. With a `sample` of the rows to come CTranslate2 is taken only where it thinks of what
    it writes for them as `transformers` does.
    """
    if precision == "auto":
        precision = "fp32" if device == "cpu" else "bf16"
    if precision not in CT2_TYPES:
        raise UserError(f"precision {precision!r} is none of auto, {', '.join(CT2_TYPES)}")
    if precision == "fp16" and teachers.load_config(checkpoint).model_type == "pegasus":
        raise UserError(f"{checkpoint}: Pegasus overflows in fp16; use bf16 or fp32")
    if kind != "transformers":
        try:
            return _open_ctranslate2(checkpoint, device, threads, precision, languages, cache, say, sample)
        except RefusedError as refused:
            if not allow_fallback:
                raise UserError(
                    f"{checkpoint}: CTranslate2 cannot be used: {refused}; use engine transformers"
                ) from None
            if say is not None:
                say(f"{checkpoint}: using transformers, since {refused}")
            precision = "fp32" if precision == "int8" else precision
    if precision not in TORCH_TYPES:
        raise UserError(f"engine transformers has no {precision}; use {', '.join(TORCH_TYPES)}")
    tokenizer = teachers.load_tokenizer(checkpoint, languages)
    model = teachers.load_model(checkpoint, TORCH_TYPES[precision])
    teachers.set_languages(model, tokenizer)
    torch.nn.Module.to(model, device)
    return TransformersEngine(model, tokenizer, threads=threads)


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
        beam = _checked(beam, n_best, self.model.config)
        rows = sources_of(self.tokenizer, texts, max_source_tokens, self.model.config)
        settings = self._settings(beam)
        settings.num_return_sequences = n_best
        found = [[Hypothesis("", 0.0)] for _ in texts]
        order = _longest_first(texts, rows)
        for start in range(0, len(order), batch_size):
            picked = order[start : start + batch_size]
            batch = self._batch([rows[i] for i in picked], settings, beam.length_penalty)
            for i, hypotheses in zip(picked, batch, strict=True):
                found[i] = hypotheses
            if on_progress is not None:
                on_progress(start + len(picked), len(order))
        return found

    def timed(self, source_tokens: int, output_tokens: int, batch: int, beams: int) -> Callable[[], None]:
        rows = _made_up(self.tokenizer, self.model.config, source_tokens, batch)
        settings = self._settings(_fixed_length(output_tokens, beams))

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
        extra = {}
        config = self.model.config
        if config.model_type == "t5" and config.num_decoder_layers > config.num_layers:
            # transformers 5.23 makes T5's cache as deep as its encoder; this one grows.
            empty = transformers.DynamicCache
            extra["past_key_values"] = transformers.EncoderDecoderCache(empty(), empty())
        training = self.model.training
        self.model.eval()
        try:
            with torch_threads(self.threads if self.model.device.type == "cpu" else None):
                return self.model.generate(  # type: ignore[operator]
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    generation_config=settings,
                    **extra,
                )
        finally:
            self.model.train(training)

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
            Hypothesis(_text(self.tokenizer, s), float(x), sum(token != padding for token in s[1:]))
            for s, x in zip(sequences, scores, strict=True)
        ]
        return [made[i : i + n] for i in range(0, len(made), n)]


class CTranslate2Engine:
    """A converted model. Made by `open_engine`, which has let it prove itself."""

    name = "ctranslate2"

    def __init__(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        config: Any,
        generation: GenerationConfig,
        *,
        device: str,
        threads: int,
        precision: str,
    ) -> None:
        self.translator = open_translator(folder, device, threads, CT2_TYPES[precision])
        self.tokenizer, self.config, self.generation = tokenizer, config, generation
        self.device, self.precision = device, precision
        self.words = words_of(tokenizer)
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.folder = folder
        self.start = prefix_of(folder, self.words, config)

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
        beam = _checked(beam, n_best, self.config)
        rows = sources_of(self.tokenizer, texts, max_source_tokens, self.config)
        found = [[Hypothesis("", 0.0)] for _ in texts]
        order = _longest_first(texts, rows)
        budget = batch_size * max(1, round(sum(map(len, rows)) / max(1, len(rows))))
        if self.device == "cpu":
            budget = min(budget, CPU_TOKENS)
        call = 8 * batch_size  # rows per call: between calls progress is told and Ctrl-C heard
        for start in range(0, len(order), call):
            picked = order[start : start + call]
            tokens = max(budget, len(rows[picked[0]]))
            results = self._translate([rows[i] for i in picked], beam, n_best, tokens)
            for i, hypotheses in zip(picked, results, strict=True):
                found[i] = hypotheses
            if on_progress is not None:
                on_progress(start + len(picked), len(order))
        return found

    def timed(self, source_tokens: int, output_tokens: int, batch: int, beams: int) -> Callable[[], None]:
        rows = _made_up(self.tokenizer, self.config, source_tokens, batch)
        sources = [[self.words[i] for i in row] for row in rows]

        def call() -> None:
            self.translator.translate_batch(
                sources,
                [self.start] * batch if self.start else None,
                beam_size=beams,
                min_decoding_length=output_tokens,
                max_decoding_length=output_tokens,
                max_input_length=0,
            )

        return call

    def _translate(self, rows: list[list[int]], beam: Beam, n_best: int, tokens: int) -> list[list[Hypothesis]]:
        forced = [] if beam.forced_first is None else [self.words[beam.forced_first]]
        prefix = [*self.start, *forced]
        # generate() counts the start token; where the last token is forced to be the end, that one too.
        outside = 1 if self.generation.forced_eos_token_id is None else 2
        results = self.translator.translate_batch(
            [[self.words[i] for i in row] for row in rows],
            [prefix] * len(rows) if prefix else None,
            batch_type="tokens",
            max_batch_size=tokens,
            beam_size=beam.beams,
            num_hypotheses=n_best,
            # generate() without early stopping goes on while a running beam may still win. 99.1 % of 4,000 outputs
            # were the same with patience 1.5, 99.6 % with 2, which took a fifth longer, and 96 % with 1.
            patience=1 if beam.early_stopping or beam.beams == 1 else 1.5,
            length_penalty=beam.length_penalty,
            no_repeat_ngram_size=beam.no_repeat_ngram,
            min_decoding_length=max(0, beam.min_length - 1),
            max_decoding_length=max(1, beam.max_length - outside),
            max_input_length=0,
            return_scores=True,
        )
        return [
            [
                Hypothesis(_text(self.tokenizer, [self.ids[word] for word in words]), score, len(words) + 1)
                for words, score in zip(result.hypotheses, result.scores, strict=True)
            ]
            for result in results
        ]


def _open_ctranslate2(
    checkpoint: str | Path,
    device: str,
    threads: int,
    precision: str,
    languages: teachers.Languages | None,
    cache: Path | None,
    say: Say | None,
    sample: Sample | None,
) -> CTranslate2Engine:
    try:
        ctranslate2 = load_ctranslate2()
    except ImportError:
        raise RefusedError("ctranslate2 is not installed") from None
    kind = device.partition(":")[0]
    if kind == "cuda" and ctranslate2.get_cuda_device_count() == 0:
        raise RefusedError("this build of ctranslate2 sees no GPU")
    if CT2_TYPES[precision] not in (types := ctranslate2.get_supported_compute_types(kind)):
        raise RefusedError(f"{precision} is not among its types on this {kind}: {', '.join(sorted(types))}")
    config = teachers.load_config(checkpoint)
    tokenizer = teachers.load_tokenizer(checkpoint, languages)
    generation = teachers.load_generation_config(checkpoint)
    teachers.apply_languages(config, generation, tokenizer)
    if reason := unsupported(config, generation, tokenizer):
        raise RefusedError(reason)
    folder = converted(checkpoint, tokenizer, (cache or home() / "cache" / "ctranslate2"), threads, say)
    engine = CTranslate2Engine(
        folder, tokenizer, config, generation, device=device, threads=threads, precision=precision
    )
    if sample is not None:
        difference = _difference_on(engine, checkpoint, languages, sample, threads)
        if not difference <= ROW_TOLERANCE:
            raise RefusedError(
                f"on real rows its log-probabilities are off by up to {difference:.2g} per token ({precision})"
            )
    return engine


def _difference_on(
    engine: CTranslate2Engine,
    checkpoint: str | Path,
    languages: teachers.Languages | None,
    sample: Sample,
    threads: int,
) -> float:
    """`disagreement` on what the engine writes for the sample, measured once and kept beside the conversion."""
    asked = hashlib.sha256(repr((sample, engine.precision, engine.device, languages)).encode()).hexdigest()[:16]
    kept = engine.folder / f"rows-{asked}.json"
    with FileLock(kept.with_suffix(".lock")):
        if not kept.is_file():
            texts = [text for text in sample.texts if text.strip()]
            written = engine.generate(texts, sample.beam, max_source_tokens=sample.max_source_tokens)
            model = teachers.load_model(checkpoint)
            teachers.set_languages(model, engine.tokenizer)
            labels = teachers.tokenize_targets(engine.tokenizer, [h[0].text for h in written], sample.beam.max_length)
            sources = sources_of(engine.tokenizer, texts, sample.max_source_tokens, engine.config)
            found = disagreement(
                engine.translator, engine.start, model, engine.tokenizer, sources, labels, threads=threads
            )
            write_json_atomic(kept, {"difference": found})
        return float(json.loads(kept.read_text(encoding="utf-8"))["difference"])


def _longest_first(texts: list[str], rows: list[list[int]]) -> list[int]:
    """The order to work in: what needs most memory first, and blank texts not at all."""
    return sorted((i for i, text in enumerate(texts) if text.strip()), key=lambda i: -len(rows[i]))


def _checked(beam: Beam, n_best: int, config: Any) -> Beam:
    """The beam within the model's positions."""
    if n_best > beam.beams:
        raise ValueError(f"n_best {n_best} is more than the {beam.beams} beams")
    limit = teachers.max_positions(config) or beam.max_length
    longest = min(beam.max_length, limit)
    return Beam(**{**beam.__dict__, "max_length": longest, "min_length": min(beam.min_length, longest)})


def _fixed_length(output_tokens: int, beams: int) -> Beam:
    """Exactly `output_tokens` after the start token."""
    return Beam(beams, 1.0, output_tokens + 1, output_tokens + 1, 0, False, None)


def _made_up(tokenizer: PreTrainedTokenizerBase, config: Any, source_tokens: int, batch: int) -> list[list[int]]:
    """`batch` rows of ordinary tokens that end as a source does."""
    limit = teachers.max_positions(config)
    if limit is not None and source_tokens > limit:
        raise ValueError(f"{source_tokens} source tokens are more than the model's {limit} positions")
    special = set(tokenizer.all_special_ids)
    words = min(config.vocab_size, len(tokenizer))
    ordinary = [i for i in range(words) if i not in special]
    draw = torch.Generator().manual_seed(0)
    picks = torch.randint(len(ordinary), (batch, source_tokens - 1), generator=draw).tolist()
    return [[*[ordinary[i] for i in row], config.eos_token_id] for row in picks]


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def _greedy_scores(out: Any, end: int, penalty: float) -> list[float]:
    """Each row's scores as beam search counts them: a forced token adds to the length and not to the sum."""
    log_probs = torch.stack(out.logits, dim=1).float().log_softmax(-1)
    allowed = torch.stack(out.scores, dim=1).isfinite().sum(-1)
    written = out.sequences[:, -log_probs.shape[1] :]
    chosen = log_probs.gather(-1, written[..., None])[..., 0].masked_fill(allowed == 1, 0.0)
    ended_before = ((written == end).cumsum(1) - (written == end).long()) > 0
    lengths = (~ended_before).sum(1)
    return (chosen.masked_fill(ended_before, 0.0).sum(1) / lengths**penalty).tolist()
