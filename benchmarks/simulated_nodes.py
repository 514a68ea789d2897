"""A Ray cluster of several nodes on one machine, and what its head uses."""

import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import psutil
from ray._raylet import Config  # type: ignore[attr-defined]
from ray.cluster_utils import Cluster

from raydistill.cluster.start import ENV_DEFAULTS, ray_cluster

OBJECT_STORE_BYTES = 100_000_000
SAMPLE_SECONDS = 0.25
HEAD = ("driver", "gcs", "rest of the head")
TOKEN = secrets.token_hex(32)  # one for the process: Ray reads it once


@dataclass
class Meter:
    """CPU seconds of the head's processes so far, and resident GiB of the whole cluster, by the clock."""

    at: list[float] = field(default_factory=list)
    cpu: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in HEAD})
    gib: list[float] = field(default_factory=list)

    def between(self, begin: float, end: float) -> dict[str, float]:
        """CPU seconds that each of `HEAD` used between two moments of the clock."""
        ends = {name: np.interp([begin, end], self.at, used) for name, used in self.cpu.items()}
        return {name: float(late - early) for name, (early, late) in ends.items()}


@contextmanager
def cluster_nodes(count: int, *, cpus: int = 1, gpus: int = 0) -> Iterator[Meter]:
    """A head without CPUs and `count` nodes that offer so much each, joined as the commands join a cluster.

    What they offer is only said to Ray: more CPUs than there are, and GPUs where there are none.
    """
    with cluster_head() as started:
        for _ in range(count):
            started.add_node(num_cpus=cpus, num_gpus=gpus, object_store_memory=OBJECT_STORE_BYTES)
        with ray_cluster(), _metered(started) as meter:
            yield meter


@contextmanager
def cluster_head() -> Iterator[Cluster]:
    """A head without CPUs, to which nodes may be added. RAY_ADDRESS names it; it asks for a token.

    It and its nodes end with the block.
    """
    mine = {**ENV_DEFAULTS, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    kept = {name: os.environ.get(name) for name in (*mine, "RAY_ADDRESS")}
    os.environ.update(mine)
    Config.initialize("")  # Ray has read the environment when it was imported
    started = Cluster()
    try:
        # No port is named for the dashboard, so that it takes the next where another Ray has its own.
        started.add_node(
            num_cpus=0, include_dashboard=True, dashboard_port=None, object_store_memory=OBJECT_STORE_BYTES
        )
        os.environ["RAY_ADDRESS"] = started.address
        yield started
    finally:
        started.shutdown()
        for name, value in kept.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _metered(started: Cluster) -> Iterator[Meter]:
    meter, over = Meter(), threading.Event()

    def watch() -> None:
        while True:
            _sample(meter, started)
            if over.wait(SAMPLE_SECONDS):
                _sample(meter, started)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield meter
    finally:
        over.set()
        watcher.join()


def _sample(meter: Meter, started: Cluster) -> None:
    me = psutil.Process()
    assert started.head_node is not None
    used = {"driver": sum(me.cpu_times()[:2]), "gcs": 0.0, "rest of the head": 0.0}
    for kind, infos in started.head_node.all_processes.items():
        for info in infos:
            name = "gcs" if kind == "gcs_server" else "rest of the head"
            used[name] += _cpu(info.process.pid)
    meter.at.append(time.time())
    for name, seconds in used.items():
        # A process that has ended takes its seconds with it; what was used stays used.
        meter.cpu[name].append(max([seconds, *meter.cpu[name][-1:]]))
    meter.gib.append(sum(map(_unshared, [me, *me.children(recursive=True)])) / 2**30)


def _cpu(pid: int) -> float:
    """CPU seconds of a process and of what it started: agents, and Ray's own actors that need no CPU to be placed."""
    try:
        process = psutil.Process(pid)
        return float(sum(sum(one.cpu_times()[:2]) for one in [process, *process.children(recursive=True)]))
    except psutil.Error:
        return 0.0


def _unshared(process: psutil.Process) -> float:
    try:
        memory = process.memory_info()
        return float(memory.rss - memory.shared)
    except psutil.Error:
        return 0.0
