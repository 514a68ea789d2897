"""The fast engine: CTranslate2, taken only for a model whose conversion has proved itself.

Where nothing binds it writes the texts of `generate()`. Where `min_length` or `no_repeat_ngram` binds, CTranslate2
spreads the probability of what is forbidden over the rest and `generate()` does not, and some differ.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock
from transformers import GenerationConfig, PreTrainedTokenizerBase

from raydistill.core.console import home
from raydistill.core.files import write_json_atomic
from raydistill.inference import cublas
from raydistill.inference.ctranslate2_conversion import (
    RefusedError,
    converted,
    disagreement,
    load_ctranslate2,
    open_translator,
    prefix_of,
    sources_of,
    unsupported,
    words_of,
)
from raydistill.inference.decoding import (
    Beam,
    Hypothesis,
    Progress,
    Sample,
    checked,
    made_up,
    text_of,
    write_longest_first,
)
from raydistill.models import loading

Say = Callable[[str], None]

# Mean difference of log-probabilities per token on a real row: fp32 1e-4, int8 0.01 on a trained model; one whose
# conversion is wrong differs by whole units.
ROW_TOLERANCE = 0.3
# Source tokens at once in CTranslate2 on a CPU. More leave its caches: BART-base, 300 tokens a row, int8, two processes
# of one thread, wrote 6.0 rows/s with 8 rows at once and 4.6 with 20; fp32 3.0 and 3.1.
CPU_TOKENS = 2_400
CT2_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8"}


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
        beam = checked(beam, n_best, self.config)
        rows = sources_of(self.tokenizer, texts, max_source_tokens, self.config)
        budget = batch_size * max(1, round(sum(map(len, rows)) / max(1, len(rows))))
        if self.device == "cpu":
            budget = min(budget, CPU_TOKENS)
        size = 8 * batch_size  # rows per call: between calls progress is told and Ctrl-C heard
        return write_longest_first(
            texts, rows, size, lambda call: self._translate(call, beam, n_best, max(budget, len(call[0]))), on_progress
        )

    def timed(self, source_tokens: int, output_tokens: int, batch: int, beams: int) -> Callable[[], None]:
        rows = made_up(self.tokenizer, self.config, source_tokens, batch)
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
                Hypothesis(text_of(self.tokenizer, [self.ids[word] for word in words]), score, len(words) + 1)
                for words, score in zip(result.hypotheses, result.scores, strict=True)
            ]
            for result in results
        ]


def open_ctranslate2(
    checkpoint: str | Path,
    device: str,
    threads: int,
    precision: str,
    languages: loading.Languages | None,
    cache: Path | None,
    say: Say | None,
    sample: Sample | None,
) -> CTranslate2Engine:
    """As `open_engine`; RefusedError says why this model cannot be decoded by CTranslate2, or not here and now."""
    try:
        ctranslate2 = load_ctranslate2()
    except ImportError:
        raise RefusedError("ctranslate2 is not installed") from None
    kind = device.partition(":")[0]
    if kind == "cuda" and ctranslate2.get_cuda_device_count() == 0:
        raise RefusedError("this build of ctranslate2 sees no GPU")
    if kind == "cuda":
        _load_cublas()
    if CT2_TYPES[precision] not in (types := ctranslate2.get_supported_compute_types(kind)):
        raise RefusedError(f"{precision} is not among its types on this {kind}: {', '.join(sorted(types))}")
    config = loading.load_config(checkpoint)
    tokenizer = loading.load_tokenizer(checkpoint, languages)
    generation = loading.load_generation_config(checkpoint)
    loading.apply_languages(config, generation, tokenizer)
    if reason := unsupported(config, generation, tokenizer):
        raise RefusedError(reason)
    folder = converted(checkpoint, tokenizer, (cache or home() / "cache" / "ctranslate2"), threads, say)
    try:
        engine = CTranslate2Engine(
            folder, tokenizer, config, generation, device=device, threads=threads, precision=precision
        )
        if kind == "cuda":  # where cuBLAS cannot be loaded, it says so at the first call and not before
            engine.timed(source_tokens=2, output_tokens=1, batch=1, beams=1)()
        difference = 0.0 if sample is None else _difference_on(engine, checkpoint, languages, sample, threads)
    except RuntimeError as error:  # a missing library, no memory left on the GPU
        mend = "; `pip install nvidia-cublas-cu12` brings it" if "libcublas" in str(error) else ""
        raise RefusedError(f"it failed on {device}: {error}{mend}") from None
    if not difference <= ROW_TOLERANCE:
        raise RefusedError(
            f"on real rows its log-probabilities are off by up to {difference:.2g} per token ({precision})"
        )
    return engine


def _load_cublas() -> None:
    try:
        cublas.preload()
    except OSError as error:
        raise RefusedError(f"the installed nvidia-cublas-cu12 cannot be loaded: {error}") from None


def _difference_on(
    engine: CTranslate2Engine,
    checkpoint: str | Path,
    languages: loading.Languages | None,
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
            model = loading.load_model(checkpoint)
            loading.set_languages(model, engine.tokenizer)
            longest = sample.beam.max_length - 1  # without decoding's first token, which takes a position
            labels = loading.tokenize_targets(engine.tokenizer, [h[0].text for h in written], longest)
            sources = sources_of(engine.tokenizer, texts, sample.max_source_tokens, engine.config)
            found = disagreement(
                engine.translator, engine.start, model, engine.tokenizer, sources, labels, threads=threads
            )
            write_json_atomic(kept, {"difference": found})
        return float(json.loads(kept.read_text(encoding="utf-8"))["difference"])
