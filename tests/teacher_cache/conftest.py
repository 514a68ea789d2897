"""A tiny teacher, and parts that are small enough for several of them."""

import pytest

from raydistill.models.loading import load_model
from raydistill.teacher_cache import store
from tests.factories.models import save_tiny


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_model(save_tiny("bart", tmp_path_factory.mktemp("teacher"), dropout=0.1))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(store, "PART_TOKENS", 30)
