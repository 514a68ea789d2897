"""Fixtures shared by test files of the search."""

import pytest

from raydistill.config.metric_names import MetricChoice
from raydistill.config.run import Run
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
