"""A pool of actors on a cluster that grows and shrinks while it works."""

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.nodes import STORE_BYTES, head
from raydistill.cluster.planned import Facts, run_batches
from raydistill.cluster.start import cluster
from raydistill.config.files import write_atomic

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
