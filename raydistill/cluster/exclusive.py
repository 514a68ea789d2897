"""A Ray task that has what it runs on to itself: what is timed, and what needs all cores."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from raydistill.cluster import sync
from raydistill.core.console import progress
from raydistill.evaluation.latency import CALM


def alone(
    work: Callable[..., Any], *arguments: Any, device: str, reads: Iterable[Path] = (), writes: Iterable[Path] = ()
) -> Any:
    """`work(*arguments, device, threads)` as a Ray task with nothing of this cluster beside it.

    On a CPU it holds every core of its machine. On a GPU it holds one whole GPU and a core: what another command runs
    on the machine's other GPUs and cores goes on. What runs outside the cluster goes on too (`tell_of_others`).

    Always on the same machine of several, while it is there: what is timed is compared.

    `reads` and `writes`: files and folders that go to that machine and come from it, where machines share no folder.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from raydistill.cluster.start import largest_node

    node = largest_node(device)
    cpus = 1 if device == "cuda" else int(node["Resources"].get("CPU", 1)) or 1
    options: dict[str, Any] = {
        "num_cpus": cpus,
        "num_gpus": 1 if device == "cuda" else 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=True),
    }
    task = ray.remote(**options)(_with_threads)
    reads, writes = list(reads), list(writes)
    sync.keep(*reads)
    found = ray.get(task.remote(work, arguments, device, cpus, reads, writes))
    sync.fetch(*writes)
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
    sync.fetch(*reads)
    found = work(*arguments, device, threads)
    sync.keep(*writes)
    return found


def tell_of_others(cores: float, then: str) -> None:
    """Say so where processes outside the cluster kept `cores` busy while something was timed, and what to do `then`."""
    if cores > CALM:
        progress(
            f"latency: other processes kept up to {cores:.1f} cores of that machine busy meanwhile, so these times are "
            f"too long and may mislead the choice. End those processes; {then}"
        )
