"""A checkpoint as it would serve: what it writes for real rows with one way of decoding, and how long that takes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from raydistill.evaluation.latency import Timing, summarize_times
from raydistill.evaluation.metrics import Scores, bootstrap_interval, repetition_rate, score
from raydistill.inference.decoding import BeamSearchParams, Engine

LATENCY_BATCH_SIZES = {"latency_ms": 32, "latency_ms_b1": 1}
MAX_SINGLE_ROWS = 32


@dataclass(frozen=True)
class ServingResult:
    """Scores with their 95 % interval and per-row statistics, and the timings by cost name."""

    scored: Scores
    interval: tuple[float, float]
    repetition: float
    timings: dict[str, Timing]

    def summary(self) -> dict[str, object]:
        """What a file of results holds: costs are medians, with the lowest and highest beside them."""
        costs: dict[str, float] = {}
        for name, timing in self.timings.items():
            costs |= {name: timing.median_ms, f"{name}_low": timing.low_ms, f"{name}_high": timing.high_ms}
        metrics = {**self.scored.metrics, "repetition": self.repetition}
        return {"metrics": metrics, "interval": list(self.interval), "costs": costs}


def benchmark_serving(
    engine: Engine,
    sources: Sequence[str],
    references: Sequence[str],
    metric: str,
    beam: BeamSearchParams,
    max_source_tokens: int,
) -> ServingResult:
    """Write every source in batches of 32, as they come, and some one by one; score the texts and time each call.

    A call is timed with all that serving takes: tokens from text, the search, text from tokens. The last batch is
    filled up with rows from the start, so that every batch has 32. The device should do nothing else meanwhile.
    """
    texts: list[str] = []
    timings = {}
    for name, batch in LATENCY_BATCH_SIZES.items():
        rows = list(sources) if batch > 1 else list(sources)[:MAX_SINGLE_ROWS]
        written, seconds = _generate_timed(engine, rows, batch, beam, max_source_tokens)
        timings[name] = summarize_times(seconds)
        texts = texts or written
    scored = score(metric, texts, list(references))
    return ServingResult(scored, bootstrap_interval(metric, scored.rows), repetition_rate(texts), timings)


def _generate_timed(
    engine: Engine, rows: list[str], batch_size: int, beam: BeamSearchParams, max_source_tokens: int
) -> tuple[list[str], list[float]]:
    """The texts written for `rows`, and the seconds of every call; a call before the first is not timed."""
    filled = [rows[i % len(rows)] for i in range(-(-len(rows) // batch_size) * batch_size)]
    engine.generate(filled[:batch_size], beam, max_source_tokens=max_source_tokens, batch_size=batch_size)
    texts, seconds = [], []
    for start in range(0, len(filled), batch_size):
        begun = time.perf_counter()
        found = engine.generate(
            filled[start : start + batch_size], beam, max_source_tokens=max_source_tokens, batch_size=batch_size
        )
        seconds.append(time.perf_counter() - begun)
        texts += [hypotheses[0].text.strip() for hypotheses in found]
    return texts[: len(rows)], seconds
