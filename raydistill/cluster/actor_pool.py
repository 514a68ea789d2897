"""Planned work on Ray Data: numbered batches go to a pool of actors, and each leaves its file whole or not at all.

Only numbers travel through Ray. An actor reads its batch from the plan on disk and writes its own output, so the driver
and the object store hold no rows, only a few kilobytes of Ray's own per batch. Which outputs exist is which batches are
done: that is all that a resumed job needs to know.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from raydistill.core.console import explained
from raydistill.core.errors import UserError

Facts = dict[str, float]
Work = Callable[[int], Facts]

# A batch whose actor died so often is not the victim of chance: it kills its actor (too little memory, most often).
RETRIES = 5


def run_batches(
    numbers: Sequence[int],
    make: Callable[[], Work],
    *,
    device: str,
    on_done: Callable[[Facts], None],
    threads: int = 1,
) -> None:
    """Do the planned batches `numbers` in a pool of Ray actors that grows with the cluster; returns when all are done.

    `make()` is called once in each actor, and again where one is started anew, and returns the function that does
    batch n, writes its output whole, and tells a few numbers of it (always the same names). `on_done(facts)` is
    called here as batches finish, in any order, with "batch" among the facts. An actor holds a GPU, or `threads`
    CPUs. There are as many as the cluster has room for, and more as nodes join while it runs: Ray Data asks the
    cluster for them too. What a batch raises ends the job (a UserError arrives as one); an actor that dies, or whose
    node leaves, is replaced where there is room and its batch done again, at most `RETRIES` times; then, and where the
    machine of this process leaves the cluster, it is a ConnectionError.
    """
    import ray.data
    from ray.exceptions import RayError, RayTaskError

    if not numbers:
        return

    # Importing it has set the level anew. Its account of an actor's death is a page long; ours is below.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.verbose_stats_logs = False
    # Its 30 minutes are too few for a large teacher's batch on a CPU.
    context.execution_no_progress_timeout_s = -1
    size = min(room_for_actors(device, threads), len(numbers))
    done = ray.data.from_items([{"batch": n} for n in numbers], override_num_blocks=len(numbers)).map_batches(
        _actor(make),
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(min_size=size, max_size=len(numbers)),
        max_task_retries=RETRIES,
        num_cpus=threads,
        num_gpus=1 if device == "cuda" else None,
    )
    try:
        for facts in done.iter_rows():
            if wrong := str(facts.pop("wrong")):
                raise UserError(wrong)
            on_done(facts)
    except RayTaskError:  # an error in a batch, and none of the cluster
        raise
    except RayError as error:
        raise ConnectionError(
            f"the processes at work were lost and could not be replaced ({type(error).__name__}). What is done is "
            f"kept: run the same command again. If it comes to this again, memory is most likely short"
        ) from None


def _actor(make: Callable[[], Work]) -> type:
    """The class of an actor that does what `make()` returns."""

    # Bound here rather than passed as an argument: arguments would go through the object store, from which an actor
    # that is started again may no longer get them.
    class Actor:
        # What is raised here would be told as an actor's death, without its cause; so it waits for the first batch.
        def __init__(self) -> None:
            self.wrong = ""
            self.error: Exception | None = None
            try:
                self.work = make()
            except UserError as error:
                self.wrong = str(error)
            except OSError as error:
                self.wrong = explained(error)
            except Exception as error:
                self.error = error

        # Ray would wrap what is raised here, and tell of an actor that died in its first call as of a lost machine.
        def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
            [number] = rows["batch"]
            if self.error is not None:
                raise self.error
            facts: Facts = {}
            if not self.wrong:
                try:
                    facts = self.work(int(number))
                except UserError as error:
                    self.wrong = str(error)
                except OSError as error:
                    self.wrong = explained(error)
            told = {"batch": number, "wrong": self.wrong, **facts}
            return {name: np.array([value]) for name, value in told.items()}

    return Actor


def resources(device: str, threads: int, gpus: float = 1) -> dict[str, float]:
    """What a process holds of Ray's resources."""
    return {"CPU": threads} | ({"GPU": gpus} if device == "cuda" else {})


def places(device: str, threads: int, gpus: float = 1) -> int:
    """How many processes of `threads` CPUs, and of `gpus` of a GPU where `device` is cuda, the cluster can hold."""
    return sum(places_by_node(device, threads, gpus))


def places_by_node(device: str, threads: int, gpus: float = 1) -> list[int]:
    """The same for each of its living nodes."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    by_cpus = [int(node.get("CPU", 0) // threads) for node in nodes]
    on_one = int(1 / gpus + 1e-9)  # Ray gives a share of one GPU, never of two
    by_gpus = [on_one * int(node.get("GPU", 0)) for node in nodes] if device == "cuda" else by_cpus
    return [min(pair) for pair in zip(by_cpus, by_gpus, strict=True)]


def room_for_actors(device: str, threads: int) -> int:
    """Actors that the cluster can hold at once: one per GPU, or per `threads` CPUs of a node.

    UserError where no node can hold one: Ray would wait for ever without a word.
    """
    import ray

    room = places(device, threads)
    if not room:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        most = max((int(node.get("CPU", 0)) for node in nodes), default=0)
        raise UserError(
            f"no machine of the cluster has {threads} CPUs{' and a GPU' if device == 'cuda' else ''} for a teacher "
            f"(the largest has {most} CPUs); lower --threads"
        )
    return room
