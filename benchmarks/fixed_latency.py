"""Latency of outputs of fixed length, in pairs: a model that writes repetitions is not slower than another one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from raydistill.evaluation.paired_latency import PairedTiming, StoppingRule, time_pairs
from raydistill.inference.decoding import Engine, EngineOptions, Workload
from raydistill.inference.engines import open_engine

BATCH_ROWS = 32


@dataclass(frozen=True)
class FixedLengths:
    """The work of a timed call: 32 rows of source texts.

    Attributes:
        texts: texts of the data set, which are cut or joined to rows of `tokens` tokens.
        tokens: tokens of each source and of each output.
        seconds: the longest time of a comparison.
    """

    texts: tuple[str, ...]
    tokens: int
    seconds: float


def open_checkpoint(checkpoint: Path, precision: str, threads: int, scratch: Path) -> Engine:
    """Open a checkpoint with CTranslate2; the converted model is kept below `scratch`."""
    options = EngineOptions(
        threads=threads, precision=precision, cache_dir=scratch / "ctranslate2", allow_fallback=False
    )
    return open_engine(checkpoint, "ctranslate2", options)


def compare_fixed_lengths(
    baseline: tuple[Engine, int], student: tuple[Engine, int], lengths: FixedLengths, bounds: Sequence[float] = ()
) -> PairedTiming:
    """Time a student in pairs with a baseline, each an engine with its number of beams.

    Without bounds, the comparison ends when the interval of the ratio is precise.
    """
    baseline_call, student_call = (
        engine.make_benchmark_call(Workload(lengths.tokens, lengths.tokens, BATCH_ROWS, beams), lengths.texts)
        for engine, beams in (baseline, student)
    )
    return time_pairs(baseline_call, student_call, bounds, StoppingRule(max_seconds=lengths.seconds))
