"""Fixtures shared by test files of the search."""

import pytest

from raydistill.config.metric_names import MetricChoice
from raydistill.config.run import Run
from raydistill.evaluation import paired_latency
from raydistill.evaluation.paired_latency import StoppingRule
from raydistill.search import serving_timing, shape_latency
from raydistill.search.served_engine import ServingContext
from tests.factories.workspace import make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def context(world) -> ServingContext:
    teacher, data = world
    settings = {"name": str(data), "max_source_tokens": 32, "max_target_tokens": 16}
    run = Run.model_validate({"name": "x", "teacher": str(teacher), "dataset": settings})  # chosen on all 8 rows
    return ServingContext(run, MetricChoice("bleu"), f"test-{teacher.parent.name}")


@pytest.fixture
def short_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pairs of calls for every comparison, for tests that do not depend on the measured times."""
    monkeypatch.setattr(paired_latency, "MIN_HALF_SECONDS", 0.001)
    monkeypatch.setattr(serving_timing, "FIRST_PASS_ROUNDS", (1, 1))
    short = StoppingRule(min_pairs=2, max_seconds=0.01)
    for name in ("BOUNDED_RULE", "REPORTED_RULE"):
        monkeypatch.setattr(serving_timing, name, short)
    for name in ("SEARCH_RULE", "EXCLUSION_RULE"):
        monkeypatch.setattr(shape_latency, name, short)
