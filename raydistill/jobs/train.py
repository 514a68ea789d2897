"""Two launchers, one training core: Ray Train for GPUs, several workers and every `train`; Tune for short CPU trials.

Both hand `training.run.train` a `report`, and both go on from the run's own folder after a death.
"""

import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from raydistill.cluster import sync
from raydistill.cluster.actor_pool import places, places_by_node, resources
from raydistill.config.run import Run
from raydistill.config.space import Search
from raydistill.core.errors import PassingError, UserError
from raydistill.core.files import read_json
from raydistill.jobs.teacher_cache import read_by
from raydistill.results.records import rivals
from raydistill.search.early_stopping import falls_behind
from raydistill.training.loop import Leaving, Report
from raydistill.training.run import Inputs, train
from raydistill.training.workers import Worker

DRAIN_POLL_S = 5.0
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


def final_report(result: Metrics, cost: str) -> Metrics:
    """What a search is told of a finished run: its score and cost, or that it failed."""
    metrics = {k: v for k, v in result["metrics"].items() if isinstance(v, int | float)}
    report = {**metrics, "status": result["status"], "finished": True}
    if result["status"] in ("done", "stopped"):
        report |= {"score": metrics["score"], cost: metrics.get(cost, 0.0)}
    return report


def tune_trial(
    config: Metrics, *, space: Any, sweep: str, prepared: Any, device: str, in_actor: bool, work: Work = train
) -> None:
    """A trial: the function that Tune calls with what the search proposed.

    `in_actor`: it trains here, in a reused actor that holds its CPUs and GPU; else it only waits for Ray Train's job.
    Tune starts it again as often as `search.retries` says, so Ray Train does not. What would be wrong again, such as a
    want of memory, ends it at once, and the next command tries it anew.
    """
    import ray
    from ray import tune

    from raydistill.search.study import trial_run

    run, folder, inputs = trial_run(space, Path(sweep), prepared, config)
    cost = space.search.cost
    stop = partial(reason_to_stop, folder, space.search) if space.search.stops_early else None

    def report(metrics: Metrics, where: Path | None) -> str | None:
        tune.report({"step": metrics["step"], "score": metrics["score"], cost: inputs.costs.get(cost, 0.0)})
        return stop() if stop else None

    try:
        if in_actor:
            _use_threads(run.training.threads)
            here = Worker(device=device, leaving=Departures([ray.get_runtime_context().get_node_id()]))
            result = _carry_out(work, run, folder, report, inputs, here)
        else:
            result = _waited_for(run, folder, inputs, device, stop, work)
    except PassingError:
        raise
    except UserError as error:
        tune.report({"step": 0, "died": str(error)})
        return
    tune.report({"step": result.get("steps", 0), **final_report(result, cost)})


def _waited_for(run: Run, folder: Path, inputs: Inputs, device: str, stop: Stop | None, work: Work) -> Metrics:
    """A trial's Ray Train job, whose reports go to Tune too."""
    from ray.tune.integration.ray_train import TuneReportCallback

    told = [TuneReportCallback()]
    return train_with_ray_train(run, folder, inputs, device=device, retries=0, stop=stop, callbacks=told, work=work)


def reads(run: Run, inputs: Inputs) -> list[Path]:
    """The folders that a run reads, as far as they are not each machine's own: teacher, label sets, teacher cache."""
    return [*read_by(run), *inputs.labels.values(), *inputs.stores]


def reason_to_stop(folder: Path, search: Search) -> str | None:
    """Why the trial in `folder` should stop now, by what it and the others of its shape have left on disk.

    Never for what it scored in its warm-up, where the learning rate that will be best is not ahead yet.
    """
    sync.fetch(folder.parent, names=["run.json", "metrics.jsonl", "result.json"])
    own, others, warm_up = rivals(folder.parent.parent, folder.name)
    return falls_behind(own, others, max(search.grace, warm_up), search.reduction)


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


class Departures:
    """Whether Ray was told that one of some machines is to be drained, as for a spot instance's notice.

    `nodes`: the ids of those that a run is on. The machine that a run has left stays in Ray's list until it is gone.
    Ray gives no new work to such a machine, so a run that ends with `Leaving` is started again elsewhere.
    """

    def __init__(self, nodes: Iterable[str]) -> None:
        self.nodes = frozenset(nodes)
        self.next = 0.0

    def __call__(self) -> bool:
        """Asks Ray's head at most once in `DRAIN_POLL_S`; no while it does not answer."""
        import ray

        now = time.monotonic()
        if now < self.next:
            return False
        self.next = now + DRAIN_POLL_S
        try:
            leaving = ray._private.state.state.get_draining_nodes()  # what Ray Train's own watcher asks
        except Exception:
            return False
        return not self.nodes.isdisjoint(leaving)


def _use_threads(threads: int) -> None:
    """As many CPU threads as the trial was given: Ray counts them but does not hold a process to them."""
    import torch

    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
