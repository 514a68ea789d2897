"""Jobs on a cluster that grows and shrinks while they work, and where a data-parallel run's workers go."""

import json
import multiprocessing
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from ray.tune import Callback

from benchmarks.nodes import STORE_BYTES, head
from benchmarks.scaling import endless, made_up
from raydistill.cluster.actor_pool import Facts, run_batches
from raydistill.cluster.start import cluster
from raydistill.config.run import Run
from raydistill.core.files import write_atomic, write_json_atomic
from raydistill.jobs.train import train_with_ray_train
from raydistill.search.tune_search import search
from raydistill.training.inputs import Inputs
from raydistill.training.loop import Report
from raydistill.training.workers import Worker

BATCHES = 60


def second_of_work(folder: Path) -> Callable[[int], Facts]:
    """Batches of a second, each of which leaves a file with the node that did it."""
    import ray

    node = ray.get_runtime_context().get_node_id()

    def work(number: int) -> Facts:
        time.sleep(1)
        write_atomic(folder / f"{number}.json", json.dumps(node).encode())
        return {"rows": 1.0}

    return work


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_node_that_joins_is_used_and_one_that_leaves_takes_no_batch_with_it(tmp_path: Path) -> None:
    done: list[int] = []
    with head() as started:
        first = started.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        joined = []

        def on_done(facts: Facts) -> None:
            done.append(int(facts["batch"]))
            if len(done) == 5:
                joined.append(started.add_node(num_cpus=2, object_store_memory=STORE_BYTES))
            if joined and len(done) == 45:
                started.remove_node(joined.pop())

        with cluster():
            run_batches(range(BATCHES), lambda: second_of_work(tmp_path), device="cpu", on_done=on_done)
    assert sorted(done) == list(range(BATCHES))
    by_node = Counter(json.loads((tmp_path / f"{n}.json").read_text()) for n in range(BATCHES))
    assert set(by_node) > {first.node_id}
    assert len(by_node) == 2
    assert min(by_node.values()) >= 10


def note_node(seconds: float, run: Run, folder: Path, report: Report, inputs: Inputs, worker: Worker) -> dict[str, Any]:
    """Work of some seconds that leaves the node on which each worker did it."""
    import ray

    folder.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    time.sleep(seconds)
    node = ray.get_runtime_context().get_node_id()
    write_json_atomic(folder / f"worker{worker.rank}.json", {"node": node, "begun": begun, "ended": time.time()})
    metrics = {**inputs.costs, "score": 1.0, "gpu_hours": 0.0}
    result = {"key": folder.name, "status": "done", "metrics": metrics, "steps": 1, **inputs.note}
    write_json_atomic(folder / "result.json", result)
    return result


class Changes(Callback):
    """A node of two CPUs joins after the first trial, and leaves after the seventh."""

    def __init__(self, started: Cluster) -> None:
        self.started = started
        self.over = 0
        self.joined: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps a copy of every callback, of which nobody asks anything here."""
        return {}

    def on_trial_complete(self, *_: Any, **__: Any) -> None:
        """In the main thread, where alone a node may be started."""
        self.over += 1
        if self.over == 1:
            self.joined = self.started.add_node(num_cpus=2, object_store_memory=STORE_BYTES)
        if self.over == 7:
            self.started.remove_node(self.joined)


def sweep_while_nodes_come_and_go(sweep: Path) -> None:
    """Ten trials on a node of one CPU, which another joins and leaves: long enough for an actor to start meanwhile."""
    space = endless(10, None, 8.0, "tune")
    with head() as started:
        started.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        with cluster():
            search(space, sweep, made_up(), "cpu", [Changes(started)], partial(note_node, 8.0))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_sweep_uses_a_node_that_joins_and_gets_over_one_that_leaves(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as apart:  # a process takes the token of one cluster only
        apart.apply(sweep_while_nodes_come_and_go, (tmp_path,))
    stamps = [json.loads(path.read_text()) for path in tmp_path.glob("trials/*/worker0.json")]
    assert len(stamps) == 10
    assert len({one["node"] for one in stamps}) == 2
    together = [sum(a["begun"] <= b["begun"] < a["ended"] for a in stamps) for b in stamps]
    assert max(together) == 3


def run_of_two_workers_where_two_machines_are_half_taken(folder: Path) -> None:
    """Two machines of two CPUs, on each of which a CPU is held until the run has waited for some seconds."""
    settings = {"name": "pair", "teacher": "t", "dataset": "d", "training": {"workers": 2}}
    with head() as started:
        for name in ("a", "b"):
            started.add_node(num_cpus=2, resources={name: 1}, object_store_memory=STORE_BYTES)
        with cluster():
            import ray

            held: Any = [ray.remote(Held).options(num_cpus=1, resources={name: 1}).remote() for name in ("a", "b")]
            ray.get([one.here.remote() for one in held])
            threading.Timer(8, lambda: ray.kill(held[0])).start()
            train_with_ray_train(Run.model_validate(settings), folder, Inputs(), work=partial(note_node, 1.0))


class Held:
    """What holds a CPU."""

    def here(self) -> None:
        """Returns once it is."""


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_data_parallel_run_waits_for_one_machine_rather_than_be_split_over_two(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as apart:
        apart.apply(run_of_two_workers_where_two_machines_are_half_taken, (tmp_path / "run",))
    nodes = [json.loads((tmp_path / "run" / f"worker{n}.json").read_text())["node"] for n in (0, 1)]
    assert nodes[0] == nodes[1]
