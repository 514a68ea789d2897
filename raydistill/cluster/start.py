"""Joining a Ray cluster or starting a local one, without Ray's own output."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raydistill.cluster import sync
from raydistill.cluster.ray_compat import bind_to_loopback
from raydistill.core.console import print_progress
from raydistill.core.errors import UserError
from raydistill.core.paths import raydistill_home
from raydistill.evaluation.metric import WORKING_DIR_ENV

ENV_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    # Ray's C++ code writes to the command's output, and logs restartable actors as errors.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    # Poll workers often: a short trial must not wait seconds until its end is noticed.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Let actors of several trials start at the same time; `StudySearcher` limits the number of trials.
    "TUNE_MAX_PENDING_TRIALS_PG": "32",
    # A trial that fails after its validations reports no score. The study records the failure; the sweep continues.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # Tune's handler would end the search as if it had finished. Without the handler, Ctrl-C ends the command.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TOKENIZERS_PARALLELISM": "false",
    # Bound the memory of reused trial actors: oneDNN caches a kernel per batch shape, and glibc keeps freed tensors
    # in its heap (figures in docs/log.md).
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "MALLOC_MMAP_THRESHOLD_": "4194304",
    # Idle OpenMP threads sleep instead of spinning: next to a busy process, two spinning threads need three times
    # as long as one thread (figures in docs/log.md).
    "OMP_WAIT_POLICY": "PASSIVE",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PYTHONWARNINGS": "ignore",
}
FORWARDED_ENV = (
    *("RAYDISTILL_HOME", sync.STORAGE_ENV, "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_HUB_OFFLINE"),
    *("HF_ENDPOINT", "RAYDISTILL_TIMING_SECONDS", WORKING_DIR_ENV, *ENV_DEFAULTS),
)
OBJECT_STORE_BYTES = 500_000_000


@contextmanager
def ray_cluster(cpus: int | None = None) -> Iterator[None]:
    """Context with a Ray cluster: the one that RAY_ADDRESS names ("auto": on this machine), else a new local one.

    Without RAY_ADDRESS another command's cluster on this machine is never joined, because its CPUs may be busy for
    hours. A new cluster listens on loopback only, requires a token (Ray's default for local clusters, stored in
    ~/.ray/auth_token) and ends with the context. Its dashboard is on: Ray Train's cleanup of a stopped trial queries
    the dashboard's state API, and without it the trial would keep its resources.

    Args:
        cpus: CPUs that a new cluster offers; by default, all CPUs of this machine.

    Raises:
        UserError: No cluster answers at RAY_ADDRESS, or RAYDISTILL_STORAGE is invalid.
    """
    sync.open_storage()  # report an invalid address before anything starts
    for name, value in ENV_DEFAULTS.items():
        os.environ.setdefault(name, value)
    # Ray's workers have other working directories, where the default ./outputs would be another folder.
    os.environ["RAYDISTILL_HOME"] = str(raydistill_home())
    os.environ[WORKING_DIR_ENV] = os.getcwd()
    import ray

    warnings.filterwarnings("ignore", module="ray")
    already_initialized = ray.is_initialized()
    if not already_initialized:
        _join_or_start(cpus)
    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # search.progress reports a failed trial in one line
    try:
        yield
    except KeyboardInterrupt:
        print_progress("interrupted: finished work is kept; ending Ray's processes")
        raise
    finally:
        if not already_initialized:
            ray.shutdown()


def _join_or_start(cpus: int | None) -> None:
    import ray

    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": True}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        # The workers of a running cluster do not inherit this command's environment.
        forwarded = {name: os.environ[name] for name in FORWARDED_ENV if name in os.environ}
        try:
            ray.init(address=address, runtime_env={"env_vars": forwarded}, **quiet)
        except ConnectionError as error:
            raise UserError(
                f"RAY_ADDRESS={address}: no Ray cluster answers at this address ({error}); start one with "
                f"`ray up cluster.yaml`, or unset RAY_ADDRESS to use a local Ray"
            ) from None
        return
    with _silent_stderr(), bind_to_loopback():
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            object_store_memory=OBJECT_STORE_BYTES,
            **quiet,
        )


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Context in which standard error is discarded: Ray's C++ code logs its log level. Errors are still raised."""
    sys.stderr.flush()
    saved, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(devnull)


def cluster_device() -> str:
    """Device of the trials: "cuda" if the cluster has a GPU now, else "cpu"."""
    import ray

    if ray.cluster_resources().get("GPU", 0) >= 1:
        return "cuda"
    if os.environ.get("RAY_ADDRESS"):
        print_progress(
            "no GPU in the cluster: this job runs on CPUs. To use GPUs, stop this command and run it again when GPU "
            "nodes have joined"
        )
    return "cpu"


def largest_node(device: str) -> dict[str, Any]:
    """The alive node with the most CPUs, and with a GPU if `device` is "cuda". Ties are broken by address."""
    import ray

    def size(node: dict[str, Any]) -> tuple[bool, float, str]:
        resources = node["Resources"]
        return device == "cuda" and resources.get("GPU", 0) >= 1, resources.get("CPU", 0), node["NodeManagerAddress"]

    return max((node for node in ray.nodes() if node["Alive"]), key=size)
