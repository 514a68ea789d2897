"""Two launchers, one training core: Ray Train for GPUs, several workers and every `train`; Tune for short CPU trials.

Both hand `training.run.train` a `report`, and both go on from the run's own folder after a death.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raydistill.cluster import sync
from raydistill.cluster.actor_pool import slots, slots_per_node, worker_resources
from raydistill.cluster.drain import DrainMonitor
from raydistill.config.run import Run
from raydistill.core.errors import TransientError, UserError
from raydistill.core.files import read_json
from raydistill.training.inputs import RunInputs, input_paths
from raydistill.training.loop import Preempted, ReportFn
from raydistill.training.run import train
from raydistill.training.workers import Worker

Metrics = dict[str, Any]
StopCheck = Callable[[], str | None]
# What a launcher carries out, in a worker: training.run.train, or what is called and leaves its folder as that does.
TrainFn = Callable[..., Metrics]


def resolve_launcher(run: Run, device: str) -> str:
    """ "tune" for a CPU trial of one worker, else "train", unless the run says which."""
    if run.training.launcher != "auto":
        if run.training.launcher == "tune" and run.training.workers > 1:
            raise UserError("training.launcher tune runs one worker; use train, or set training.workers to 1")
        return run.training.launcher
    return "tune" if device == "cpu" and run.training.workers == 1 else "train"


def check_capacity(run: Run, device: str) -> None:
    """UserError where the cluster can never hold the run: Ray would wait for ever without a word."""
    training = run.training
    room = slots(device, training.threads, training.gpus)
    if room < training.workers:
        gpu = "a GPU" if training.gpus == 1 else f"{training.gpus:g} of a GPU"
        each = f"{training.threads} CPUs of one machine{f' and {gpu}' if device == 'cuda' else ''}"
        raise UserError(
            f"{training.workers} workers need {each} each, and the cluster has room for {room}; "
            f"lower training.workers or training.threads"
        )


def train_with_ray_train(
    run: Run,
    folder: Path,
    inputs: RunInputs,
    *,
    device: str = "cpu",
    retries: int = 2,
    check_stop: StopCheck | None = None,
    callbacks: list[Any] | None = None,
    train_fn: TrainFn = train,
) -> Metrics:
    """One run as a Ray Train job; a worker that dies is started again and goes on from the run's folder.

    Returns the result that result.json holds. `folder` must be seen by every node. `stop()` is asked after every
    validation for a reason to stop. `retries`: how often the workers are started again.
    """
    import ray.train
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from raydistill.cluster.process_group import ManualGroupConfig

    training = run.training
    trainer = TorchTrainer(
        _train_worker,  # type: ignore[arg-type]  # what it returns comes back in the result
        torch_config=ManualGroupConfig(),
        train_loop_config={
            "run": run.model_dump(mode="json"),
            "folder": str(folder),
            "inputs": inputs,
            "stop": check_stop,
            "work": train_fn,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=training.workers,
            use_gpu=device == "cuda",
            resources_per_worker=worker_resources(device, training.threads, training.gpus),
            placement_strategy=placement_strategy(run, device),
        ),
        run_config=ray.train.RunConfig(
            name=f"train-{folder.name}",
            callbacks=callbacks or [],
            failure_config=ray.train.FailureConfig(max_failures=retries),
            **sync.ray_storage_options(folder.parent / ".ray"),
        ),
    )
    sync.push(folder, *run_input_paths(run, inputs))
    try:
        ended: Any = trainer.fit()
    except TrainingFailedError as error:
        raise _worker_error(error) from None
    if ended.return_value:
        raise UserError(ended.return_value)
    sync.pull(folder)
    return read_json(folder / "result.json")


def placement_strategy(run: Run, device: str) -> str:
    """Ray's strategy for a run's workers: all on one machine where one can hold them, else on as few as may be.

    Its own default would spread them wherever a machine is partly taken, and every step would cross the network.
    """
    training = run.training
    most = max(slots_per_node(device, training.threads, training.gpus), default=0)
    return "STRICT_PACK" if most >= training.workers else "PACK"


def _worker_error(error: Exception) -> Exception:
    """The error of the worker that failed first, rather than Ray's account of it."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        cause = getattr(failure, "cause", failure)
        return cause if isinstance(cause, UserError | OSError) else RuntimeError(f"{type(cause).__name__}: {cause}")
    return error


def run_input_paths(run: Run, inputs: RunInputs) -> list[Path]:
    """The folders that a run reads, as far as they are not each machine's own: teacher, label sets, teacher cache."""
    return [*input_paths(run), *inputs.label_folders.values(), *inputs.store_folders]


def _train_worker(config: dict[str, Any]) -> str | None:
    """What each Ray Train worker runs. Returns what is wrong, for nothing to be gained by starting it again.

    Of several workers the others may wait for the one with whom something is wrong, which must die then.
    """
    import ray.train
    from ray.train.torch import get_device

    from raydistill.cluster.process_group import gather_node_ids, process_group

    run = Run.model_validate(config["run"])
    context = ray.train.get_context()
    set_torch_threads(run.training.threads)
    rank, world, device = context.get_world_rank(), context.get_world_size(), str(get_device())
    stop: StopCheck | None = config["stop"]

    def report(metrics: Metrics, where: Path | None) -> str | None:
        ray.train.report({k: v for k, v in metrics.items() if isinstance(v, int | float)})
        return stop() if stop and rank == 0 else None

    try:
        with process_group(device):
            worker = Worker(rank, world, device, is_draining=DrainMonitor(gather_node_ids(device)))
            train_and_sync(config["work"], run, Path(config["folder"]), report, config["inputs"], worker)
    except UserError as error:
        if world > 1 or isinstance(error, TransientError):
            raise
        return str(error)
    return None


def train_and_sync(
    train_fn: TrainFn, run: Run, folder: Path, report: ReportFn, inputs: RunInputs, worker: Worker
) -> Metrics:
    """`train_fn` in a worker, on machines that may share no folder: what it reads is fetched, and what it leaves is
    kept.

    At every validation, at the end, and when it was saved because the machine goes.
    """

    def keep() -> None:
        if worker.is_main_process:
            sync.push(folder, mirror=True)

    def kept(metrics: Metrics, where: Path | None) -> str | None:
        keep()
        return report(metrics, where)

    sync.pull(folder, *run_input_paths(run, inputs))
    try:
        result = train_fn(run, folder, kept, inputs, worker)
    except Preempted:
        keep()
        raise
    keep()
    return result


def set_torch_threads(threads: int) -> None:
    """As many CPU threads as the trial was given: Ray counts them but does not hold a process to them."""
    import torch

    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
