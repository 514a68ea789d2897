"""Fixtures shared by test files."""

import os
import shutil
from pathlib import Path

import pytest

from raydistill.cluster.start import ray_cluster
from raydistill.tracking import mlflow_store
from tests.factories.sweeps import make_sweep

# Files in which whole commands run on Ray, the longest first. Two processes share the files of the suite, each of which
# takes the next file when it is free: a long file at the end would run alone.
LONGEST_FILES = (
    "tests/search/test_sweep.py",
    "tests/jobs/test_train.py",
    "tests/jobs/test_pseudolabel.py",
    "tests/search/test_paper_search.py",
    "tests/search/test_resume.py",
    "tests/jobs/test_teacher_cache.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files that take longest first."""
    ranks = {name: rank for rank, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: ranks.get(item.nodeid.split("::")[0], len(ranks)))


@pytest.fixture(scope="session", autouse=True)
def empty_store_is_copied(tmp_path_factory):
    """MLflow's migrations run once in this process: every further local store starts as a copy of the empty one."""
    template = tmp_path_factory.mktemp("mlflow") / "empty.db"
    write_empty_store = mlflow_store.write_empty_store

    def copy_empty_store(path: Path) -> None:
        if not template.exists():
            write_empty_store(template)
        shutil.copyfile(template, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlflow_store, "write_empty_store", copy_empty_store)
        yield


@pytest.fixture(scope="module")
def ray_here(tmp_path_factory):
    """A local Ray of two CPUs and an empty RAYDISTILL_HOME, shared by the tests of a file.

    The environment is restored afterwards, since further files run in this process.
    """
    environment = dict(os.environ)
    os.environ["RAYDISTILL_HOME"] = str(tmp_path_factory.mktemp("home"))
    with ray_cluster(cpus=2):
        yield
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the sweep "mini", without trials, in a temporary home."""
    home = tmp_path / "home"
    monkeypatch.setenv("RAYDISTILL_HOME", str(home))
    return make_sweep(home / "sweeps" / "mini")
