"""Measures a checkpoint as it would be served: scores and latencies on real rows with one decoding configuration."""

import time
from dataclasses import dataclass

from raydistill.data.corpus import Corpus
from raydistill.evaluation.latency import Timing, summarize_times
from raydistill.evaluation.scoring import ScoredOutputs, score_outputs
from raydistill.inference.decoding import BeamSearchParams, Engine

LATENCY_BATCH_SIZES = {"latency_ms": 32, "latency_ms_b1": 1}
MAX_SINGLE_ROWS = 32


@dataclass(frozen=True)
class ServingResult(ScoredOutputs):
    """Scores, and timings by cost name (the keys of `LATENCY_BATCH_SIZES`)."""

    timings: dict[str, Timing]

    @property
    def costs(self) -> dict[str, float]:
        """Medians of the timings with their lowest and highest values."""
        return {name: ms for cost, timing in self.timings.items() for name, ms in timing.as_costs(cost).items()}


def benchmark_serving(
    engine: Engine, corpus: Corpus, metric: str, beam: BeamSearchParams, max_source_tokens: int
) -> ServingResult:
    """Generate all sources in batches of 32, and the first 32 one at a time; time each call and score the texts.

    A timed call includes tokenization, search and detokenization. The last batch is filled with rows from the start, so
    that every batch has 32 rows. The device should do nothing else.

    Raises:
        UserError: The corpus has no rows, or the metric is unknown.
    """
    predictions: list[str] = []
    timings = {}
    for name, batch_size in LATENCY_BATCH_SIZES.items():
        rows = list(corpus.sources) if batch_size > 1 else list(corpus.sources)[:MAX_SINGLE_ROWS]
        texts, seconds = _generate_timed(engine, rows, batch_size, beam, max_source_tokens)
        timings[name] = summarize_times(seconds)
        predictions = predictions or texts
    scored = score_outputs(metric, predictions, list(corpus.targets))
    return ServingResult(scored.scores, scored.score_interval, scored.repetition_rate, timings)


def _generate_timed(
    engine: Engine, rows: list[str], batch_size: int, beam: BeamSearchParams, max_source_tokens: int
) -> tuple[list[str], list[float]]:
    """Return the texts of `rows` and the seconds of every call; a first call is not timed."""
    filled = [rows[i % len(rows)] for i in range(-(-len(rows) // batch_size) * batch_size)]
    engine.generate(filled[:batch_size], beam, max_source_tokens=max_source_tokens, batch_size=batch_size)
    texts, seconds = [], []
    for start in range(0, len(filled), batch_size):
        batch = filled[start : start + batch_size]
        started = time.perf_counter()
        results = engine.generate(batch, beam, max_source_tokens=max_source_tokens, batch_size=batch_size)
        seconds.append(time.perf_counter() - started)
        texts += [hypotheses[0].text.strip() for hypotheses in results]
    return texts[: len(rows)], seconds
