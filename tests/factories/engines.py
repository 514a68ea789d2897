"""Texts, decoding parameters and engines for tests of generation."""

import os
from pathlib import Path
from typing import Any

import torch

from raydistill.inference.decoding import BeamSearchParams, CalibrationRows, Engine, EngineOptions, Hypothesis
from raydistill.inference.engines import open_engine
from tests.factories.models import sentences

SHARED = Path(os.environ.get("RAYDISTILL_SHARED", Path(__file__).parents[3] / "shared"))
REAL_TEACHER = SHARED / "teachers" / "multi30k-marian-6-6"
GREEDY = BeamSearchParams(1, 1.0, 0, 20, 0, True, None)
TEXTS = sentences(9, seed=4)


def max_int8_difference() -> float:
    """Points of BLEU that int8 may differ from fp32 on a trained model; with AVX2, 0.40 were measured (4 beams)."""
    return 0.3 if has_avx512() else 0.6


def has_avx512() -> bool:
    """Whether int8 products are exact here. With AVX2 they saturate, and a random model is off by 1.5 per token."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def open_ctranslate2(
    tiny: dict[str, Path], family: str, calibration: CalibrationRows | None = None, **options: Any
) -> Engine:
    """Open a tiny checkpoint with CTranslate2 or fail."""
    engine_options = EngineOptions(cache_dir=tiny["cache"], allow_fallback=False, **options)
    return open_engine(tiny[family], "ctranslate2", engine_options, calibration=calibration)


def first_texts(results: list[list[Hypothesis]]) -> list[str]:
    """Return the best text of each row."""
    return [hypotheses[0].text for hypotheses in results]
