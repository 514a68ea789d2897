"""The CPU cores and the memory that this process uses."""

import contextlib
import ctypes
import gc
import os
from pathlib import Path

SYSTEM_ROOT = Path("/")  # of the files that Linux reports limits in


def available_cores() -> set[int]:
    """Indices of the CPU cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def available_memory_bytes() -> int:
    """Bytes of memory that this process may use.

    This is the physical memory, or less where a container, a Slurm job or a systemd unit has a lower limit: the lowest
    limit of the process's control group (version 1 or 2) and of the groups around.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in _memory_limit_files():
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int(path.read_text()))
    return min(limits)


def _memory_limit_files() -> list[Path]:
    """The files that may hold a limit of this process's memory, whether or not they exist."""
    groups = SYSTEM_ROOT / "sys" / "fs" / "cgroup"
    files = []
    with contextlib.suppress(OSError):
        for line in (SYSTEM_ROOT / "proc" / "self" / "cgroup").read_text().splitlines():
            hierarchy, _, rest = line.partition(":")
            controllers, _, group = rest.partition(":")
            if "memory" in controllers.split(","):  # version 1
                top, name = groups / "memory", "memory.limit_in_bytes"
            elif hierarchy == "0":  # version 2
                top, name = groups, "memory.max"
            else:
                continue
            folder = top / group.lstrip("/")
            files += [parent / name for parent in (folder, *folder.parents) if parent.is_relative_to(top)]
    return files


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
