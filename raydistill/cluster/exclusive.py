"""A Ray task that has what it runs on to itself: what is timed, and what needs all cores."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from raydistill.cluster import sync
from raydistill.core.console import print_progress
from raydistill.evaluation.latency import MAX_BACKGROUND_CORES


def run_exclusive(
    function: Callable[..., Any],
    *args: Any,
    device: str,
    input_paths: Iterable[Path] = (),
    output_paths: Iterable[Path] = (),
) -> Any:
    """`work(*arguments, device, threads)` as a Ray task with nothing of this cluster beside it.

    On a CPU it holds every core of its machine. On a GPU it holds one whole GPU and a core: what another command runs
    on the machine's other GPUs and cores goes on. What runs outside the cluster goes on too (`warn_background_load`).

    Always on the same machine of several, while it is there: what is timed is compared.

    `input_paths` and `output_paths`: files and folders that go to that machine and come from it, where machines
    share no folder.
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
    task = ray.remote(**options)(_run_with_threads)
    input_paths, output_paths = list(input_paths), list(output_paths)
    sync.push(*input_paths)
    found = ray.get(task.remote(function, args, device, cpus, input_paths, output_paths))
    sync.pull(*output_paths)
    return found


def _run_with_threads(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    device: str,
    threads: int,
    input_paths: list[Path],
    output_paths: list[Path],
) -> Any:
    import torch

    torch.set_num_threads(threads)
    sync.pull(*input_paths)
    found = function(*args, device, threads)
    sync.push(*output_paths)
    return found


def warn_background_load(cores: float, remedy: str) -> None:
    """Say so where processes outside the cluster kept `cores` busy while something was timed, and what to do
    `remedy`."""
    if cores > MAX_BACKGROUND_CORES:
        print_progress(
            f"latency: other processes kept up to {cores:.1f} cores of that machine busy meanwhile, so these times are "
            f"too long and may mislead the choice. End those processes; {remedy}"
        )
