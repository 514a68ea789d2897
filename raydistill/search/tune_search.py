"""The search as a Ray Tune experiment: runs as many trials at a time as the cluster can hold."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from pydantic import BaseModel
from ray import tune
from ray.tune import Callback
from ray.tune.search import Searcher

from raydistill.cluster import sync
from raydistill.cluster.actor_pool import slots, worker_resources
from raydistill.cluster.ray_compat import keep_aws_keys_from_tune
from raydistill.config.run import Run
from raydistill.config.space import resource_runs
from raydistill.jobs.train import check_capacity, resolve_launcher
from raydistill.results.sweep_record import StopReason
from raydistill.search.prepare import find_infeasible_sizes
from raydistill.search.study import SweepStudy
from raydistill.search.trial import TrialContext, tune_trial

RECOUNT_INTERVAL_S = 2.0
# Resources of a trial that only waits for its Ray Train job: one byte of memory, since Tune accepts no empty request. A
# share of a CPU would be missing for a worker when the workers of all trials need every CPU.
DRIVER_ONLY_RESOURCES = {"memory": 1.0}


def run_search(context: TrialContext, callbacks: list[Callback], start_time: float | None = None) -> StopReason:
    """Run the trials that the sweep still lacks. Results are in the trials' folders.

    Args:
        context: Space, folder and inputs of the trials.
        callbacks: Tune's callbacks.
        start_time: Time of the monotonic clock from which `search.max_hours` counts; by default, now.

    Returns:
        Why the search ended before all trials were run; without a message if all trials were run.

    Raises:
        UserError: The cluster cannot hold a trial.
    """
    space = context.space
    infeasible = find_infeasible_sizes(space, context.prepared.shapes)
    runs = resource_runs(space)
    make_study = partial(SweepStudy, space, context.sweep, infeasible, start_time=start_time)
    study = make_study()
    if not study.num_remaining:
        return StopReason()
    for run in runs:
        check_capacity(run, context.device)
    tuner = TrialTuner(context, runs, callbacks)
    started = StartedTrials()
    for attempt in range(1 + space.search.retries):
        # Tune does not retry a trial whose reused actor was lost together with its machine; a new study does
        study = make_study() if attempt else study
        tuner.run(study, started)
        if study.failed_keys <= started.keys:
            break
    # The next command retries failed trials, even if the space has no further combination
    num_failed = len(study.proposed_keys) - study.num_finished
    return replace(study.stop_reason, exhausted=study.stop_reason.exhausted and not num_failed)


class TrialQueue(Protocol):
    """Proposes trials one after the other: the study of a search, or the repeats of its best trials."""

    @property
    def num_running(self) -> int:
        """Number of trials that were proposed and not reported yet."""

    @property
    def num_remaining(self) -> int:
        """Number of trials to run."""

    def propose(self, trial_id: str) -> BaseModel | None:
        """The next trial; None if there is none."""

    def report(self, trial_id: str, result: dict[str, Any] | None) -> None:
        """Record the end of a trial; None if it was lost."""


class TrialTuner:
    """Runs the trials of a queue with Ray Tune, as many at a time as the cluster can hold.

    Args:
        context: What all trials have in common.
        runs: Runs with every combination of resources of the trials.
        callbacks: Tune's callbacks.
    """

    def __init__(self, context: TrialContext, runs: list[Run], callbacks: Sequence[Callback]) -> None:
        self.context, self.callbacks = context, callbacks
        self.in_actor = all(resolve_launcher(run, context.device) == "tune" for run in runs)
        self.limit = ConcurrencyLimit(partial(max_concurrent, runs, context.device), context.space.search.concurrent)
        trial = partial(tune_trial, context=context, train_in_actor=self.in_actor)
        trial.__name__ = "trial"  # type: ignore[attr-defined]
        resources = max_worker_resources(runs, context.device) if self.in_actor else DRIVER_ONLY_RESOURCES
        self.trainable = tune.with_resources(trial, tune.PlacementGroupFactory([resources]))

    def run(self, queue: TrialQueue, *callbacks: Callback) -> None:
        """Run the remaining trials of a queue, with further callbacks before the callbacks of all trials."""
        keep_aws_keys_from_tune()
        tune.Tuner(
            self.trainable,
            tune_config=tune.TuneConfig(
                search_alg=StudySearcher(queue, self.limit),
                num_samples=queue.num_remaining,
                reuse_actors=self.in_actor,
            ),
            run_config=tune.RunConfig(
                name="tune",
                failure_config=tune.FailureConfig(max_failures=self.context.space.search.retries),
                callbacks=[*callbacks, *self.callbacks],
                verbose=0,
                **sync.ray_storage_options(self.context.sweep / ".ray"),
            ),
        ).fit()


class StudySearcher(Searcher):
    """Tune's view of a queue of trials.

    Args:
        study: Proposes the trials.
        max_concurrent: How many trials may run at a time. Tune's own limit would be what the cluster can hold when the
            search starts.
    """

    def __init__(self, study: TrialQueue, max_concurrent: Callable[[], int]) -> None:
        super().__init__()
        self.study = study
        self.max_concurrent = max_concurrent

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """The next proposal; None while the cluster is full: Tune then asks again later."""
        if self.study.num_running >= self.max_concurrent():
            return None
        proposal = self.study.propose(trial_id)
        return proposal.model_dump() if proposal else Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Report the end of a trial to the study; an error means that its process was lost."""
        self.study.report(trial_id, None if error else result)

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the study's storage is the state of the search."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing."""


class StartedTrials(Callback):
    """Collects the keys of the trials whose actor was started."""

    def __init__(self) -> None:
        self.keys: set[str] = set()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called when the trial's actor exists."""
        self.keys.add(trial.config["key"])


def max_concurrent(runs: list[Run], device: str) -> int:
    """How many trials the cluster can hold at a time, at least one."""
    workers = max(run.training.workers for run in runs)
    return max(1, slots(device, *_max_threads_and_gpus(runs)) // workers)


class ConcurrencyLimit:
    """How many trials may run now: `fixed_limit`, else what the cluster can hold, which can change."""

    def __init__(self, count_slots: Callable[[], int], fixed_limit: int | None = None) -> None:
        self.count_slots = count_slots
        self.fixed_limit = fixed_limit
        self.slots = 0
        self.next_count = 0.0

    def __call__(self) -> int:
        """Counts at most every `RECOUNT_INTERVAL_S`, since Tune's loop asks many times a second."""
        if self.fixed_limit:
            return self.fixed_limit
        if time.monotonic() >= self.next_count:
            self.slots, self.next_count = self.count_slots(), time.monotonic() + RECOUNT_INTERVAL_S
        return self.slots


def max_worker_resources(runs: list[Run], device: str) -> dict[str, float]:
    """The most that a worker of any of the runs holds."""
    return worker_resources(device, *_max_threads_and_gpus(runs))


def _max_threads_and_gpus(runs: list[Run]) -> tuple[int, float]:
    return max(run.training.threads for run in runs), max(run.training.gpus for run in runs)
