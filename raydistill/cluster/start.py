"""Joining or starting Ray, quietly."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raydistill.cluster import sync
from raydistill.core.console import home, progress
from raydistill.core.errors import UserError

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    # Its C++ part writes into the command's output, and calls an error what is none (actors that may be restarted).
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    # One worker's health is asked about often, since a short trial must not wait seconds for its end to be seen.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Actors of several trials may start at the same time; how many are proposed is StudySearch's to say.
    "TUNE_MAX_PENDING_TRIALS_PG": "32",
    # A trial that failed after its validations has no score: that is the study's to record, not the end of the sweep.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TOKENIZERS_PARALLELISM": "false",
    # Batches of ever new shapes made reused trial actors grow without end: oneDNN keeps a kernel per shape, and glibc
    # keeps freed tensors in its heap (docs/log.md has the figures).
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "MALLOC_MMAP_THRESHOLD_": "4194304",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PYTHONWARNINGS": "ignore",
}
PASSED_ON = (
    *("RAYDISTILL_HOME", sync.STORAGE, "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_HUB_OFFLINE"),
    *("HF_ENDPOINT", *QUIET),
)
OBJECT_STORE_BYTES = 500_000_000


@contextmanager
def cluster(cpus: int | None = None) -> Iterator[None]:
    """Join the Ray cluster that RAY_ADDRESS names ("auto": the one on this machine), else start one for this block.

    Another command's cluster on the same machine is never joined unasked: its CPUs may be taken for hours.

    A cluster that is started here listens on loopback only, asks for a token (Ray's default for local clusters, kept in
    ~/.ray/auth_token), and ends with the block. The dashboard stays on: without it a trial that a
    scheduler stops keeps its resources (its cleaner asks the dashboard's state API).
    """
    sync.opened()  # an address that will not do is told before anything starts
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    # Ray's workers run in folders of their own, where the default of ./outputs would be another place.
    os.environ["RAYDISTILL_HOME"] = str(home())
    import ray

    warnings.filterwarnings("ignore", module="ray")
    already = ray.is_initialized()
    if not already:
        _join_or_start(cpus)
    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # cluster.watch tells of a trial's death in one line
    try:
        yield
    finally:
        if not already:
            ray.shutdown()


def _join_or_start(cpus: int | None) -> None:
    import ray

    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": True}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        # A cluster that runs already has its own environment: what this command reads must reach its workers too.
        mine = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        try:
            ray.init(address=address, runtime_env={"env_vars": mine}, **quiet)
        except ConnectionError as error:
            raise UserError(
                f"RAY_ADDRESS={address}: no Ray cluster answers there ({error}); start one with `ray up cluster.yaml`, "
                f"or unset RAY_ADDRESS to work on this machine alone"
            ) from None
        return
    with _silent_stderr(), _on_loopback():
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            object_store_memory=OBJECT_STORE_BYTES,
            **quiet,
        )


@contextmanager
def _on_loopback() -> Iterator[None]:
    """A block in which a Ray that starts takes 127.0.0.1 for its node's address, as it does on macOS and Windows.

    So all its ports listen there only; `ray.init(_node_ip_address="127.0.0.1")` would be turned into the machine's
    address again. Workers know by the environment, this process by Ray's constant, which was read at the import.
    """
    from ray._private import ray_constants

    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    kept = os.environ.get(name)
    os.environ[name] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        os.environ.pop(name)
        if kept is not None:
            os.environ[name] = kept


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """What C++ writes while Ray starts (one line, that its log level was set) is dropped; errors are raised anyway."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def device() -> str:
    """What trials run on: "cuda" where the cluster has a GPU, else "cpu"."""
    import ray

    if ray.cluster_resources().get("GPU", 0) >= 1:
        return "cuda"
    if os.environ.get("RAY_ADDRESS"):
        progress("no GPU is in the cluster now: this job runs on CPUs. If GPUs are to come, end it and begin it then")
    return "cpu"


def largest_node(device: str) -> dict[str, Any]:
    """The living node with a GPU, where `device` is cuda, and most CPUs; of equal ones always the same."""
    import ray

    def size(node: dict[str, Any]) -> tuple[bool, float, str]:
        resources = node["Resources"]
        return device == "cuda" and resources.get("GPU", 0) >= 1, resources.get("CPU", 0), node["NodeManagerAddress"]

    return max((node for node in ray.nodes() if node["Alive"]), key=size)
