"""Jobs on a cluster that grows and shrinks, and the placement of a data-parallel run's workers."""

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

from benchmarks.scaling import endless_space, synthetic_sweep
from benchmarks.simulated_nodes import OBJECT_STORE_BYTES, cluster_head
from raydistill.cluster.actor_pool import BatchStats, run_batches
from raydistill.cluster.start import ray_cluster
from raydistill.config.run import Run
from raydistill.core.files import write_atomic, write_json_atomic
from raydistill.jobs.train import TrainJob, train_with_ray_train
from raydistill.search.trial import TrialContext
from raydistill.search.tune_search import run_search
from raydistill.training.inputs import RunInputs
from raydistill.training.loop import ReportFn
from raydistill.training.records import RESULT_FILE, RunResult
from raydistill.training.workers import Worker

BATCHES = 90
MIN_BATCHES = 10  # of each node
TRIAL_SECONDS = 20.0  # longer than the start of an actor on a busy machine


def make_slow_batch_function(folder: Path) -> Callable[[int], BatchStats]:
    """A batch function that takes a second per batch and records the node in a file."""
    import ray

    node = ray.get_runtime_context().get_node_id()

    def process_batch(number: int) -> BatchStats:
        time.sleep(1)
        write_atomic(folder / f"{number}.json", json.dumps(node).encode())
        return {"rows": 1.0}

    return process_batch


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_batches_run_on_a_node_that_joins_and_survive_a_node_that_leaves(tmp_path: Path) -> None:
    done: list[int] = []

    def count_by_node() -> Counter[str]:
        return Counter(json.loads((tmp_path / f"{n}.json").read_text()) for n in done)

    with cluster_head() as cluster:
        first = cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES)
        joined = []

        def on_done(stats: BatchStats) -> None:
            done.append(int(stats["batch"]))
            if len(done) == 5:
                joined.append(cluster.add_node(num_cpus=2, object_store_memory=OBJECT_STORE_BYTES))
            # As late as the start of an actor on a busy machine requires
            elif joined and count_by_node()[joined[0].node_id] > MIN_BATCHES:
                cluster.remove_node(joined.pop())

        with ray_cluster():
            run_batches(range(BATCHES), lambda: make_slow_batch_function(tmp_path), device="cpu", on_done=on_done)
    assert sorted(done) == list(range(BATCHES))
    by_node = count_by_node()
    assert set(by_node) > {first.node_id}
    assert len(by_node) == 2
    assert min(by_node.values()) >= MIN_BATCHES


def record_node(
    seconds: float, run: Run, folder: Path, report: ReportFn, inputs: RunInputs, worker: Worker
) -> RunResult:
    """A `train_fn` that sleeps and records each worker's node and times."""
    import ray

    folder.mkdir(parents=True, exist_ok=True)
    start = time.time()
    time.sleep(seconds)
    node = ray.get_runtime_context().get_node_id()
    write_json_atomic(folder / f"worker{worker.rank}.json", {"node": node, "start": start, "end": time.time()})
    metrics = {**inputs.costs, "score": 1.0, "device_hours": 0.0}
    fields = {"number": inputs.number, "params": inputs.params, "metrics": metrics, "steps": 1}
    result = RunResult.parse({"key": folder.name, "status": "done", **fields})
    result.write(folder / RESULT_FILE)
    return result


class NodeChanges(Callback):
    """Adds a node of two CPUs after the first trial, and removes the node after the seventh."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.num_completed = 0
        self.joined: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles every callback, and the copy is not used here."""
        return {}

    def on_trial_complete(self, *_: Any, **__: Any) -> None:
        """Change the nodes; Tune calls this in the main thread, the only one that can start a node."""
        self.num_completed += 1
        if self.num_completed == 1:
            self.joined = self.cluster.add_node(num_cpus=2, object_store_memory=OBJECT_STORE_BYTES)
        if self.num_completed == 7:
            self.cluster.remove_node(self.joined)


def sweep_while_nodes_change(sweep: Path) -> None:
    """Run ten trials while a second node joins and leaves."""
    space = endless_space(10, None, TRIAL_SECONDS, "tune")
    with cluster_head() as cluster:
        cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES)
        with ray_cluster():
            context = TrialContext(space, sweep, synthetic_sweep(), "cpu", partial(record_node, TRIAL_SECONDS))
            run_search(context, [NodeChanges(cluster)])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_trials_run_on_a_node_that_joins_and_survive_a_node_that_leaves(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process can use the token of one cluster only
        pool.apply(sweep_while_nodes_change, (tmp_path,))
    records = [json.loads(path.read_text()) for path in tmp_path.glob("trials/*/worker0.json")]
    assert len(records) == 10
    assert len({record["node"] for record in records}) == 2
    concurrent = [sum(a["start"] <= b["start"] < a["end"] for a in records) for b in records]
    assert max(concurrent) == 3


def run_two_workers_on_half_occupied_nodes(folder: Path) -> None:
    """Start a run of two workers on two nodes of two CPUs, one CPU of each occupied for the first eight seconds."""
    settings = {"name": "pair", "teacher": "t", "dataset": "d", "training": {"workers": 2}}
    with cluster_head() as cluster:
        for name in ("a", "b"):
            cluster.add_node(num_cpus=2, resources={name: 1}, object_store_memory=OBJECT_STORE_BYTES)
        with ray_cluster():
            import ray

            occupants: Any = [
                ray.remote(CpuOccupant).options(num_cpus=1, resources={name: 1}).remote() for name in ("a", "b")
            ]
            ray.get([occupant.wait_until_started.remote() for occupant in occupants])
            threading.Timer(8, lambda: ray.kill(occupants[0])).start()
            run = Run.model_validate(settings)
            train_with_ray_train(TrainJob(run, folder, RunInputs(), partial(record_node, 1.0)))


class CpuOccupant:
    """An actor that occupies a CPU."""

    def wait_until_started(self) -> None:
        """Return once the actor runs."""


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_data_parallel_run_waits_for_one_machine_instead_of_using_two(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(run_two_workers_on_half_occupied_nodes, (tmp_path / "run",))
    nodes = [json.loads((tmp_path / "run" / f"worker{n}.json").read_text())["node"] for n in (0, 1)]
    assert nodes[0] == nodes[1]
