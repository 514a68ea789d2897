"""A checkpoint's score on the rows of a corpus: generate with an engine, compare with the references."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from raydistill.evaluation.metrics import Scores, bootstrap_interval, repetition_rate, score
from raydistill.inference.decoding import BeamSearchParams, Engine


@dataclass(frozen=True)
class EvaluationResult:
    """Scores with their 95 % interval, the per-row statistics behind them, the texts, and how long writing took."""

    scored: Scores
    interval: tuple[float, float]
    predictions: list[str]
    repetition: float
    seconds: float

    def summary(self) -> dict[str, float | list[float]]:
        """What a result file holds."""
        return {**self.scored.metrics, "interval": list(self.interval), "repetition": self.repetition}


def evaluate(
    engine: Engine,
    sources: Sequence[str],
    references: Sequence[str],
    metric: str,
    beam: BeamSearchParams,
    *,
    max_source_tokens: int,
    batch_size: int = 32,
) -> EvaluationResult:
    """Generate for every source and score against its reference; `metric` is rouge2 or bleu."""
    started = time.monotonic()
    found = engine.generate(list(sources), beam, max_source_tokens=max_source_tokens, batch_size=batch_size)
    seconds = time.monotonic() - started
    predictions = [hypotheses[0].text.strip() for hypotheses in found]
    scored = score(metric, predictions, list(references))
    return EvaluationResult(
        scored, bootstrap_interval(metric, scored.rows), predictions, repetition_rate(predictions), seconds
    )
