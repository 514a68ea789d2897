"""Exclusive Ray tasks: latency measurements, and work that needs every core of a machine."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from raydistill.cluster import snapshots, sync
from raydistill.core.console import print_progress, progress_to
from raydistill.core.files import write_atomic

MAX_RETRIES = 3  # Ray's default for tasks


@dataclass(frozen=True)
class _Call:
    """A call of `run_exclusive`, as its task receives it."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    device: str
    threads: int
    input_paths: list[Path]
    output_paths: list[Path]


@dataclass(frozen=True)
class _Outcome:
    """The result of the function, and the contents of its output files if the machines share no folder."""

    result: Any
    outputs: dict[Path, bytes]


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
    While the machine is available, all exclusive tasks run on it, so that their timings are comparable. Lines that the
    function prints with `print_progress` appear in the output of this process.

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
        "max_retries": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=True),
    }
    call = _Call(function, args, device, min(threads or cpus, cpus), list(input_paths), list(output_paths))
    snapshots.save(*call.input_paths)
    outcome = _run_task(ray.remote(**options)(_report_and_run), call)
    for path, content in outcome.outputs.items():
        write_atomic(path, content)
    return outcome.result


def _run_task(task: Any, call: _Call) -> _Outcome:
    """Print the lines of a task and return its outcome; a task whose worker process is lost is started again.

    Ray's own retry of a generator skips as many outputs as the first attempt had, the outcome among them.
    """
    from ray.exceptions import RayError, RayTaskError

    for _ in range(MAX_RETRIES):
        try:
            return _read_outcome(task.remote(call))
        except RayTaskError:  # raised by the function
            raise
        except RayError as error:
            print_progress(f"a worker process was lost ({type(error).__name__}); its task is started again")
    return _read_outcome(task.remote(call))


def _read_outcome(references: Iterable[Any]) -> _Outcome:
    """Print the lines among the outputs of a task, and return its outcome."""
    import ray

    outcome: _Outcome | None = None
    for reference in references:
        item = ray.get(reference)
        if isinstance(item, _Outcome):
            outcome = item
        else:
            print_progress(item)
    assert outcome is not None
    return outcome


def _report_and_run(call: _Call) -> Iterator[str | _Outcome]:
    """Lines of progress while the function runs in a thread, then the outcome."""
    lines: SimpleQueue[str | None] = SimpleQueue()
    with progress_to(lines.put), ThreadPoolExecutor(1) as executor:
        future = executor.submit(_run, call)
        future.add_done_callback(lambda _: lines.put(None))
        while (line := lines.get()) is not None:
            yield line
        yield future.result()


def _run(call: _Call) -> _Outcome:
    from raydistill.training.workers import set_torch_threads

    set_torch_threads(call.threads)  # in the thread that computes: OpenMP keeps the number by thread
    snapshots.pull(*call.input_paths)
    result = call.function(*call.args, call.device, call.threads)
    outputs = {path: path.read_bytes() for path in call.output_paths} if sync.open_storage() else {}
    return _Outcome(result, outputs)
