"""Exclusive Ray tasks: latency measurements, and work that needs every core of a machine."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from raydistill.cluster import snapshots, sync
from raydistill.core.files import write_atomic


def run_exclusive(
    function: Callable[..., Any],
    *args: Any,
    device: str,
    threads: int | None = None,
    input_paths: Iterable[Path] = (),
    output_paths: Iterable[Path] = (),
) -> Any:
    """Run `function(*args, device, threads)` as a Ray task that shares its device with nothing else of this cluster.

    On a CPU the task reserves every core of its machine. On a GPU it reserves one GPU and one core; other GPUs and
    cores of the machine stay available. Processes outside the cluster are not affected (see `BackgroundLoad`).
    While the machine is available, all exclusive tasks run on it, so that their timings are comparable.

    Args:
        function: A function that can be pickled.
        args: Its first arguments.
        device: "cpu" or "cuda".
        threads: The number of CPU threads that the function uses, at most the reserved cores; default: all of them.
        input_paths: Files and folders that are copied to the machine of the task first, if the machines share no
            folder.
        output_paths: Small files that are copied back afterwards.
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
    snapshots.save(*input_paths)
    threads = min(threads or cpus, cpus)
    result, outputs = ray.get(task.remote(function, args, device, threads, input_paths, output_paths))
    for path, content in outputs.items():
        write_atomic(path, content)
    return result


def _run_with_threads(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    device: str,
    threads: int,
    input_paths: list[Path],
    output_paths: list[Path],
) -> tuple[Any, dict[Path, bytes]]:
    """The result of the function, and the contents of its output files if the machines share no folder."""
    from raydistill.training.workers import set_torch_threads

    set_torch_threads(threads)
    snapshots.pull(*input_paths)
    result = function(*args, device, threads)
    return result, {path: path.read_bytes() for path in output_paths} if sync.open_storage() else {}
