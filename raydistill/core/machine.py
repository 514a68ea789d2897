"""The CPU cores and the memory that this process uses."""

import contextlib
import ctypes
import gc
import os
from pathlib import Path


def available_cores() -> set[int]:
    """Indices of the CPU cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def malloc_trim() -> None:
    """Collect garbage and return freed memory to the operating system, if its C library is glibc."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def rss_mb(peak: bool = False) -> float | None:
    """Resident memory of this process in megabytes (10^6 bytes), or None if the system does not report it.

    The current value is read after `malloc_trim`, so that freed memory is not counted. With `peak`: the largest value
    since `reset_peak_rss`, or since the start of the process where Linux does not allow the reset.
    """
    if not peak:
        malloc_trim()
    field = "VmHWM:" if peak else "VmRSS:"
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024 / 1e6
    return None


def reset_peak_rss() -> None:
    """Restart the measurement of peak resident memory; without effect where Linux does not allow the reset."""
    malloc_trim()  # the new peak starts at the current value, which should not include garbage
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
