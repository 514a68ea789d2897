"""Scores an engine on a corpus: generates texts and compares them with the references."""

import time
from dataclasses import dataclass

from raydistill.config.metric_names import MetricChoice
from raydistill.data.corpus import Corpus
from raydistill.evaluation.metrics import Scores, bootstrap_interval, repetition_rate, score
from raydistill.inference.decoding import BeamSearchParams, Engine, engine_label


@dataclass(frozen=True)
class ScoredOutputs:
    """Scores with their 95 % bootstrap interval, and the share of outputs that repeat themselves (0 to 1)."""

    scores: Scores
    score_interval: tuple[float, float]
    repetition_rate: float


@dataclass(frozen=True)
class EvaluationResult(ScoredOutputs):
    """The scores of an engine on a corpus, its outputs, and the seconds that generation took.

    `engine` names the engine and its precision, such as "ctranslate2 fp32".
    """

    predictions: list[str]
    seconds: float
    engine: str

    def summary(self) -> dict[str, float | list[float]]:
        """Return the fields for a result file."""
        return {
            **self.scores.metrics,
            "interval": list(self.score_interval),
            "repetition": self.repetition_rate,
        }


def score_outputs(metrics: MetricChoice, predictions: list[str], corpus: Corpus) -> ScoredOutputs:
    """Score outputs for the rows of a corpus.

    Raises:
        UserError: There are no outputs, a metric is unknown, or a user's metric fails.
    """
    references, sources = list(corpus.targets), list(corpus.sources)
    scores = score(metrics.deciding, predictions, references, sources, metrics.reported)
    interval = bootstrap_interval(metrics.deciding, scores.row_stats)
    return ScoredOutputs(scores, interval, repetition_rate(predictions))


def evaluate(
    engine: Engine,
    corpus: Corpus,
    metrics: MetricChoice,
    beam: BeamSearchParams,
    *,
    max_source_tokens: int,
    batch_size: int = 32,
) -> EvaluationResult:
    """Generate a text for every source of the corpus and score it against its reference.

    Raises:
        UserError: The corpus has no rows, a metric is unknown, or a user's metric fails.
    """
    started = time.monotonic()
    results = engine.generate(list(corpus.sources), beam, max_source_tokens=max_source_tokens, batch_size=batch_size)
    seconds = time.monotonic() - started
    predictions = [hypotheses[0].text.strip() for hypotheses in results]
    scored = score_outputs(metrics, predictions, corpus)
    return EvaluationResult(
        scored.scores,
        scored.score_interval,
        scored.repetition_rate,
        predictions,
        seconds,
        engine_label(engine),
    )
