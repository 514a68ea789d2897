"""One trial of a search: the run of a proposal, carried out in an actor of Tune or as a Ray Train job."""

from functools import partial
from pathlib import Path
from typing import Any

from ray import tune

from raydistill.cluster import sync
from raydistill.cluster.drain import DrainMonitor
from raydistill.config.run import Run
from raydistill.config.space import Search, Space, make_run
from raydistill.core.errors import TransientError, UserError
from raydistill.jobs.train import Metrics, TrainFn, TrainJob, train_and_sync, train_with_ray_train
from raydistill.search.early_stopping import peer_curves, should_stop_early
from raydistill.search.prepare import PreparedSweep
from raydistill.search.study import (
    final_report,
)
from raydistill.training.inputs import RunInputs
from raydistill.training.run import train
from raydistill.training.workers import Worker, set_torch_threads


def tune_trial(
    config: Metrics,
    *,
    space: Any,
    sweep: str,
    prepared: Any,
    device: str,
    train_in_actor: bool,
    train_fn: TrainFn = train,
) -> None:
    """A trial: the function that Tune calls with what the search proposed.

    `train_in_actor`: it trains here, in a reused actor that holds its CPUs and GPU; else it only waits for Ray
    Train's job.
    Tune starts it again as often as `search.retries` says, so Ray Train does not. What would be wrong again, such as a
    want of memory, ends it at once, and the next command tries it anew.
    """
    import ray

    run, folder, inputs = resolve_trial(space, Path(sweep), prepared, config)
    cost = space.search.cost
    stop = partial(early_stop_reason, folder, space.search) if space.search.stops_early else None

    def report(metrics: Metrics, where: Path | None) -> str | None:
        tune.report({"step": metrics["step"], "score": metrics["score"], cost: inputs.costs.get(cost, 0.0)})
        return stop() if stop else None

    try:
        if train_in_actor:
            set_torch_threads(run.training.threads)
            here = Worker(device=device, is_draining=DrainMonitor([ray.get_runtime_context().get_node_id()]))
            result = train_and_sync(TrainJob(run, folder, inputs, train_fn), report, here)
        else:
            result = _run_train_job(TrainJob(run, folder, inputs, train_fn, stop), device)
    except TransientError:
        raise
    except UserError as error:
        tune.report({"step": 0, "died": str(error)})
        return
    tune.report({"step": result.get("steps", 0), **final_report(result, cost)})


def _run_train_job(job: TrainJob, device: str) -> Metrics:
    """A trial's Ray Train job, whose reports go to Tune too."""
    from ray.tune.integration.ray_train import TuneReportCallback

    return train_with_ray_train(job, device=device, retries=0, callbacks=[TuneReportCallback()])


def early_stop_reason(folder: Path, search: Search) -> str | None:
    """Why the trial in `folder` should stop now, by what it and the others of its shape have left on disk.

    Never for what it scored in its warm-up, where the learning rate that will be best is not ahead yet.
    """
    sync.pull(folder.parent, patterns=["run.json", "metrics.jsonl", "result.json"])
    own, others, warm_up = peer_curves(folder.parent.parent, folder.name)
    return should_stop_early(own, others, max(search.grace, warm_up), search.reduction)


def resolve_trial(
    space: Space, sweep: Path, prepared: PreparedSweep, config: dict[str, Any]
) -> tuple[Run, Path, RunInputs]:
    """The run of a proposal, its folder, and what was prepared for it."""
    run = make_run(space, config["chosen"], space.name)
    note = {"number": config["number"], "chosen": config["chosen"]}
    return run, sweep / "trials" / config["key"], prepared.inputs(run, note)
