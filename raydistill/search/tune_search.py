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
from raydistill.cluster.actor_pool import places, resources
from raydistill.config.run import Run
from raydistill.config.space import Space, corners, resolve
from raydistill.core.console import progress
from raydistill.core.errors import UserError
from raydistill.jobs.train import Work, check_room, launcher_for
from raydistill.results.pareto import admitted, known_bounds
from raydistill.search.prepare import Prepared, runs_of
from raydistill.search.study import Ending, StudySearch
from raydistill.search.trial import tune_trial
from raydistill.training.run import train

RECOUNT_S = 2.0
# What a trial holds that only waits for its Ray Train job: next to nothing (a byte), since Tune refuses nothing at all,
# and a part of a CPU would keep the last of as many trials as there are CPUs from its own.
WAITS = {"memory": 1.0}
# Tune would hand the AWS keys of this process to its actors as a setting, which Ray's agent writes into a log that all
# may read. Actors on this machine have its environment anyway; other nodes have roles or keys of their own.
class_cache.ENV_VARS_TO_PROPAGATE.difference_update(
    [name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")]
)


def search(
    space: Space,
    sweep: Path,
    prepared: Prepared,
    device: str,
    callbacks: list[Any],
    work: Work = train,
    begun: float | None = None,
) -> Ending:
    """Run the trials that the sweep still lacks. What they find stands in their folders and in SWEEP/study.log.

    Returns why it ended before all were run, if it did. `begun`: since when, by the monotonic clock, `search.max_hours`
    counts; now, if None. `work` is there for measuring the search itself (benchmarks/scaling.py).
    """
    barred = barred_sizes(space, prepared)
    runs = [resolve(space, chosen, space.name) for chosen in corners(space.run, limit=200)]
    places = Room(partial(room, runs, device), space.search.concurrent)
    searcher = StudySearch(space, sweep, barred, room=places, begun=begun)
    if not searcher.missing:
        return Ending()
    if barred:
        shapes = ", ".join(sorted(size or prepared.teacher["size"] for size in barred))
        progress(f"no budget admits {shapes}: students of such a shape are not trained")
    if all(run.student.size in barred for run in runs):
        raise UserError("no shape of the space fits any of its budgets; raise a budget, or add smaller sizes")
    for run in runs:
        check_room(run, device)
    in_actor = all(launcher_for(run, device) == "tune" for run in runs)
    trial = partial(
        tune_trial, space=space, sweep=str(sweep), prepared=prepared, device=device, in_actor=in_actor, work=work
    )
    trial.__name__ = "trial"  # type: ignore[attr-defined]
    trainable = tune.with_resources(trial, tune.PlacementGroupFactory([largest(runs, device) if in_actor else WAITS]))
    had_actors = Begun()
    for _ in range(1 + space.search.retries):
        _tuned(trainable, searcher, in_actor, [had_actors, *callbacks])
        if searcher.died <= had_actors.keys:
            break
        # Tune gives up at once a trial whose actor, kept from the trial before, was lost with its machine.
        searcher.take_up()
    # Trials that died are taken up by the next command, whatever else is to come.
    died = len(searcher.given) - searcher.finished
    return replace(searcher.ended, exhausted=searcher.ended.exhausted and not died)


class Begun(Callback):
    """Keys of the trials that had an actor to begin in."""

    def __init__(self) -> None:
        self.keys: set[str] = set()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called when the actor is there."""
        self.keys.add(trial.config["key"])


def _tuned(trainable: Any, searcher: "StudySearch", in_actor: bool, callbacks: list[Any]) -> None:
    """Have Tune run the trials that the search lacks."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(search_alg=searcher, num_samples=searcher.missing, reuse_actors=in_actor),
        run_config=tune.RunConfig(
            name="tune",
            failure_config=tune.FailureConfig(max_failures=searcher.search_space.search.retries),
            callbacks=callbacks,
            verbose=0,
            **sync.for_ray(searcher.sweep / ".ray"),
        ),
    ).fit()


def barred_sizes(space: Space, prepared: Prepared) -> frozenset[str | None]:
    """Values of `student.size` whose measured shape no budget of the space admits, with as few beams as may be."""
    sizes = {run.student.size for run in runs_of(space)}
    return frozenset(size for size in sizes if is_barred(size, space.budgets, prepared))


def is_barred(size: str | None, budgets: dict[str, dict[str, Any]], prepared: Prepared) -> bool:
    """Whether no budget admits a student of this size (None: the teacher's), with as few beams as may be."""
    costs = prepared.shapes_fewest_beams[size or prepared.teacher["size"]]
    return not admitted(costs, known_bounds(budgets, prepared.teacher["costs"]))


def room(runs: list[Run], device: str) -> int:
    """How many trials the cluster can hold at a time."""
    workers = max(run.training.workers for run in runs)
    return max(1, places(device, *_most(runs)) // workers)


class Room:
    """How many trials may be under way now: `fixed`, else what the cluster can hold, which may grow and shrink."""

    def __init__(self, count: Callable[[], int], fixed: int | None = None) -> None:
        self.count = count
        self.fixed = fixed
        self.found = 0
        self.next = 0.0

    def __call__(self) -> int:
        """Counts anew every `RECOUNT_S` at most: Tune's loop asks many times a second."""
        if self.fixed:
            return self.fixed
        if time.monotonic() >= self.next:
            self.found, self.next = self.count(), time.monotonic() + RECOUNT_S
        return self.found


def largest(runs: list[Run], device: str) -> dict[str, float]:
    """What a worker of any of the runs holds at most."""
    return resources(device, *_most(runs))


def _most(runs: list[Run]) -> tuple[int, float]:
    return max(run.training.threads for run in runs), max(run.training.gpus for run in runs)
