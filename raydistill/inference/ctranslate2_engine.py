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

from raydistill.core.files import write_json_atomic
from raydistill.core.paths import raydistill_home
from raydistill.inference import cublas
from raydistill.inference.ctranslate2_conversion import (
    CTranslate2Unavailable,
    ensure_converted,
    import_ctranslate2,
    max_logprob_diff,
    open_translator,
    target_prefix,
    tokenize_and_clamp,
    tokens_by_id,
    unsupported_reason,
)
from raydistill.inference.decoding import (
    BeamSearchParams,
    CalibrationRows,
    Hypothesis,
    RowProgress,
    clamp_to_positions,
    decode_text,
    generate_longest_first,
    random_inputs,
)
from raydistill.models import loading

LogFunction = Callable[[str], None]

# Mean difference of log-probabilities per token on a real row: fp32 1e-4, int8 0.01 on a trained model; one whose
# conversion is wrong differs by whole units.
ROW_LOGPROB_TOLERANCE = 0.3
# Source tokens at once in CTranslate2 on a CPU. More leave its caches: BART-base, 300 tokens a row, int8, two processes
# of one thread, wrote 6.0 rows/s with 8 rows at once and 4.6 with 20; fp32 3.0 and 3.1.
MAX_CPU_BATCH_TOKENS = 2_400
COMPUTE_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8"}


class CTranslate2Engine:
    """A converted model. Made by `open_engine`, which has let it prove itself."""

    name = "ctranslate2"

    def __init__(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        config: Any,
        generation_config: GenerationConfig,
        *,
        device: str,
        threads: int,
        precision: str,
    ) -> None:
        self.translator = open_translator(folder, device, threads, COMPUTE_TYPES[precision])
        self.tokenizer, self.config, self.generation_config = tokenizer, config, generation_config
        self.device, self.precision = device, precision
        self.words = tokens_by_id(tokenizer)
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.folder = folder
        self.start = target_prefix(folder, self.words, config)

    def generate(
        self,
        texts: list[str],
        beam: BeamSearchParams,
        *,
        max_source_tokens: int,
        batch_size: int = 32,
        n_best: int = 1,
        on_progress: RowProgress | None = None,
    ) -> list[list[Hypothesis]]:
        beam = clamp_to_positions(beam, n_best, self.config)
        rows = tokenize_and_clamp(self.tokenizer, texts, max_source_tokens, self.config)
        budget = batch_size * max(1, round(sum(map(len, rows)) / max(1, len(rows))))
        if self.device == "cpu":
            budget = min(budget, MAX_CPU_BATCH_TOKENS)
        size = 8 * batch_size  # rows per call: between calls progress is told and Ctrl-C heard
        return generate_longest_first(
            texts, rows, size, lambda call: self._translate(call, beam, n_best, max(budget, len(call[0]))), on_progress
        )

    def make_benchmark_call(self, source_tokens: int, output_tokens: int, batch: int, beams: int) -> Callable[[], None]:
        rows = random_inputs(self.tokenizer, self.config, source_tokens, batch)
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

    def _translate(
        self, rows: list[list[int]], beam: BeamSearchParams, n_best: int, max_batch_tokens: int
    ) -> list[list[Hypothesis]]:
        forced = [] if beam.forced_first is None else [self.words[beam.forced_first]]
        prefix = [*self.start, *forced]
        # generate() counts the start token; where the last token is forced to be the end, that one too.
        outside = 1 if self.generation_config.forced_eos_token_id is None else 2
        results = self.translator.translate_batch(
            [[self.words[i] for i in row] for row in rows],
            [prefix] * len(rows) if prefix else None,
            batch_type="tokens",
            max_batch_size=max_batch_tokens,
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
                Hypothesis(decode_text(self.tokenizer, [self.ids[word] for word in words]), score, len(words) + 1)
                for words, score in zip(result.hypotheses, result.scores, strict=True)
            ]
            for result in results
        ]


def open_ctranslate2_engine(
    checkpoint: str | Path,
    device: str,
    threads: int,
    precision: str,
    languages: loading.Languages | None,
    cache_dir: Path | None,
    log: LogFunction | None,
    calibration: CalibrationRows | None,
) -> CTranslate2Engine:
    """As `open_engine`; RefusedError says why this model cannot be decoded by CTranslate2, or not here and now."""
    try:
        ctranslate2 = import_ctranslate2()
    except ImportError:
        raise CTranslate2Unavailable("ctranslate2 is not installed") from None
    kind = device.partition(":")[0]
    if kind == "cuda" and ctranslate2.get_cuda_device_count() == 0:
        raise CTranslate2Unavailable("this build of ctranslate2 sees no GPU")
    if kind == "cuda":
        _load_cublas()
    if COMPUTE_TYPES[precision] not in (types := ctranslate2.get_supported_compute_types(kind)):
        raise CTranslate2Unavailable(f"{precision} is not among its types on this {kind}: {', '.join(sorted(types))}")
    config = loading.load_config(checkpoint)
    tokenizer = loading.load_tokenizer(checkpoint, languages)
    generation = loading.load_generation_config(checkpoint)
    loading.set_config_target_language(config, generation, tokenizer)
    if reason := unsupported_reason(config, generation, tokenizer):
        raise CTranslate2Unavailable(reason)
    folder = ensure_converted(
        checkpoint, tokenizer, (cache_dir or raydistill_home() / "cache" / "ctranslate2"), threads, log
    )
    try:
        engine = CTranslate2Engine(
            folder, tokenizer, config, generation, device=device, threads=threads, precision=precision
        )
        if kind == "cuda":  # where cuBLAS cannot be loaded, it says so at the first call and not before
            engine.make_benchmark_call(source_tokens=2, output_tokens=1, batch=1, beams=1)()
        difference = (
            0.0
            if calibration is None
            else _calibration_logprob_diff(engine, checkpoint, languages, calibration, threads)
        )
    except RuntimeError as error:  # a missing library, no memory left on the GPU
        mend = "; `pip install nvidia-cublas-cu12` brings it" if "libcublas" in str(error) else ""
        raise CTranslate2Unavailable(f"it failed on {device}: {error}{mend}") from None
    if not difference <= ROW_LOGPROB_TOLERANCE:
        raise CTranslate2Unavailable(
            f"on real rows its log-probabilities are off by up to {difference:.2g} per token ({precision})"
        )
    return engine


def _load_cublas() -> None:
    try:
        cublas.preload()
    except OSError as error:
        raise CTranslate2Unavailable(f"the installed nvidia-cublas-cu12 cannot be loaded: {error}") from None


def _calibration_logprob_diff(
    engine: CTranslate2Engine,
    checkpoint: str | Path,
    languages: loading.Languages | None,
    calibration: CalibrationRows,
    threads: int,
) -> float:
    """`disagreement` on what the engine writes for the sample, measured once and kept beside the conversion."""
    asked = hashlib.sha256(repr((calibration, engine.precision, engine.device, languages)).encode()).hexdigest()[:16]
    kept = engine.folder / f"rows-{asked}.json"
    with FileLock(kept.with_suffix(".lock")):
        if not kept.is_file():
            texts = [text for text in calibration.texts if text.strip()]
            written = engine.generate(texts, calibration.beam, max_source_tokens=calibration.max_source_tokens)
            model = loading.load_model(checkpoint)
            loading.set_target_language(model, engine.tokenizer)
            longest = calibration.beam.max_length - 1  # without decoding's first token, which takes a position
            labels = loading.tokenize_targets(engine.tokenizer, [h[0].text for h in written], longest)
            sources = tokenize_and_clamp(engine.tokenizer, texts, calibration.max_source_tokens, engine.config)
            found = max_logprob_diff(
                engine.translator, engine.start, model, engine.tokenizer, sources, labels, threads=threads
            )
            write_json_atomic(kept, {"difference": found})
        return float(json.loads(kept.read_text(encoding="utf-8"))["difference"])
