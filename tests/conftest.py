"""Fixtures of several test files."""

import os

import pytest

from raydistill.cluster.start import ray_cluster


@pytest.fixture(scope="module")
def ray_here(tmp_path_factory):
    """A Ray of two CPUs, and a home of its own, for the tests of a file."""
    os.environ["RAYDISTILL_HOME"] = str(tmp_path_factory.mktemp("home"))
    with ray_cluster(cpus=2):
        yield
