"""Two launchers, one training core: Ray Train for GPUs, several workers and every `train`; Tune for short CPU trials.

Both hand `training.run.train` a `report`, and both go on from the run's own folder after a death.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raydistill.cluster import sync
from raydistill.cluster.actor_pool import places, places_by_node, resources
from raydistill.cluster.drain import Departures
from raydistill.config.run import Run
from raydistill.core.errors import PassingError, UserError
from raydistill.core.files import read_json
from raydistill.training.inputs import Inputs, read_by
from raydistill.training.loop import Leaving, Report
from raydistill.training.run import train
from raydistill.training.workers import Worker

Metrics = dict[str, Any]
Stop = Callable[[], str | None]
# What a launcher carries out, in a worker: training.run.train, or what is called and leaves its folder as that does.
Work = Callable[..., Metrics]


def launcher_for(run: Run, device: str) -> str:
    """ "tune" for a CPU trial of one worker, else "train", unless the run says which."""
    if run.training.launcher != "auto":
        if run.training.launcher == "tune" and run.training.workers > 1:
            raise UserError("training.launcher tune runs one worker; use train, or set training.workers to 1")
        return run.training.launcher
    return "tune" if device == "cpu" and run.training.workers == 1 else "train"


def check_room(run: Run, device: str) -> None:
    """UserError where the cluster can never hold the run: Ray would wait for ever without a word."""
    training = run.training
    room = places(device, training.threads, training.gpus)
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
    inputs: Inputs,
    *,
    device: str = "cpu",
    retries: int = 2,
    stop: Stop | None = None,
    callbacks: list[Any] | None = None,
    work: Work = train,
) -> Metrics:
    """One run as a Ray Train job; a worker that dies is started again and goes on from the run's folder.

    Returns the result that result.json holds. `folder` must be seen by every node. `stop()` is asked after every
    validation for a reason to stop. `retries`: how often the workers are started again.
    """
    import ray.train
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from raydistill.cluster.process_group import OwnGroup

    training = run.training
    trainer = TorchTrainer(
        _train_worker,  # type: ignore[arg-type]  # what it returns comes back in the result
        torch_config=OwnGroup(),
        train_loop_config={
            "run": run.model_dump(mode="json"),
            "folder": str(folder),
            "inputs": inputs,
            "stop": stop,
            "work": work,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=training.workers,
            use_gpu=device == "cuda",
            resources_per_worker=resources(device, training.threads, training.gpus),
            placement_strategy=placement(run, device),
        ),
        run_config=ray.train.RunConfig(
            name=f"train-{folder.name}",
            callbacks=callbacks or [],
            failure_config=ray.train.FailureConfig(max_failures=retries),
            **sync.for_ray(folder.parent / ".ray"),
        ),
    )
    sync.keep(folder, *reads(run, inputs))
    try:
        ended: Any = trainer.fit()
    except TrainingFailedError as error:
        raise _of_worker(error) from None
    if ended.return_value:
        raise UserError(ended.return_value)
    sync.fetch(folder)
    return read_json(folder / "result.json")


def placement(run: Run, device: str) -> str:
    """Ray's strategy for a run's workers: all on one machine where one can hold them, else on as few as may be.

    Its own default would spread them wherever a machine is partly taken, and every step would cross the network.
    """
    training = run.training
    most = max(places_by_node(device, training.threads, training.gpus), default=0)
    return "STRICT_PACK" if most >= training.workers else "PACK"


def _of_worker(error: Exception) -> Exception:
    """The error of the worker that failed first, rather than Ray's account of it."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        cause = getattr(failure, "cause", failure)
        return cause if isinstance(cause, UserError | OSError) else RuntimeError(f"{type(cause).__name__}: {cause}")
    return error


def reads(run: Run, inputs: Inputs) -> list[Path]:
    """The folders that a run reads, as far as they are not each machine's own: teacher, label sets, teacher cache."""
    return [*read_by(run), *inputs.labels.values(), *inputs.stores]


def _train_worker(config: dict[str, Any]) -> str | None:
    """What each Ray Train worker runs. Returns what is wrong, for nothing to be gained by starting it again.

    Of several workers the others may wait for the one with whom something is wrong, which must die then.
    """
    import ray.train
    from ray.train.torch import get_device

    from raydistill.cluster.process_group import nodes_of_all, process_group

    run = Run.model_validate(config["run"])
    context = ray.train.get_context()
    _use_threads(run.training.threads)
    rank, world, device = context.get_world_rank(), context.get_world_size(), str(get_device())
    stop: Stop | None = config["stop"]

    def report(metrics: Metrics, where: Path | None) -> str | None:
        ray.train.report({k: v for k, v in metrics.items() if isinstance(v, int | float)})
        return stop() if stop and rank == 0 else None

    try:
        with process_group(device):
            worker = Worker(rank, world, device, leaving=Departures(nodes_of_all(device)))
            _carry_out(config["work"], run, Path(config["folder"]), report, config["inputs"], worker)
    except UserError as error:
        if world > 1 or isinstance(error, PassingError):
            raise
        return str(error)
    return None


def _carry_out(work: Work, run: Run, folder: Path, report: Report, inputs: Inputs, worker: Worker) -> Metrics:
    """`work` in a worker, on machines that may share no folder: what it reads is fetched, and what it leaves is kept.

    At every validation, at the end, and when it was saved because the machine goes.
    """

    def keep() -> None:
        if worker.leads:
            sync.keep(folder, mirror=True)

    def kept(metrics: Metrics, where: Path | None) -> str | None:
        keep()
        return report(metrics, where)

    sync.fetch(folder, *reads(run, inputs))
    try:
        result = work(run, folder, kept, inputs, worker)
    except Leaving:
        keep()
        raise
    keep()
    return result


def _use_threads(threads: int) -> None:
    """As many CPU threads as the trial was given: Ray counts them but does not hold a process to them."""
    import torch

    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
