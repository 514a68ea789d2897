"""The wheel: complete, and usable outside of the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import raydistill

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the contents of the wheel, which is built from a copy of the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("raydistill", "search_spaces"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    shutil.rmtree(copy)
    return site


def test_wheel_has_every_file_of_the_package(installed):
    def names(folder):
        paths = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        return {path.relative_to(folder).as_posix() for path in paths}

    spaces = {f"search_spaces/{name}" for name in names(ROOT / "search_spaces")}
    package = {name for name in names(ROOT / "raydistill") if not name.startswith("search_spaces/")}
    assert names(installed / "raydistill") == package | spaces
    assert {path.name for path in installed.iterdir()} == {
        "raydistill",
        f"raydistill-{raydistill.__version__}.dist-info",
    }


def test_example_of_the_wheel_is_read_in_another_folder(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "raydistill", "sweep", "example:quickstart", "--set", "epoch=1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 2
    space = installed / "raydistill" / "search_spaces" / "quickstart.yaml"
    assert done.stderr == f"error: {space}: --set epoch=1: unknown key; did you mean 'run.training.epochs'?\n"
