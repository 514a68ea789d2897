"""Preloading of cuBLAS 12, tested without a GPU on two small libraries with the names of the package's."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from raydistill.inference.cublas import CUBLAS_LIBRARIES, preload

SCRIPT = """
import ctypes
from raydistill.inference.cublas import preload

print(preload())
print(ctypes.CDLL("libcublas.so.12").answer())
"""


def build_library(folder: Path, name: str, code: str, *needs: str) -> None:
    flags = ["-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), "-x", "c", "-", "-x", "none"]
    subprocess.run(["cc", *flags, *[str(folder / need) for need in needs]], input=code, text=True, check=True)


def test_preloaded_library_is_found_by_its_bare_name(tmp_path: Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    folder = tmp_path / "nvidia" / "cublas" / "lib"
    folder.mkdir(parents=True)
    cublas_lt, cublas = CUBLAS_LIBRARIES
    build_library(folder, cublas_lt, "int half(void) { return 21; }")
    build_library(folder, cublas, "int half(void); int answer(void) { return 2 * half(); }", cublas_lt)
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    environment = {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"} | {"PYTHONPATH": path}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert result.stdout.split() == [str(folder), "42"], result.stderr


@pytest.fixture
def library_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the libraries on a Python path that contains nothing else."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)  # a CUDA build of torch may have imported it
    return tmp_path / "nvidia" / "cublas" / "lib"


def test_nothing_is_loaded_without_both_libraries(library_folder: Path) -> None:
    assert preload() is None
    library_folder.mkdir(parents=True)
    (library_folder / CUBLAS_LIBRARIES[1]).touch()
    assert preload() is None


def test_broken_library_is_an_error(library_folder: Path) -> None:
    library_folder.mkdir(parents=True)
    for name in CUBLAS_LIBRARIES:
        (library_folder / name).write_text("not a library")
    with pytest.raises(OSError, match=r"invalid ELF|too short"):
        preload()
