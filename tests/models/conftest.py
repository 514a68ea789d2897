"""Fixtures of the tests of models."""

import shutil
from pathlib import Path

import pytest

from tests.factories.models import FAMILIES, save_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random checkpoint of each family; tests must not change them."""
    folder = tmp_path_factory.mktemp("tiny")
    return {family: save_tiny(family, folder / family, logits_bias=True) for family in FAMILIES}


@pytest.fixture
def bart(tiny: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tiny BART that a test may damage."""
    shutil.copytree(tiny["bart"], tmp_path / "bart")
    return tmp_path / "bart"
