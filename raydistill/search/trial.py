"""One trial of a search: the run of a proposal, carried out in an actor of Tune or as a Ray Train job."""

from functools import partial
from pathlib import Path
from typing import Any

from ray import tune

from raydistill.cluster import sync
from raydistill.cluster.drain import Departures
from raydistill.config.run import Run
from raydistill.config.space import Search, Space, resolve
from raydistill.core.errors import PassingError, UserError
from raydistill.jobs.train import Metrics, Stop, Work, _carry_out, _use_threads, train_with_ray_train
from raydistill.search.early_stopping import falls_behind, rivals
from raydistill.search.prepare import Prepared
from raydistill.search.study import (
    final_report,
)
from raydistill.training.inputs import Inputs
from raydistill.training.run import train
from raydistill.training.workers import Worker


def tune_trial(
    config: Metrics, *, space: Any, sweep: str, prepared: Any, device: str, in_actor: bool, work: Work = train
) -> None:
    """A trial: the function that Tune calls with what the search proposed.

    `in_actor`: it trains here, in a reused actor that holds its CPUs and GPU; else it only waits for Ray Train's job.
    Tune starts it again as often as `search.retries` says, so Ray Train does not. What would be wrong again, such as a
    want of memory, ends it at once, and the next command tries it anew.
    """
    import ray

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


def reason_to_stop(folder: Path, search: Search) -> str | None:
    """Why the trial in `folder` should stop now, by what it and the others of its shape have left on disk.

    Never for what it scored in its warm-up, where the learning rate that will be best is not ahead yet.
    """
    sync.fetch(folder.parent, names=["run.json", "metrics.jsonl", "result.json"])
    own, others, warm_up = rivals(folder.parent.parent, folder.name)
    return falls_behind(own, others, max(search.grace, warm_up), search.reduction)


def trial_run(space: Space, sweep: Path, prepared: Prepared, config: dict[str, Any]) -> tuple[Run, Path, Inputs]:
    """The run of a proposal, its folder, and what was prepared for it."""
    run = resolve(space, config["chosen"], space.name)
    note = {"number": config["number"], "chosen": config["chosen"]}
    return run, sweep / "trials" / config["key"], prepared.inputs(run, note)
