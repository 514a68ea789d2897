"""Opens a generation engine for a checkpoint: CTranslate2 for speed, transformers as the reference."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from raydistill.core.errors import UserError
from raydistill.inference.ctranslate2_conversion import CTranslate2Unavailable
from raydistill.inference.ctranslate2_engine import COMPUTE_TYPES, ctranslate2_precisions, open_ctranslate2_engine
from raydistill.inference.decoding import CalibrationRows, Engine, EngineOptions, LogFunction
from raydistill.inference.shortlist import kept_tokens, read_map
from raydistill.inference.transformers_engine import TORCH_DTYPES, TransformersEngine
from raydistill.models import loading, tokenization

EngineName = Literal["auto", "ctranslate2", "transformers"]
FALLBACK_NOTICE = "using transformers"  # in the message that says why CTranslate2 is not used
# What transformers computes in where CTranslate2 cannot be used.
FALLBACK_PRECISIONS = {"int8": "fp32", "int8_float16": "fp16"}


def open_engine(
    checkpoint: str | Path,
    engine: EngineName = "auto",
    options: EngineOptions | None = None,
    *,
    log: LogFunction | None = None,
    calibration: CalibrationRows | None = None,
) -> Engine:
    """Return an engine for a checkpoint.

    auto and ctranslate2 both try CTranslate2 first. If CTranslate2 cannot decode the model, the reason goes to `log`
    and transformers is used, unless `options.allow_fallback` is false. With `calibration`, the converted model must
    also agree with transformers on the log-probabilities of what it generates for these rows.

    Raises:
        UserError: The precision is unknown or not supported, the checkpoint cannot be loaded, or CTranslate2 cannot
            decode it and `options.allow_fallback` is false.
    """
    options = _resolve_precision(checkpoint, options or EngineOptions())
    if engine != "transformers":
        try:
            return open_ctranslate2_engine(checkpoint, options, log, calibration)
        except CTranslate2Unavailable as error:
            if not options.allow_fallback:
                raise UserError(f"{checkpoint}: CTranslate2 cannot be used: {error}; use engine transformers") from None
            if log is not None:
                log(f"{checkpoint}: {FALLBACK_NOTICE}, since {error}")
            options = replace(options, precision=FALLBACK_PRECISIONS.get(options.precision, options.precision))
    return _open_transformers_engine(checkpoint, options)


def supported_precisions(engine: str, device: str, model_type: str) -> set[str]:
    """The precisions that an engine can compute on a device of this machine, for a family of models."""
    known = set(TORCH_DTYPES) if engine == "transformers" else ctranslate2_precisions(device)
    return known - ({"fp16", "int8_float16"} if model_type == "pegasus" else set())


def _resolve_precision(checkpoint: str | Path, options: EngineOptions) -> EngineOptions:
    """Replace precision auto; raise UserError for an unknown precision and for Pegasus in fp16."""
    precision = options.precision
    if precision == "auto":
        precision = "fp32" if options.device == "cpu" else "bf16"
    if precision not in COMPUTE_TYPES:
        raise UserError(f"precision {precision!r} is none of auto, {', '.join(COMPUTE_TYPES)}")
    if precision in ("fp16", "int8_float16") and loading.load_config(checkpoint).model_type == "pegasus":
        raise UserError(f"{checkpoint}: Pegasus overflows in {precision}; use bf16 or fp32")
    return replace(options, precision=precision)


def _open_transformers_engine(checkpoint: str | Path, options: EngineOptions) -> TransformersEngine:
    if options.precision not in TORCH_DTYPES:
        raise UserError(f"engine transformers has no {options.precision}; use {', '.join(TORCH_DTYPES)}")
    tokenizer = tokenization.load_tokenizer(checkpoint, options.languages, options.source_prefix)
    model = loading.load_model(checkpoint, TORCH_DTYPES[options.precision])
    tokenization.set_target_language(model, tokenizer)
    torch.nn.Module.to(model, options.device)
    shortlist = None
    if options.shortlist:
        required = kept_tokens(tokenizer, model.config)
        shortlist = read_map(options.shortlist, tokenization.tokens_by_id(tokenizer), required)
    return TransformersEngine(model, tokenizer, threads=options.threads, shortlist=shortlist)
