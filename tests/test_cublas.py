"""cuBLAS 12 as CTranslate2 finds it: two tiny libraries of its names in the place of the package's, and no GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from raydistill.inference.cublas import LIBRARIES, preload

ASK = """
import ctypes
from raydistill.inference.cublas import preload

print(preload())
print(ctypes.CDLL("libcublas.so.12").answer())
"""


def library(folder: Path, name: str, code: str, *needs: str) -> None:
    flags = ["-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), "-x", "c", "-", "-x", "none"]
    subprocess.run(["cc", *flags, *[str(folder / need) for need in needs]], input=code, text=True, check=True)


def test_what_was_preloaded_answers_under_its_bare_name(tmp_path: Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler here")
    folder = tmp_path / "nvidia" / "cublas" / "lib"
    folder.mkdir(parents=True)
    light, cublas = LIBRARIES
    library(folder, light, "int half(void) { return 21; }")
    library(folder, cublas, "int half(void); int answer(void) { return 2 * half(); }", light)
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    here = {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"} | {"PYTHONPATH": path}
    asked = subprocess.run([sys.executable, "-c", ASK], env=here, capture_output=True, text=True, check=False)
    assert asked.stdout.split() == [str(folder), "42"], asked.stderr


@pytest.fixture
def only_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of libraries in a place that is the only one in which Python looks for packages."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)  # a CUDA build of torch has imported its own
    return tmp_path / "nvidia" / "cublas" / "lib"


def test_without_the_package_nothing_is_loaded(only_here: Path) -> None:
    assert preload() is None
    only_here.mkdir(parents=True)
    (only_here / LIBRARIES[1]).touch()  # the one without the other
    assert preload() is None


def test_a_broken_library_is_no_silence(only_here: Path) -> None:
    only_here.mkdir(parents=True)
    for name in LIBRARIES:
        (only_here / name).write_text("no library")
    with pytest.raises(OSError, match=r"invalid ELF|too short"):
        preload()
