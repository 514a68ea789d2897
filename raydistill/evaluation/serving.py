"""The call that times a checkpoint as it is served: it decodes a fixed choice of validation rows."""

from collections.abc import Callable, Sequence

from raydistill.evaluation.latency import LATENCY_BATCH_SIZES
from raydistill.inference.decoding import BeamSearchParams, Engine

SINGLE_ROWS = 4  # rows of a call that decodes one row at a time


def latency_rows(sources: Sequence[str], cost: str) -> list[str]:
    """The rows of every timed call: a batch of 32 for "latency_ms", a few rows for "latency_ms_b1".

    The rows are evenly spaced over the sources in the order of their lengths. Sources are repeated if there are fewer.
    """
    count = LATENCY_BATCH_SIZES[cost] if LATENCY_BATCH_SIZES[cost] > 1 else SINGLE_ROWS
    ordered = sorted(sources, key=len)
    return [ordered[(2 * i + 1) * len(ordered) // (2 * count)] for i in range(count)]


def make_serving_call(
    engine: Engine, sources: Sequence[str], cost: str, beam: BeamSearchParams, max_source_tokens: int
) -> tuple[Callable[[], None], int]:
    """A function that decodes the rows of `latency_rows`, and how many times a batch of the cost it decodes.

    A call includes tokenization, search and detokenization.
    """
    rows, size = latency_rows(sources, cost), LATENCY_BATCH_SIZES[cost]
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]

    def call() -> None:
        for batch in batches:
            engine.generate(batch, beam, max_source_tokens=max_source_tokens, batch_size=size)

    return call, len(batches)
