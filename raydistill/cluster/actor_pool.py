"""Numbered batches on a pool of Ray Data actors; every batch writes one complete output file or none.

Only batch numbers and a few statistics travel through Ray. An actor reads its batch from the plan on disk and writes
the output itself, so that neither the driver nor the object store holds any rows. The output files that exist record
which batches are finished; a resumed job needs no other state.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from raydistill.core.errors import UserError, describe_os_error

BatchStats = dict[str, float]
BatchFunction = Callable[[int], BatchStats]

# A batch whose actor was killed this often is most likely the cause: it usually needs more memory than there is.
MAX_TASK_RETRIES = 5


def run_batches(
    batch_numbers: Sequence[int],
    make_function: Callable[[], BatchFunction],
    *,
    device: str,
    on_done: Callable[[BatchStats], None],
    threads: int = 1,
) -> None:
    """Process batches on a pool of Ray actors that grows with the cluster, and return when all are finished.

    The pool has as many actors as the cluster can hold. It grows when nodes join, and Ray Data also requests nodes
    from the autoscaler. A batch whose actor is killed, or whose node leaves, is retried up to `MAX_TASK_RETRIES` times.

    Args:
        batch_numbers: The batches to process.
        make_function: Called once in every actor, and again in a restarted actor. Returns the function that processes
            the batch with a given number, writes its output atomically and returns statistics (always with the same
            keys).
        device: "cuda" gives each actor one GPU, "cpu" gives each actor `threads` CPUs.
        on_done: Called in this process with the statistics of each finished batch, in order of completion; the
            batch's number is added under the key "batch".
        threads: CPUs per actor.

    Raises:
        UserError: A batch raised a UserError or an OSError, or no node can hold an actor.
        ConnectionError: Actors were lost and could not be restarted, or this node left the cluster.
    """
    import ray.data
    from ray.exceptions import RayError, RayTaskError

    if not batch_numbers:
        return
    _configure_ray_data()
    size = min(max_actors(device, threads), len(batch_numbers))
    rows = [{"batch": number} for number in batch_numbers]
    done = ray.data.from_items(rows, override_num_blocks=len(batch_numbers)).map_batches(
        _make_actor_class(make_function),
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(min_size=size, max_size=len(batch_numbers)),
        max_task_retries=MAX_TASK_RETRIES,
        num_cpus=threads,
        num_gpus=1 if device == "cuda" else None,
    )
    try:
        for stats in done.iter_rows():
            if error_message := str(stats.pop("error_message")):
                raise UserError(error_message)
            on_done(stats)
    except RayTaskError:  # raised by a batch, not by the cluster
        raise
    except RayError as error:
        raise ConnectionError(
            f"worker processes were lost and could not be restarted ({type(error).__name__}); finished batches are "
            f"kept. Run the same command again; if this repeats, the workers probably run out of memory"
        ) from None


def _configure_ray_data() -> None:
    """Silence Ray Data and disable its progress timeout."""
    import ray.data

    # Importing ray.data resets the level. Its report of a lost actor is a page long; run_batches reports it instead.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.verbose_stats_logs = False
    # The default of 30 minutes is too short for a batch of a large teacher on a CPU.
    context.execution_no_progress_timeout_s = -1


def _make_actor_class(make_function: Callable[[], BatchFunction]) -> type:
    """Return the class of an actor that processes batches with the function that `make_function()` returns."""

    # `make_function` is bound by closure: a constructor argument would be stored in the object store, from which a
    # restarted actor may no longer be able to read.
    class Actor:
        # Ray reports an error raised here as the loss of an actor, without its cause. The error is kept and raised by
        # the first batch.
        def __init__(self) -> None:
            self.error_message = ""
            self.error: Exception | None = None
            try:
                self.batch_function = make_function()
            except UserError as error:
                self.error_message = str(error)
            except OSError as error:
                self.error_message = describe_os_error(error)
            except Exception as error:
                self.error = error

        # User errors are returned, not raised: Ray would wrap them, or report them as the loss of a node if they
        # happen in an actor's first call.
        def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
            [number] = rows["batch"]
            if self.error is not None:
                raise self.error
            stats: BatchStats = {}
            if not self.error_message:
                try:
                    stats = self.batch_function(int(number))
                except UserError as error:
                    self.error_message = str(error)
                except OSError as error:
                    self.error_message = describe_os_error(error)
            row = {"batch": number, "error_message": self.error_message, **stats}
            return {name: np.array([value]) for name, value in row.items()}

    return Actor


def worker_resources(device: str, threads: int, gpus: float = 1) -> dict[str, float]:
    """Ray resources of one worker process: `threads` CPUs and, if `device` is "cuda", `gpus` of a GPU."""
    return {"CPU": threads} | ({"GPU": gpus} if device == "cuda" else {})


def slots(device: str, threads: int, gpus: float = 1) -> int:
    """Number of processes with `worker_resources(device, threads, gpus)` that the cluster can hold at once."""
    return sum(slots_per_node(device, threads, gpus))


def slots_per_node(device: str, threads: int, gpus: float = 1) -> list[int]:
    """Number of processes with `worker_resources(device, threads, gpus)` that each alive node can hold at once."""
    nodes = _alive_node_resources()
    by_cpus = [int(resources.get("CPU", 0) // threads) for resources in nodes]
    if device != "cuda":
        return by_cpus
    per_gpu = int(1 / gpus + 1e-9)  # Ray places a fraction on one GPU, never across two
    by_gpus = [per_gpu * int(resources.get("GPU", 0)) for resources in nodes]
    return [min(pair) for pair in zip(by_cpus, by_gpus, strict=True)]


def max_actors(device: str, threads: int) -> int:
    """Number of actors that the cluster can hold at once: one per GPU, or one per `threads` CPUs of a node.

    Raises:
        UserError: No node can hold an actor. Ray would wait forever without a message.
    """
    count = slots(device, threads)
    if not count:
        largest = max((int(resources.get("CPU", 0)) for resources in _alive_node_resources()), default=0)
        needed = f"{threads} {'CPU' if threads == 1 else 'CPUs'}{' and a GPU' if device == 'cuda' else ''}"
        # Only `raydistill pseudolabel` sets more than one CPU per teacher
        remedy = "lower --threads" if threads > 1 else "start Ray with at least that on one machine"
        raise UserError(
            f"no machine of the cluster has {needed} for a teacher (the largest has {largest} CPUs); {remedy}"
        )
    return count


def _alive_node_resources() -> list[dict[str, float]]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
