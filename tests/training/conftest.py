"""Fixtures of the tests of training."""

import pytest

from tests.factories.training import write_run_workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with a tiny teacher, a corpus and a pseudo-label set; tests only read it."""
    return write_run_workspace(tmp_path_factory.mktemp("runs"))
