"""A Ray task that has its machine to itself: what is timed, and what needs all cores."""

from collections.abc import Callable
from typing import Any


def alone(work: Callable[..., Any], *arguments: Any, device: str) -> Any:
    """`work(*arguments, device, threads)` as a Ray task that leaves no room for anything else on its machine."""
    import ray

    from raydistill.cluster.start import cpus_of_a_node

    cpus = 1 if device == "cuda" else cpus_of_a_node()
    resources: dict[str, Any] = {"num_cpus": cpus, "num_gpus": 1 if device == "cuda" else 0}
    task = ray.remote(**resources)(_with_threads)
    return ray.get(task.remote(work, arguments, device, cpus))


def _with_threads(work: Callable[..., Any], arguments: tuple[Any, ...], device: str, threads: int) -> Any:
    import torch

    torch.set_num_threads(threads)
    return work(*arguments, device, threads)
