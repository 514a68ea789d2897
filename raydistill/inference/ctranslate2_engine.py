"""The fast engine: CTranslate2, used only for models whose conversion has been validated.

It generates the same texts as `generate()` as long as neither `min_length` nor `no_repeat_ngram` is active. If one is,
CTranslate2 redistributes the probability of the forbidden tokens to the others and `generate()` does not, so some texts
differ.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from raydistill.config.run import Decoding
from raydistill.config.serving import CTranslate2Serving
from raydistill.core import artifact
from raydistill.core.hashing import content_hash
from raydistill.core.records import Record
from raydistill.inference import cublas
from raydistill.inference.ctranslate2_conversion import (
    ConvertedModel,
    CTranslate2Unavailable,
    TokenPairs,
    ensure_converted,
    import_ctranslate2,
    max_logprob_diff,
    open_translator,
    target_prefix,
    unsupported_reason,
)
from raydistill.inference.decoding import (
    DEFAULT_TARGET_TOKENS,
    BeamSearchParams,
    CalibrationRows,
    EngineOptions,
    Hypothesis,
    LogFunction,
    Workload,
    benchmark_inputs,
    clamp_to_positions,
    generate_longest_first,
    resolve_decoding,
    tokenize_and_clamp,
)
from raydistill.inference.shortlist import Shortlist, kept_tokens, link_model, read_map
from raydistill.models import conversions, loading, tokenization

# Mean difference of log-probabilities per token on a calibration row: 1e-4 in fp32 and 0.01 in int8 for a trained
# model. A wrong conversion differs by more than 1.
ROW_LOGPROB_TOLERANCE = 0.3
# Default of the source tokens per batch on a CPU; larger batches exceed the CPU caches. BART-base, 300 tokens per row,
# two processes of one thread: in int8 6.0 rows/s with 8 rows per batch and 4.6 with 20, in fp32 3.0 and 3.1.
MAX_CPU_BATCH_TOKENS = 2_400
COMPUTE_TYPES = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "int8_float16": "int8_float16",
    "int8": "int8",
}


class CalibrationRecord(Record):
    """How much a conversion's log-probabilities differ from transformers' on calibration rows; None if not finite."""

    max_logprob_diff: float | None


class CTranslate2Engine:
    """Generates with a converted model; `open_ctranslate2_engine` creates it after validation."""

    name = "ctranslate2"

    def __init__(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        config: Any,
        generation_config: GenerationConfig,
        options: EngineOptions,
    ) -> None:
        self.tokenizer, self.config, self.generation_config = tokenizer, config, generation_config
        self.folder, self.device, self.precision = folder, options.device, options.precision
        self.batch_tokens, self.inter_threads = options.batch_tokens, options.inter_threads
        tokens = tokenization.embedding_tokens(tokenizer, config)
        self.token_to_id = {token: i for i, token in enumerate(tokens)}
        self.shortlist: Shortlist | None = None
        with tempfile.TemporaryDirectory() as scratch:
            model = folder
            if options.shortlist:
                self.shortlist = read_map(options.shortlist, tokens, kept_tokens(tokenizer, config))
                model = link_model(folder, options.shortlist, Path(scratch) / "model")
            translator = open_translator(
                model, options.device, options.threads, COMPUTE_TYPES[options.precision], options.inter_threads
            )
        self.converted = ConvertedModel(translator, tokens, target_prefix(folder, tokens, config))

    def generate(
        self,
        texts: list[str],
        beam: BeamSearchParams,
        *,
        max_source_tokens: int,
        batch_size: int = 32,
        n_best: int = 1,
    ) -> list[list[Hypothesis]]:
        beam = clamp_to_positions(beam, n_best, self.config)
        rows = tokenize_and_clamp(self.tokenizer, texts, max_source_tokens, self.config)
        mean_tokens = max(1, round(sum(map(len, rows)) / max(1, len(rows))))
        max_tokens = self.batch_tokens or batch_size * mean_tokens
        if self.device == "cpu" and self.batch_tokens is None:
            max_tokens = min(max_tokens, MAX_CPU_BATCH_TOKENS)
        # Ctrl-C is handled between calls. A call has several batches for each of the parallel ones.
        rows_per_call = 8 * self.inter_threads * max(batch_size, max_tokens // mean_tokens)
        return generate_longest_first(
            texts,
            rows,
            rows_per_call,
            lambda call: self._translate(call, beam, n_best, max(max_tokens, len(call[0]))),
        )

    def make_benchmark_call(self, workload: Workload, texts: Sequence[str] = ()) -> Callable[[], None]:
        rows = benchmark_inputs(self.tokenizer, self.config, workload, texts, self.shortlist)
        sources = [self._to_tokens(row) for row in rows]
        prefix = self.converted.target_prefix

        def call() -> None:
            self.converted.translator.translate_batch(
                sources,
                [prefix] * workload.batch if prefix else None,
                beam_size=workload.beams,
                min_decoding_length=workload.output_tokens,
                max_decoding_length=workload.output_tokens,
                max_input_length=0,
                use_vmap=self.shortlist is not None,
            )

        return call

    def _to_tokens(self, ids: list[int]) -> list[str]:
        return [self.converted.tokens[i] for i in ids]

    def _translate(
        self, rows: list[list[int]], beam: BeamSearchParams, n_best: int, max_batch_tokens: int
    ) -> list[list[Hypothesis]]:
        prefix = output_prefix(self.converted.target_prefix, beam, self.converted.tokens)
        results = self.converted.translator.translate_batch(
            [self._to_tokens(row) for row in rows],
            [prefix] * len(rows) if prefix else None,
            batch_type="tokens",
            max_batch_size=max_batch_tokens,
            num_hypotheses=n_best,
            return_scores=True,
            **search_options(beam, self.generation_config, self.shortlist is not None),
        )
        return [
            [
                Hypothesis(
                    tokenization.decode_text(self.tokenizer, [self.token_to_id[t] for t in tokens]),
                    score,
                    len(tokens) + 1,
                )
                for tokens, score in zip(result.hypotheses, result.scores, strict=True)
            ]
            for result in results
        ]


def search_options(beam: BeamSearchParams, generation_config: GenerationConfig, use_map: bool) -> dict[str, Any]:
    """The arguments of `Translator.translate_batch` that describe the search.

    The lengths of generate() include the start token and, if the last token is forced to be the end token, that.
    """
    uncounted = 1 if generation_config.forced_eos_token_id is None else 2
    max_tokens = max(1, beam.max_length - uncounted)
    return {
        "beam_size": beam.beams,
        # Without early stopping, generate() continues while a running beam can still win. Of 4,000 outputs, 96 % were
        # equal with patience 1, 99.1 % with 1.5 and 99.6 % with 2, which took 20 % longer than 1.5.
        "patience": 1 if beam.early_stopping or beam.beams == 1 else 1.5,
        "length_penalty": beam.length_penalty,
        "no_repeat_ngram_size": beam.no_repeat_ngram,
        "min_decoding_length": min(max(0, beam.min_length - 1), max_tokens),
        "max_decoding_length": max_tokens,
        "max_input_length": 0,
        "use_vmap": use_map,
    }


def output_prefix(target_prefix: list[str], beam: BeamSearchParams, tokens: Sequence[str]) -> list[str]:
    """The tokens that every output begins with: the start token if the model has none, and a forced first token."""
    return [*target_prefix, *([] if beam.forced_bos_token_id is None else [tokens[beam.forced_bos_token_id]])]


def describe_serving(converted: Path, checkpoint: str | Path, options: EngineOptions) -> CTranslate2Serving:
    """What a CTranslate2 program needs to write the texts that `CTranslate2Engine` writes.

    Args:
        converted: The converted model.
        checkpoint: The checkpoint, whose generation config has the decoding.
        options: Precision, languages and shortlist of the engine.
    """
    config, generation_config = loading.load_config(checkpoint), loading.load_generation_config(checkpoint)
    tokenizer = tokenization.load_tokenizer(checkpoint, options.languages, options.source_prefix)
    tokenization.set_config_target_language(config, generation_config, tokenizer)
    tokens = tokenization.embedding_tokens(tokenizer, config)
    beam = clamp_to_positions(resolve_decoding(Decoding(), generation_config, None, DEFAULT_TARGET_TOKENS), 1, config)
    languages = {name: getattr(tokenizer, name, None) for name in ("src_lang", "tgt_lang")}
    return CTranslate2Serving(
        compute_type=COMPUTE_TYPES[options.precision],
        tokenizer={name: value for name, value in languages.items() if value is not None},
        source_prefix=tokenization.source_prefix(tokenizer),
        target_prefix=output_prefix(target_prefix(converted, tokens, config), beam, tokens),
        translate_batch=search_options(beam, generation_config, options.shortlist is not None),
    )


def open_ctranslate2_engine(
    checkpoint: str | Path, options: EngineOptions, log: LogFunction | None, calibration: CalibrationRows | None
) -> CTranslate2Engine:
    """Return a CTranslate2 engine for a checkpoint; see `open_engine`. `options.precision` must not be auto.

    Raises:
        CTranslate2Unavailable: CTranslate2 cannot decode this model, or cannot be used on this machine or device.
        UserError: The checkpoint cannot be loaded, or its conversion cannot be written.
    """
    _check_available(options)
    config = loading.load_config(checkpoint)
    tokenizer = tokenization.load_tokenizer(checkpoint, options.languages, options.source_prefix)
    generation_config = loading.load_generation_config(checkpoint)
    tokenization.set_config_target_language(config, generation_config, tokenizer)
    if reason := unsupported_reason(config, generation_config, tokenizer):
        raise CTranslate2Unavailable(reason)
    cache_dir = options.cache_dir or conversions.default_folder("ctranslate2")
    folder = ensure_converted(checkpoint, tokenizer, cache_dir, options.threads, log)
    logprob_diff = 0.0
    try:
        engine = CTranslate2Engine(folder, tokenizer, config, generation_config, options)
        if options.device != "cpu":  # cuBLAS is loaded by the first call, which fails if it is missing
            engine.make_benchmark_call(Workload(source_tokens=2, output_tokens=1, batch=1, beams=1), ["a text"])()
        if calibration is not None:
            logprob_diff = _calibration_logprob_diff(engine, checkpoint, options, calibration, log)
    except RuntimeError as error:  # a missing library, or not enough GPU memory
        remedy = "; install it with `pip install nvidia-cublas-cu12`" if "libcublas" in str(error) else ""
        raise CTranslate2Unavailable(f"CTranslate2 failed on {options.device}: {error}{remedy}") from None
    if not logprob_diff <= ROW_LOGPROB_TOLERANCE:
        raise CTranslate2Unavailable(
            f"the log-probabilities of its converted model are off by up to {logprob_diff:.2g} per token on real rows "
            f"({options.precision})"
        )
    return engine


def ctranslate2_precisions(device: str) -> set[str]:
    """The precisions that CTranslate2 can compute on a device of this machine; empty without library or device."""
    try:
        ctranslate2 = import_ctranslate2()
    except ImportError:
        return set()
    device_type = device.partition(":")[0]
    if device_type == "cuda" and ctranslate2.get_cuda_device_count() == 0:
        return set()
    types = ctranslate2.get_supported_compute_types(device_type)
    return {precision for precision, compute_type in COMPUTE_TYPES.items() if compute_type in types}


def _check_available(options: EngineOptions) -> None:
    """Raise CTranslate2Unavailable if the library, the device, cuBLAS or the precision is not available."""
    try:
        ctranslate2 = import_ctranslate2()
    except ImportError:
        raise CTranslate2Unavailable("ctranslate2 is not installed") from None
    device_type = options.device.partition(":")[0]
    if device_type == "cuda":
        if ctranslate2.get_cuda_device_count() == 0:
            raise CTranslate2Unavailable("this build of ctranslate2 sees no GPU")
        try:
            cublas.preload()
        except OSError as error:
            raise CTranslate2Unavailable(f"the installed nvidia-cublas-cu12 cannot be loaded: {error}") from None
    if COMPUTE_TYPES[options.precision] not in (types := ctranslate2.get_supported_compute_types(device_type)):
        raise CTranslate2Unavailable(
            f"CTranslate2 does not support {options.precision} on this {device_type}, only {', '.join(sorted(types))}"
        )


def _calibration_logprob_diff(
    engine: CTranslate2Engine,
    checkpoint: str | Path,
    options: EngineOptions,
    calibration: CalibrationRows,
    log: LogFunction | None,
) -> float:
    """Return `max_logprob_diff` on the engine's outputs for the calibration rows; cached in the conversion's folder."""
    key = {
        "calibration": asdict(calibration),
        "precision": options.precision,
        "device": options.device,
        "languages": options.languages,
        "source_prefix": options.source_prefix,
        "shortlist": engine.shortlist.key if engine.shortlist else None,
    }
    path = engine.folder / f"rows-{content_hash(key)}.json"
    with artifact.lock(engine.folder, math.inf, log):
        record = CalibrationRecord.read_if_present(path)
        if record is None:
            logprob_diff = _measure_logprob_diff(engine, checkpoint, options, calibration)
            record = CalibrationRecord(max_logprob_diff=logprob_diff if math.isfinite(logprob_diff) else None)
            record.write(path)
    return math.nan if record.max_logprob_diff is None else record.max_logprob_diff


def _measure_logprob_diff(
    engine: CTranslate2Engine, checkpoint: str | Path, options: EngineOptions, calibration: CalibrationRows
) -> float:
    texts = [text for text in calibration.texts if text.strip()]
    outputs = engine.generate(texts, calibration.beam, max_source_tokens=calibration.max_source_tokens)
    model = loading.load_model(checkpoint)
    tokenization.set_target_language(model, engine.tokenizer)
    max_target_tokens = calibration.beam.max_length - 1  # the start token takes one position
    targets = tokenization.tokenize_targets(engine.tokenizer, [h[0].text for h in outputs], max_target_tokens)
    sources = tokenize_and_clamp(engine.tokenizer, texts, calibration.max_source_tokens, engine.config)
    pairs = TokenPairs(sources, targets)
    return max_logprob_diff(engine.converted, model, engine.tokenizer, pairs, options.threads)
