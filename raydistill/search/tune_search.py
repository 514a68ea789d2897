"""The search as a Ray Tune experiment: as many trials at a time as the cluster can hold."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from ray import tune
from ray.tune import Callback
from ray.tune.execution import class_cache

from raydistill.cluster import sync
from raydistill.cluster.actor_pool import slots, worker_resources
from raydistill.config.corners import iter_corners
from raydistill.config.run import Run
from raydistill.config.space import Space, make_run
from raydistill.core.console import print_progress
from raydistill.core.errors import UserError
from raydistill.jobs.train import TrainFn, check_capacity, resolve_launcher
from raydistill.results.pareto import fits_any_budget, resolve_budgets
from raydistill.search.prepare import PreparedSweep, corner_runs
from raydistill.search.study import StopReason, StudySearch
from raydistill.search.trial import tune_trial
from raydistill.training.run import train

RECOUNT_INTERVAL_S = 2.0
# What a trial holds that only waits for its Ray Train job: next to nothing (a byte), since Tune refuses nothing at all,
# and a part of a CPU would keep the last of as many trials as there are CPUs from its own.
DRIVER_ONLY_RESOURCES = {"memory": 1.0}
# Tune would hand the AWS keys of this process to its actors as a setting, which Ray's agent writes into a log that all
# may read. Actors on this machine have its environment anyway; other nodes have roles or keys of their own.
class_cache.ENV_VARS_TO_PROPAGATE.difference_update(
    [name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")]
)


def run_search(
    space: Space,
    sweep: Path,
    prepared: PreparedSweep,
    device: str,
    callbacks: list[Any],
    train_fn: TrainFn = train,
    start_time: float | None = None,
) -> StopReason:
    """Run the trials that the sweep still lacks. What they find stands in their folders and in SWEEP/study.log.

    Returns why it ended before all were run, if it did. `start_time`: since when, by the monotonic clock,
    `search.max_hours`
    counts; now, if None. `train_fn` is there for measuring the search itself (benchmarks/scaling.py).
    """
    barred = find_infeasible_sizes(space, prepared)
    runs = [make_run(space, chosen, space.name) for chosen in iter_corners(space.run, limit=200)]
    places = ConcurrencyLimit(partial(max_concurrent, runs, device), space.search.concurrent)
    searcher = StudySearch(space, sweep, barred, max_concurrent=places, start_time=start_time)
    if not searcher.missing:
        return StopReason()
    if barred:
        shapes = ", ".join(sorted(size or prepared.teacher["size"] for size in barred))
        print_progress(f"no budget admits {shapes}: students of such a shape are not trained")
    if all(run.student.size in barred for run in runs):
        raise UserError("no shape of the space fits any of its budgets; raise a budget, or add smaller sizes")
    for run in runs:
        check_capacity(run, device)
    in_actor = all(resolve_launcher(run, device) == "tune" for run in runs)
    trial = partial(
        tune_trial,
        space=space,
        sweep=str(sweep),
        prepared=prepared,
        device=device,
        train_in_actor=in_actor,
        train_fn=train_fn,
    )
    trial.__name__ = "trial"  # type: ignore[attr-defined]
    trainable = tune.with_resources(
        trial, tune.PlacementGroupFactory([max_worker_resources(runs, device) if in_actor else DRIVER_ONLY_RESOURCES])
    )
    had_actors = StartedTrials()
    for _ in range(1 + space.search.retries):
        _run_tuner(trainable, searcher, in_actor, [had_actors, *callbacks])
        if searcher.failed_keys <= had_actors.keys:
            break
        # Tune gives up at once a trial whose actor, kept from the trial before, was lost with its machine.
        searcher.reconcile()
    # Trials that died are taken up by the next command, whatever else is to come.
    died = len(searcher.given) - searcher.finished
    return replace(searcher.ended, exhausted=searcher.ended.exhausted and not died)


class StartedTrials(Callback):
    """Keys of the trials that had an actor to begin in."""

    def __init__(self) -> None:
        self.keys: set[str] = set()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called when the actor is there."""
        self.keys.add(trial.config["key"])


def _run_tuner(trainable: Any, searcher: "StudySearch", train_in_actor: bool, callbacks: list[Any]) -> None:
    """Have Tune run the trials that the search lacks."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(search_alg=searcher, num_samples=searcher.missing, reuse_actors=train_in_actor),
        run_config=tune.RunConfig(
            name="tune",
            failure_config=tune.FailureConfig(max_failures=searcher.space.search.retries),
            callbacks=callbacks,
            verbose=0,
            **sync.ray_storage_options(searcher.sweep / ".ray"),
        ),
    ).fit()


def find_infeasible_sizes(space: Space, prepared: PreparedSweep) -> frozenset[str | None]:
    """Values of `student.size` whose measured shape no budget of the space admits, with as few beams as may be."""
    sizes = {run.student.size for run in corner_runs(space)}
    return frozenset(size for size in sizes if is_infeasible(size, space.budgets, prepared))


def is_infeasible(size: str | None, budgets: dict[str, dict[str, Any]], prepared: PreparedSweep) -> bool:
    """Whether no budget admits a student of this size (None: the teacher's), with as few beams as may be."""
    costs = prepared.shape_costs_fewest_beams[size or prepared.teacher["size"]]
    return not fits_any_budget(costs, resolve_budgets(budgets, prepared.teacher["costs"]))


def max_concurrent(runs: list[Run], device: str) -> int:
    """How many trials the cluster can hold at a time."""
    workers = max(run.training.workers for run in runs)
    return max(1, slots(device, *_max_threads_and_gpus(runs)) // workers)


class ConcurrencyLimit:
    """How many trials may be under way now: `fixed`, else what the cluster can hold, which may grow and shrink."""

    def __init__(self, count_slots: Callable[[], int], fixed_limit: int | None = None) -> None:
        self.count = count_slots
        self.fixed_limit = fixed_limit
        self.found = 0
        self.next_check = 0.0

    def __call__(self) -> int:
        """Counts anew every `RECOUNT_INTERVAL_S` at most: Tune's loop asks many times a second."""
        if self.fixed_limit:
            return self.fixed_limit
        if time.monotonic() >= self.next_check:
            self.found, self.next_check = self.count(), time.monotonic() + RECOUNT_INTERVAL_S
        return self.found


def max_worker_resources(runs: list[Run], device: str) -> dict[str, float]:
    """What a worker of any of the runs holds at most."""
    return worker_resources(device, *_max_threads_and_gpus(runs))


def _max_threads_and_gpus(runs: list[Run]) -> tuple[int, float]:
    return max(run.training.threads for run in runs), max(run.training.gpus for run in runs)
