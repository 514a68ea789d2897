"""One trial of a sweep: trains the run of a proposal, in a Tune actor or as a Ray Train job."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune

from raydistill.cluster import snapshots
from raydistill.cluster.drain import DrainMonitor
from raydistill.config.space import Search, Space, make_run
from raydistill.core.errors import TransientError, UserError
from raydistill.core.files import corrupt_file_error
from raydistill.jobs.train import Metrics, TrainFn, TrainJob, train_and_sync, train_with_ray_train
from raydistill.results.records import repeat_trial_remedy, seed_run_folder
from raydistill.search.early_stopping import peer_curves, should_stop_early
from raydistill.search.prepare import PreparedSweep
from raydistill.search.study import final_report
from raydistill.training.records import RESULT_FILE, RunResult
from raydistill.training.run import train
from raydistill.training.workers import Worker, set_torch_threads


@dataclass(frozen=True)
class TrialContext:
    """What all trials of a sweep have in common.

    Attributes:
        space: The space that is searched.
        sweep: The sweep's folder.
        prepared: What was computed before the first trial.
        device: "cpu" or "cuda".
        train_fn: Trains a run; benchmarks of the search replace `train` by a stub.
    """

    space: Space
    sweep: Path
    prepared: PreparedSweep
    device: str
    train_fn: TrainFn = train

    def make_job(self, config: dict[str, Any]) -> TrainJob:
        """The training job of a proposal; with a "seed", of the repeat of a trial, which is not stopped early."""
        run = make_run(self.space, config["params"], self.space.name)
        seed = config.get("seed")
        if seed is None:
            folder = self.sweep / "trials" / config["key"]
        else:
            run = run.model_copy(update={"training": run.training.model_copy(update={"seed": seed})})
            folder = seed_run_folder(self.sweep, config["key"], seed)
        inputs = self.prepared.inputs(run, config["number"], config["params"])
        search = self.space.search
        check_stop = partial(early_stop_reason, folder, search) if search.stops_early and seed is None else None
        return TrainJob(run, folder, inputs, self.train_fn, check_stop)


def tune_trial(config: dict[str, Any], *, context: TrialContext, train_in_actor: bool) -> None:
    """Train one trial and report its scores to Tune; this is Tune's trainable.

    Tune restarts a trial whose process was lost, at most `search.retries` times, so Ray Train does not restart it. An
    error that a restart would repeat, such as a lack of memory, ends the trial; the next command retries it.

    Args:
        config: A `Proposal` or a `SeedProposal` as a mapping.
        context: What all trials have in common.
        train_in_actor: Whether to train in this process, a reused actor that holds the CPUs and the GPU of a trial;
            otherwise this process only waits for a Ray Train job.
    """
    job = context.make_job(config)
    try:
        result = _train_in_actor(job, context.device) if train_in_actor else _train_on_ray(job, context.device)
        with corrupt_file_error(job.folder / RESULT_FILE, repeat_trial_remedy(job.folder)):
            report = final_report(result, context.space.search.cost)
    except TransientError:
        raise
    except UserError as error:
        tune.report({"step": 0, "error_message": str(error)})
        return
    tune.report({"step": result.steps, **report})


def _train_in_actor(job: TrainJob, device: str) -> RunResult:
    """Train in this process, with a report to Tune at every validation."""
    import ray

    def report(metrics: Metrics, folder: Path | None) -> str | None:
        tune.report({"step": metrics["step"], "score": metrics["score"]})
        return job.check_stop() if job.check_stop else None

    set_torch_threads(job.run.training.threads)
    node_id = ray.get_runtime_context().get_node_id()
    result = train_and_sync(job, report, Worker(device=device, is_draining=DrainMonitor([node_id])))
    assert result is not None  # this process is the run's only worker
    return result


def _train_on_ray(job: TrainJob, device: str) -> RunResult:
    """Train as a Ray Train job whose reports go to Tune."""
    from ray.tune.integration.ray_train import TuneReportCallback

    return train_with_ray_train(job, device=device, retries=0, callbacks=[TuneReportCallback()])


def early_stop_reason(folder: Path, search: Search) -> str | None:
    """Why the trial in `folder` should stop now, compared with the sweep's other trials of its shape; None if not.

    Scores of the warm-up do not count: the learning rate that wins in the end need not lead yet.
    """
    snapshots.pull_records(folder.parent)
    curve, peers, warmup = peer_curves(folder.parent.parent, folder.name)
    return should_stop_early(curve, peers, max(search.grace, warmup), search.reduction)
