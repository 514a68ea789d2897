"""What this process may use of its machine."""

import os


def own_cores() -> set[int]:
    """The numbers of the CPU cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
