"""A checkpoint's score on the rows of a corpus: generate with an engine, compare with the references."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from raydistill.evaluation.metrics import Scored, bootstrap, repetition_rate, score
from raydistill.inference.decoding import Beam, Engine


@dataclass(frozen=True)
class Evaluation:
    """Scores with their 95 % interval, the per-row statistics behind them, the texts, and how long writing took."""

    scored: Scored
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
    beam: Beam,
    *,
    max_source_tokens: int,
    batch_size: int = 32,
) -> Evaluation:
    """Generate for every source and score against its reference; `metric` is rouge2 or bleu."""
    started = time.monotonic()
    found = engine.generate(list(sources), beam, max_source_tokens=max_source_tokens, batch_size=batch_size)
    seconds = time.monotonic() - started
    predictions = [hypotheses[0].text.strip() for hypotheses in found]
    scored = score(metric, predictions, list(references))
    return Evaluation(scored, bootstrap(metric, scored.rows), predictions, repetition_rate(predictions), seconds)
