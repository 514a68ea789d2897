"""Fixtures shared by test files."""

import os
from pathlib import Path

import pytest

from raydistill.cluster.start import ray_cluster
from tests.factories.sweeps import make_sweep


@pytest.fixture(scope="module")
def ray_here(tmp_path_factory):
    """A local Ray of two CPUs and an empty RAYDISTILL_HOME, shared by the tests of a file."""
    os.environ["RAYDISTILL_HOME"] = str(tmp_path_factory.mktemp("home"))
    with ray_cluster(cpus=2):
        yield


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the sweep "mini", without trials, in a temporary home."""
    home = tmp_path / "home"
    monkeypatch.setenv("RAYDISTILL_HOME", str(home))
    return make_sweep(home / "sweeps" / "mini")
