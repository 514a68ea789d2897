"""Trains the best students of a sweep with further seeds (`search.seeds`), so that the choice knows their variance.

The chosen student of each budget and its nearest rival are trained with `search.seeds` seeds in all. Their scores are
then means, and intervals are over seeds and rows. If the means choose another student, or make another student the
nearest rival, this student is trained with the same seeds too. What is missing follows from the sweep's folder, so the
same command resumes after a kill.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray.tune import Callback

from raydistill.cluster import snapshots
from raydistill.config.space import Space, resource_runs
from raydistill.core.console import print_progress
from raydistill.results.formatting import format_count
from raydistill.results.pareto import nearest_rival
from raydistill.results.records import SEED_RUNS, Trial, seed_run_folder
from raydistill.results.selection import Selection, load_selection
from raydistill.results.trial_index import trial_index
from raydistill.search.finalists import score_on_test, serve_repeats, unserved_repeats
from raydistill.search.trial import TrialContext
from raydistill.search.tune_search import TrialTuner
from raydistill.training.records import RESULT_FILE


class SeedProposal(BaseModel):
    """The run of a trial with another seed.

    Attributes:
        key: Key of the trial.
        number: Number of the trial.
        params: The values that the search chose.
        seed: The seed of training.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    number: int
    params: dict[str, Any]
    seed: int


def all_repeated(space: Space, sweep: Path) -> bool:
    """Whether `repeat_with_seeds` has nothing to do. Reads files only."""
    if space.search.seeds == 1:
        return True
    selection = load_selection(sweep)
    return not missing_repeats(space, selection) and not any(map(unserved_repeats, contenders(space, selection)))


def repeat_with_seeds(context: TrialContext) -> None:
    """Train and serve what is missing of `search.seeds`, then score the students of the front on the test split.

    Ends early at the limit of device-hours, and if a run is lost; the next command continues.
    """
    space, sweep = context.space, context.sweep
    if space.search.seeds == 1:
        return
    while True:
        if missing := missing_repeats(space, load_selection(sweep)):
            _train(context, missing)
            snapshots.pull_records(sweep / SEED_RUNS)
        trials = contenders(space, load_selection(sweep))
        num_served = serve_repeats(space, sweep, context.prepared.teacher, trials, context.device)
        num_left = sum(not _result_path(sweep, proposal).is_file() for proposal in missing)
        if num_left:
            print_progress(f"seeds: {format_count(num_left, 'run')} not finished; run the same command again")
        if num_left or not (missing or num_served):
            break
    score_on_test(space, sweep, context.prepared.teacher, context.device)


def contenders(space: Space, selection: Selection) -> list[Trial]:
    """The trials of the chosen student of each budget and of its nearest rival; none with one seed."""
    if space.search.seeds == 1 or not selection.has_served_students:
        return []
    keys: set[str] = set()
    for choice in selection.choices.values():
        rival = nearest_rival(choice, selection.trial_key)
        keys |= {selection.trial_key(key) for key in (choice.best.key if choice.best else None, rival) if key}
    return [trial for trial in selection.trials if trial.key in keys]


def missing_repeats(space: Space, selection: Selection) -> list[SeedProposal]:
    """The runs of the contenders that `search.seeds` asks for and that have no result."""
    proposals = [
        SeedProposal(key=trial.key, number=trial.number or 0, params=trial.params, seed=trial.seed + i)
        for trial in contenders(space, selection)
        for i in range(1, space.search.seeds)
    ]
    return [proposal for proposal in proposals if not _result_path(selection.sweep, proposal).is_file()]


class SeedQueue:
    """The repeats that are missing, for Tune.

    Args:
        space: The sweep's space.
        sweep: The sweep's folder.
        proposals: The repeats to run.
    """

    def __init__(self, space: Space, sweep: Path, proposals: Sequence[SeedProposal]) -> None:
        self._space, self._sweep = space, sweep
        self._waiting = list(proposals)
        self._running: set[str] = set()

    @property
    def num_running(self) -> int:
        """Number of runs that were proposed and not reported yet."""
        return len(self._running)

    @property
    def num_remaining(self) -> int:
        """Number of runs that were not proposed yet."""
        return len(self._waiting)

    def propose(self, trial_id: str) -> SeedProposal | None:
        """The next run; None if there is none, or if `search.max_device_hours` is reached."""
        limit = self._space.search.max_device_hours
        if not self._waiting or (limit is not None and trial_index(self._sweep).device_hours() >= limit):
            return None
        self._running.add(trial_id)
        return self._waiting.pop(0)

    def report(self, trial_id: str, result: dict[str, Any] | None) -> None:
        """Record the end of a run. Its folder shows whether it has a result."""
        self._running.discard(trial_id)


class SeedProgress(Callback):
    """Prints a line when a repeat starts, finishes or fails."""

    def __init__(self, metric: str) -> None:
        self.metric = metric

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called when a run starts, and when Tune restarts a run whose process was lost."""
        print_progress(f"{_name(trial)} starts")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Called at every validation, and at the end of a run."""
        if "error_message" in result:
            print_progress(f"{_name(trial)} failed: {result['error_message']}")
        if result.get("finished"):
            score = f"{self.metric} {result['score']:.2f}" if "score" in result else "failed"
            print_progress(f"{_name(trial)} finished: {score}")


def _train(context: TrialContext, proposals: Sequence[SeedProposal]) -> None:
    runs = format_count(len(proposals), "run")
    print_progress(f"seeds: {runs} of the chosen students and their nearest rivals with further seeds")
    tuner = TrialTuner(context, resource_runs(context.space), [SeedProgress(context.prepared.teacher.metric)])
    tuner.run(SeedQueue(context.space, context.sweep, proposals))


def _result_path(sweep: Path, proposal: SeedProposal) -> Path:
    return seed_run_folder(sweep, proposal.key, proposal.seed) / RESULT_FILE


def _name(trial: Any) -> str:
    return f"trial {trial.config['number']} {trial.config['key']}, seed {trial.config['seed']}"
