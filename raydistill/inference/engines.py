"""Beam search behind one small contract: CTranslate2 for speed, `transformers` as the reference."""

from pathlib import Path
from typing import Literal

import torch

from raydistill.core.errors import UserError
from raydistill.inference.ctranslate2_conversion import CTranslate2Unavailable
from raydistill.inference.ctranslate2_engine import COMPUTE_TYPES, LogFunction, open_ctranslate2_engine
from raydistill.inference.decoding import CalibrationRows, Engine
from raydistill.inference.transformers_engine import TORCH_DTYPES, TransformersEngine
from raydistill.models import loading

EngineName = Literal["auto", "ctranslate2", "transformers"]


def open_engine(
    checkpoint: str | Path,
    engine: EngineName = "auto",
    *,
    device: str = "cpu",
    threads: int = 1,
    precision: str = "auto",
    languages: loading.Languages | None = None,
    cache_dir: Path | None = None,
    allow_fallback: bool = True,
    log: LogFunction | None = None,
    calibration: CalibrationRows | None = None,
) -> Engine:
    """An engine for a checkpoint; `auto` is CTranslate2 where it can and `transformers` where it cannot.

    `precision` auto is fp32 on the CPU and bf16 on a GPU. `cache_dir` holds conversions (default: under
    `home()/cache`). What CTranslate2 cannot do falls back with a line to `log`, or is a UserError where
    `allow_fallback` is False. With a `calibration` of the rows to come CTranslate2 is taken only where it thinks of
    what it writes for them as `transformers` does.
    """
    if precision == "auto":
        precision = "fp32" if device == "cpu" else "bf16"
    if precision not in COMPUTE_TYPES:
        raise UserError(f"precision {precision!r} is none of auto, {', '.join(COMPUTE_TYPES)}")
    if precision == "fp16" and loading.load_config(checkpoint).model_type == "pegasus":
        raise UserError(f"{checkpoint}: Pegasus overflows in fp16; use bf16 or fp32")
    if engine != "transformers":
        try:
            return open_ctranslate2_engine(
                checkpoint, device, threads, precision, languages, cache_dir, log, calibration
            )
        except CTranslate2Unavailable as refused:
            if not allow_fallback:
                raise UserError(
                    f"{checkpoint}: CTranslate2 cannot be used: {refused}; use engine transformers"
                ) from None
            if log is not None:
                log(f"{checkpoint}: using transformers, since {refused}")
            precision = "fp32" if precision == "int8" else precision
    if precision not in TORCH_DTYPES:
        raise UserError(f"engine transformers has no {precision}; use {', '.join(TORCH_DTYPES)}")
    tokenizer = loading.load_tokenizer(checkpoint, languages)
    model = loading.load_model(checkpoint, TORCH_DTYPES[precision])
    loading.set_target_language(model, tokenizer)
    torch.nn.Module.to(model, device)
    return TransformersEngine(model, tokenizer, threads=threads)
