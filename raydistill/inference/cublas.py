"""cuBLAS 12, which CTranslate2 asks for on a GPU, found where pip puts it: no LD_LIBRARY_PATH is needed.

torch's wheels for CUDA 13 bring cuBLAS 13 only; the extra `gpu` brings 12 beside it.
"""

import ctypes
import importlib.util
from pathlib import Path

LIBRARIES = ("libcublasLt.so.12", "libcublas.so.12")  # the second needs the first


def preload() -> Path | None:
    """Load cuBLAS 12 from the installed `nvidia-cublas-cu12`; returns its folder, None where it is not installed.

    CTranslate2 opens the library by its bare name at the first call that needs it, and the system's loader then gives
    it what is loaded under that name. OSError where a file is there and cannot be loaded.
    """
    nvidia = importlib.util.find_spec("nvidia")  # a namespace that many packages share, each with its own place
    for place in nvidia.submodule_search_locations or [] if nvidia else []:
        folder = Path(place) / "cublas" / "lib"
        if all((folder / name).is_file() for name in LIBRARIES):
            for name in LIBRARIES:
                ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
            return folder
    return None
