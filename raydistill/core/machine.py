"""Hardware that this process may use."""

import os


def available_cores() -> set[int]:
    """Indices of the CPU cores that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
