"""Fixtures of the tests of engines."""

from pathlib import Path

import pytest

from tests.factories.models import FAMILIES, save_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random checkpoint of each family, and under "cache" a folder for their conversions."""
    folder = tmp_path_factory.mktemp("tiny")
    checkpoints = {family: save_tiny(family, folder / family, logits_bias=True) for family in FAMILIES}
    return {**checkpoints, "cache": folder / "cache"}
