"""The comparison of engines with plain `generate`: the batches of plain sides, and the order of the texts."""

import argparse
from typing import Any

import pytest

from benchmarks import pseudolabel_engines
from benchmarks.pseudolabel_engines import GPU_SIDES, PLAIN_BATCH_SIZE, _run_side, _select_sides
from benchmarks.sides import GenerationResult, Side
from raydistill.jobs.pseudolabel import GPU_BATCH_SIZE

SOURCES = ["c" * (1 + i * 7 % 50) + str(i) for i in range(40)]


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The batches that were generated; a source's text is the source in capitals."""
    seen: list[list[str]] = []

    def generate(side: Side, task: Any, batches: list[list[str]]) -> GenerationResult:
        seen.extend(batches)
        return GenerationResult([[text.upper() for text in batch] for batch in batches], [], 1.0, 0.0)

    monkeypatch.setattr(pseudolabel_engines, "generate_batches", generate)
    return seen


@pytest.mark.parametrize("sorted_rows", [False, True])
def test_plain_sides_return_texts_in_the_order_of_the_data(sorted_rows, generated):
    nothing: Any = None
    run = _run_side(Side("plain", "generate", sorted_rows=sorted_rows), nothing, SOURCES, [])
    assert run.texts == [source.upper() for source in SOURCES]
    assert [len(batch) for batch in generated] == [PLAIN_BATCH_SIZE, 40 - PLAIN_BATCH_SIZE]
    lengths = [len(source) for batch in generated for source in batch]
    assert (lengths == sorted(lengths, reverse=True)) is sorted_rows


def test_engines_read_the_planned_batches(generated):
    nothing: Any = None
    plan = [{"sources": ["b", "c"], "positions": [1, 2]}, {"sources": ["a"], "positions": [0]}]
    assert _run_side(Side("engine", "ctranslate2"), nothing, ["a", "b", "c"], plan).texts == ["A", "B", "C"]
    assert generated == [["b", "c"], ["a"]]


def test_a_plain_side_on_a_gpu_has_batches_of_the_engines_size():
    options = argparse.Namespace(device="cuda", side=[])
    assert _select_sides(options, 1024) == list(GPU_SIDES)
    assert [side.batch_size for side in GPU_SIDES if side.engine == "generate"] == [None, None, GPU_BATCH_SIZE]
    few = [side.name for side in _select_sides(options, PLAIN_BATCH_SIZE)]
    assert few == ["plain generate", "plain generate, sorted", "transformers", "ctranslate2 bf16"]
