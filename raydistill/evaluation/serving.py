"""A checkpoint as it would serve: what it writes for real rows with one way of decoding, and how long that takes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from raydistill.evaluation.latency import Timing, timing_of
from raydistill.evaluation.metrics import Scored, bootstrap, repetition_rate, score
from raydistill.inference.decoding import Beam, Engine

BATCHES = {"latency_ms": 32, "latency_ms_b1": 1}
SINGLE_ROWS = 32


@dataclass(frozen=True)
class Served:
    """Scores with their 95 % interval and per-row statistics, and the timings by cost name."""

    scored: Scored
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


def serve(
    engine: Engine, sources: Sequence[str], references: Sequence[str], metric: str, beam: Beam, max_source_tokens: int
) -> Served:
    """Write every source in batches of 32, as they come, and some one by one; score the texts and time each call.

    A call is timed with all that serving takes: tokens from text, the search, text from tokens. The last batch is
    filled up with rows from the start, so that every batch has 32. The device should do nothing else meanwhile.
    """
    texts: list[str] = []
    timings = {}
    for name, batch in BATCHES.items():
        rows = list(sources) if batch > 1 else list(sources)[:SINGLE_ROWS]
        written, seconds = _in_batches(engine, rows, batch, beam, max_source_tokens)
        timings[name] = timing_of(seconds)
        texts = texts or written
    scored = score(metric, texts, list(references))
    return Served(scored, bootstrap(metric, scored.rows), repetition_rate(texts), timings)


def _in_batches(
    engine: Engine, rows: list[str], batch: int, beam: Beam, max_source_tokens: int
) -> tuple[list[str], list[float]]:
    """The texts written for `rows`, and the seconds of every call; a call before the first is not timed."""
    filled = [rows[i % len(rows)] for i in range(-(-len(rows) // batch) * batch)]
    engine.generate(filled[:batch], beam, max_source_tokens=max_source_tokens, batch_size=batch)
    texts, seconds = [], []
    for start in range(0, len(filled), batch):
        begun = time.perf_counter()
        found = engine.generate(
            filled[start : start + batch], beam, max_source_tokens=max_source_tokens, batch_size=batch
        )
        seconds.append(time.perf_counter() - begun)
        texts += [hypotheses[0].text.strip() for hypotheses in found]
    return texts[: len(rows)], seconds
