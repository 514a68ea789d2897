"""A Ray cluster of several nodes on one machine, with a meter of its head's CPU time and the cluster's memory."""

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
SAMPLES_PER_MEMORY_SAMPLE = 8  # the memory of many processes takes longer to read than the CPU time of the head
HEAD_PROCESSES = ("driver", "gcs", "rest of the head")
TOKEN = secrets.token_hex(32)  # one per process, because Ray reads the token once


@dataclass
class Meter:
    """Samples of the head's CPU time and the cluster's memory.

    Attributes:
        times: seconds since the epoch.
        cpu_seconds: CPU seconds used until then, for each of `HEAD_PROCESSES`. The driver's are without the CPU time of
            the thread that samples, which is also part of this process.
        memory_gib: unshared resident memory of all processes of the cluster, in GiB.
    """

    times: list[float] = field(default_factory=list)
    cpu_seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in HEAD_PROCESSES})
    memory_gib: list[float] = field(default_factory=list)

    def cpu_between(self, start: float, end: float) -> dict[str, float]:
        """CPU seconds that each of `HEAD_PROCESSES` used between two times."""
        totals = {name: np.interp([start, end], self.times, used) for name, used in self.cpu_seconds.items()}
        return {name: float(after - before) for name, (before, after) in totals.items()}


@contextmanager
def cluster_nodes(count: int, *, cpus: int = 1, gpus: int = 0) -> Iterator[Meter]:
    """Context with a Ray cluster of a head without CPUs and `count` nodes, which this process has joined.

    `cpus` and `gpus` per node are only reported to Ray: they may exceed the machine's.
    """
    with cluster_head() as cluster:
        for _ in range(count):
            cluster.add_node(num_cpus=cpus, num_gpus=gpus, object_store_memory=OBJECT_STORE_BYTES)
        with ray_cluster(), _running_meter(cluster) as meter:
            yield meter


@contextmanager
def cluster_head() -> Iterator[Cluster]:
    """Context with a Ray head without CPUs, to which nodes can be added.

    RAY_ADDRESS names the head, which requires a token. The head and its nodes end with the context.
    """
    environ = {**ENV_DEFAULTS, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    saved = {name: os.environ.get(name) for name in (*environ, "RAY_ADDRESS")}
    os.environ.update(environ)
    Config.initialize("")  # read the environment again, which Ray did when it was imported
    cluster = Cluster()
    try:
        # No port is set for the dashboard, so that the next free one is used if another Ray runs on this machine.
        cluster.add_node(
            num_cpus=0, include_dashboard=True, dashboard_port=None, object_store_memory=OBJECT_STORE_BYTES
        )
        os.environ["RAY_ADDRESS"] = cluster.address
        yield cluster
    finally:
        cluster.shutdown()
        for name, value in saved.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _running_meter(cluster: Cluster) -> Iterator[Meter]:
    meter, stop = Meter(), threading.Event()

    def sample_until_stopped() -> None:
        number = 0
        while not stop.is_set():
            _sample_cpu(meter, cluster)
            if number % SAMPLES_PER_MEMORY_SAMPLE == 0:
                _sample_memory(meter)
            number += 1
            stop.wait(SAMPLE_SECONDS)
        _sample_cpu(meter, cluster)
        _sample_memory(meter)

    thread = threading.Thread(target=sample_until_stopped, daemon=True)
    thread.start()
    try:
        yield meter
    finally:
        stop.set()
        thread.join()


def driver_cpu_seconds() -> float:
    """CPU seconds of this process without those of the calling thread, which is the thread that samples."""
    return time.process_time() - time.thread_time()


def _sample_cpu(meter: Meter, cluster: Cluster) -> None:
    assert cluster.head_node is not None
    used = {"driver": driver_cpu_seconds(), "gcs": 0.0, "rest of the head": 0.0}
    for kind, infos in cluster.head_node.all_processes.items():
        for info in infos:
            name = "gcs" if kind == "gcs_server" else "rest of the head"
            used[name] += _cpu_seconds(info.process.pid)
    meter.times.append(time.time())
    for name, seconds in used.items():
        # The CPU time of a process that has ended is no longer visible; the total must not fall.
        meter.cpu_seconds[name].append(max([seconds, *meter.cpu_seconds[name][-1:]]))


def _sample_memory(meter: Meter) -> None:
    driver = psutil.Process()
    meter.memory_gib.append(sum(map(_unshared_bytes, [driver, *driver.children(recursive=True)])) / 2**30)


def _cpu_seconds(pid: int) -> float:
    """CPU seconds of a process and its children: agents, and Ray's own actors that occupy no CPU."""
    try:
        process = psutil.Process(pid)
        return float(sum(sum(each.cpu_times()[:2]) for each in [process, *process.children(recursive=True)]))
    except psutil.Error:
        return 0.0


def _unshared_bytes(process: psutil.Process) -> float:
    try:
        memory = process.memory_info()
        return float(memory.rss - memory.shared)
    except psutil.Error:
        return 0.0
