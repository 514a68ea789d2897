"""Beam search behind one small contract: CTranslate2 for speed, `transformers` as the reference."""

from pathlib import Path
from typing import Literal

import torch

from raydistill.core.errors import UserError
from raydistill.inference.ctranslate2_conversion import RefusedError
from raydistill.inference.ctranslate2_engine import CT2_TYPES, Say, open_ctranslate2
from raydistill.inference.decoding import Engine, Sample
from raydistill.inference.transformers_engine import TORCH_TYPES, TransformersEngine
from raydistill.models import loading

Kind = Literal["auto", "ctranslate2", "transformers"]


def open_engine(
    checkpoint: str | Path,
    kind: Kind = "auto",
    *,
    device: str = "cpu",
    threads: int = 1,
    precision: str = "auto",
    languages: loading.Languages | None = None,
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
    if precision == "fp16" and loading.load_config(checkpoint).model_type == "pegasus":
        raise UserError(f"{checkpoint}: Pegasus overflows in fp16; use bf16 or fp32")
    if kind != "transformers":
        try:
            return open_ctranslate2(checkpoint, device, threads, precision, languages, cache, say, sample)
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
    tokenizer = loading.load_tokenizer(checkpoint, languages)
    model = loading.load_model(checkpoint, TORCH_TYPES[precision])
    loading.set_languages(model, tokenizer)
    torch.nn.Module.to(model, device)
    return TransformersEngine(model, tokenizer, threads=threads)
