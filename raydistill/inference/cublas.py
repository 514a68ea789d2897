"""Preloads cuBLAS 12 for CTranslate2 from the `nvidia-cublas-cu12` package, without LD_LIBRARY_PATH.

CTranslate2 needs cuBLAS 12; the CUDA 13 wheels of torch contain cuBLAS 13 only. The `gpu` extra installs version 12.
"""

import ctypes
import importlib.util
from pathlib import Path

CUBLAS_LIBRARIES = ("libcublasLt.so.12", "libcublas.so.12")  # in load order: the second depends on the first


def preload() -> Path | None:
    """Load cuBLAS 12 from the installed `nvidia-cublas-cu12`; return its folder, or None if it is not installed.

    CTranslate2 opens the library by its bare name at the first call that needs it. The dynamic loader then returns the
    library that is already loaded under this name.

    Raises:
        OSError: A library file exists but cannot be loaded.
    """
    nvidia = importlib.util.find_spec("nvidia")  # a namespace package: every NVIDIA wheel adds its own folder
    for location in nvidia.submodule_search_locations or [] if nvidia else []:
        folder = Path(location) / "cublas" / "lib"
        if all((folder / name).is_file() for name in CUBLAS_LIBRARIES):
            for name in CUBLAS_LIBRARIES:
                ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
            return folder
    return None
