"""A Ray task that has its machine to itself: what is timed, and what needs all cores."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from raydistill.cluster import storage


def alone(
    work: Callable[..., Any], *arguments: Any, device: str, reads: Iterable[Path] = (), writes: Iterable[Path] = ()
) -> Any:
    """`work(*arguments, device, threads)` as a Ray task that leaves no room for anything else on its machine.

    `reads` and `writes`: files and folders that go to that machine and come from it, where machines share no folder.
    """
    import ray

    from raydistill.cluster.start import cpus_of_a_node

    cpus = 1 if device == "cuda" else cpus_of_a_node()
    resources: dict[str, Any] = {"num_cpus": cpus, "num_gpus": 1 if device == "cuda" else 0}
    task = ray.remote(**resources)(_with_threads)
    reads, writes = list(reads), list(writes)
    storage.keep(*reads)
    found = ray.get(task.remote(work, arguments, device, cpus, reads, writes))
    storage.fetch(*writes)
    return found


def _with_threads(
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    device: str,
    threads: int,
    reads: list[Path],
    writes: list[Path],
) -> Any:
    import torch

    torch.set_num_threads(threads)
    storage.fetch(*reads)
    found = work(*arguments, device, threads)
    storage.keep(*writes)
    return found
