"""Training runs on Ray: the Ray Train launcher, and the worker that both launchers share.

Ray Train serves GPUs, several workers and the `train` command; reused Ray Tune actors serve short CPU trials. Both call
`training.run.train` with a `report` callback, and both resume from the run's folder after a failure.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from raydistill.cluster import snapshots, sync
from raydistill.cluster.actor_pool import slots, slots_per_node, worker_resources
from raydistill.cluster.drain import DrainMonitor
from raydistill.config.run import Run
from raydistill.core.errors import TransientError, UserError
from raydistill.training.inputs import RunInputs, input_paths
from raydistill.training.loop import Preempted, ReportFn
from raydistill.training.records import RESULT_FILE, RunResult
from raydistill.training.run import train
from raydistill.training.workers import Worker, set_torch_threads

Metrics = dict[str, Any]
StopCheck = Callable[[], str | None]
TrainFn = Callable[..., RunResult | None]


@dataclass(frozen=True)
class TrainJob:
    """A run with everything that a launcher needs to execute it.

    Attributes:
        run: The run's settings.
        folder: The run's folder.
        inputs: Label sets, teacher cache and costs that were prepared for the run.
        train_fn: What each worker executes: `training.run.train`, or a function with its signature and output files.
        check_stop: Called in the main worker after each validation; returns a reason to stop the run, or None.
    """

    run: Run
    folder: Path
    inputs: RunInputs
    train_fn: TrainFn = train
    check_stop: StopCheck | None = None

    @property
    def input_paths(self) -> list[Path]:
        """The folders that the run reads: teacher, checkpoint to copy from, label sets."""
        return [*input_paths(self.run), *self.inputs.label_folders.values()]


def resolve_launcher(run: Run, device: str) -> str:
    """The run's launcher, "tune" or "train"; `auto` is "tune" for a run on a CPU with one worker, else "train".

    Raises:
        UserError: The launcher is "tune" and the run has several workers.
    """
    if run.training.launcher != "auto":
        if run.training.launcher == "tune" and run.training.workers > 1:
            raise UserError("training.launcher tune runs one worker; use train, or set training.workers to 1")
        return run.training.launcher
    return "tune" if device == "cpu" and run.training.workers == 1 else "train"


def check_capacity(run: Run, device: str) -> None:
    """Raise a UserError if the cluster can never hold the run's workers: Ray would wait forever without a message."""
    training = run.training
    capacity = slots(device, training.threads, training.gpus)
    if capacity < training.workers:
        gpu = "a GPU" if training.gpus == 1 else f"{training.gpus:g} of a GPU"
        cpus = f"{training.threads} {'CPU' if training.threads == 1 else 'CPUs'}"
        each = f"{cpus} of one machine{f' and {gpu}' if device == 'cuda' else ''}"
        if training.workers == 1:  # at most one GPU, so that any machine with a GPU and the CPUs has room
            raise UserError(
                f"the run needs {each}, and no machine of the cluster has that; lower training.threads, or add such "
                f"a machine"
            )
        raise UserError(
            f"{training.workers} workers need {each} each, and the cluster has room for {capacity}; "
            f"lower training.workers or training.threads"
        )


def train_with_ray_train(
    job: TrainJob, *, device: str = "cpu", retries: int = 2, callbacks: list[Any] | None = None
) -> RunResult:
    """Execute a run as a Ray Train job. Failed workers are restarted and resume from the run's folder.

    Args:
        job: The run. Its folder must be visible to every node, or lie below the home of a shared storage.
        device: "cuda" or "cpu".
        retries: How often failed workers are restarted.
        callbacks: Ray Train callbacks.

    Returns:
        The run's result.

    Raises:
        UserError: The run cannot succeed by a retry.
        OSError, RuntimeError: A worker failed more than `retries` times.
    """
    from ray.train import TrainingFailedError

    trainer = _make_trainer(job, device, retries, callbacks or [])
    try:
        fit_result: Any = trainer.fit()
    except TrainingFailedError as error:
        raise _worker_error(error) from None
    if fit_result.return_value:
        raise UserError(fit_result.return_value)
    snapshots.pull(job.folder)
    return RunResult.read(job.folder / RESULT_FILE)


def _make_trainer(job: TrainJob, device: str, retries: int, callbacks: list[Any]) -> Any:
    import ray.train
    from ray.train.torch import TorchTrainer

    from raydistill.cluster.process_group import ManualGroupConfig

    # In the closure, which only workers open: Ray Train's controller would open a `train_loop_config`, and import
    # transformers and all of raydistill for `train_fn`.
    config = {
        "run": job.run.model_dump(mode="json"),
        "folder": str(job.folder),
        "inputs": job.inputs,
        "train_fn": job.train_fn,
        "check_stop": job.check_stop,
    }

    def train_worker() -> str | None:  # the result's return_value
        return _train_worker(config)

    training = job.run.training
    return TorchTrainer(
        train_worker,  # type: ignore[arg-type]
        torch_config=ManualGroupConfig(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=training.workers,
            use_gpu=device == "cuda",
            resources_per_worker=worker_resources(device, training.threads, training.gpus),
            placement_strategy=placement_strategy(job.run, device),
        ),
        run_config=ray.train.RunConfig(
            name=f"train-{job.folder.name}",
            callbacks=callbacks,
            failure_config=ray.train.FailureConfig(max_failures=retries),
            **sync.ray_storage_options(job.folder.parent / ".ray"),
        ),
    )


def placement_strategy(run: Run, device: str) -> str:
    """Ray's placement strategy: all workers on one machine if a machine can hold them, else on as few as possible.

    Ray's default would split the workers over partly occupied machines, and every step would cross the network.
    """
    training = run.training
    largest = max(slots_per_node(device, training.threads, training.gpus), default=0)
    return "STRICT_PACK" if largest >= training.workers else "PACK"


def _worker_error(error: Exception) -> Exception:
    """The error of the first worker that failed, without Ray's wrapping."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        cause = getattr(failure, "cause", failure)
        return cause if isinstance(cause, UserError | OSError) else RuntimeError(f"{type(cause).__name__}: {cause}")
    return error


def _train_worker(config: dict[str, Any]) -> str | None:
    """The function that each Ray Train worker executes.

    Returns:
        The message of an error that a restart would repeat, so that Ray Train does not restart the worker; None after
        success. With several workers such an error is raised instead, because the others may be waiting for this one.
    """
    import ray.train
    from ray.train.torch import get_device

    from raydistill.cluster.process_group import gather_node_ids, process_group

    job = TrainJob(**{**config, "run": Run.model_validate(config["run"]), "folder": Path(config["folder"])})
    context = ray.train.get_context()
    set_torch_threads(job.run.training.threads)
    rank, world_size, device = context.get_world_rank(), context.get_world_size(), str(get_device())

    def report(metrics: Metrics, folder: Path | None) -> str | None:
        ray.train.report({k: v for k, v in metrics.items() if isinstance(v, int | float)})
        return job.check_stop() if job.check_stop and rank == 0 else None

    try:
        with process_group(device):
            worker = Worker(rank, world_size, device, is_draining=DrainMonitor(gather_node_ids(device)))
            train_and_sync(job, report, worker)
    except UserError as error:
        if world_size > 1 or isinstance(error, TransientError):
            raise
        return str(error)
    return None


def train_and_sync(job: TrainJob, report: ReportFn, worker: Worker) -> RunResult | None:
    """Execute a run in a worker on machines that may share no folder.

    The main worker claims the run's folder, so that a worker that was cut off can no longer change the stored folder.
    It uploads the folder after every validation, at the end, and after a preemption.
    """
    upload, download = partial(snapshots.save, job.folder), partial(snapshots.pull, job.folder)
    worker = replace(worker, upload_folder=upload, download_folder=download)
    snapshots.pull(*job.input_paths)
    sync.pull(*job.inputs.store_folders)
    with snapshots.writer(job.folder) if worker.is_main_process else nullcontext():
        worker.share_folder()
        try:
            result = job.train_fn(job.run, job.folder, report, job.inputs, worker)
        except Preempted:
            worker.save_folder()
            raise
        worker.save_folder()
        return result
