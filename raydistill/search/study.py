"""The Optuna study of a sweep: which trial comes next, and what the sampler learns from the finished ones.

The study's journal, SWEEP/study.log, and the trials' own results are the only state of a search. A search that was
killed is resumed from them by a new process.
"""

import hashlib
import json
import random
import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from raydistill.cluster import sync
from raydistill.config.corners import MAX_CORNERS, iter_corners, resolve_point
from raydistill.config.distributions import split_parameters, suggest_params
from raydistill.config.run import RUNTIME_ONLY_FIELDS, Run
from raydistill.config.space import Search, Space, make_run, sampler_params
from raydistill.core.console import print_progress
from raydistill.core.files import corrupt_file_error, safe_join, write_atomic
from raydistill.results.records import device_hours
from raydistill.training.records import RESULT_FILE, RunResult

# Consecutive proposals that were tried before or are infeasible, after which random combinations replace the sampler's
MAX_DUPLICATES = 10
# Consecutive proposals as above, after which the search ends, since random combinations are not new either
MAX_REJECTIONS = 200
CORRUPT_STUDY_REMEDY = "Delete this file to start a new study: finished trials are recognised by their folders"


@dataclass(frozen=True)
class Proposal:
    """A trial to run: its key, its number in the order of proposals, the student's size and the values chosen."""

    key: str
    number: int
    size: str
    params: dict[str, Any]


@dataclass(frozen=True)
class StopReason:
    """Why a search proposes no more trials; the message is empty while the search continues.

    `exhausted`: whether the search would end for the same reason if the command were run again.
    """

    message: str = ""
    exhausted: bool = False


class SweepStudy:
    """An Optuna study that outlives the process, maximises the score and minimises `search.cost`.

    No two trials have the same settings. A trial that was running when the sweep was killed is proposed again under the
    same key, and resumes from its folder; a finished trial is never proposed again.

    A trial that was stopped early counts with the score of its best checkpoint. A failed run and a proposal of an
    infeasible size count as pruned, which TPE ranks below all others: an invented score and cost could be on the
    study's Pareto front.

    Args:
        space: The space to search.
        sweep: The sweep's folder.
        infeasible_sizes: Values of `student.size` that must not be trained.
        storage: Optuna's storage of the study; by default, the journal SWEEP/study.log.
        start_time: Time of the monotonic clock from which `search.max_hours` counts; by default, now.

    Attributes:
        proposed_keys: Keys of all trials that are finished or were proposed by this process.
        failed_keys: Keys of the trials that this process reported with an error.
        stop_reason: Why `propose` returned None.
    """

    def __init__(
        self,
        space: Space,
        sweep: Path,
        infeasible_sizes: Collection[str | None] = (),
        storage: BaseStorage | None = None,
        start_time: float | None = None,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.space, self.sweep, self.infeasible_sizes = space, sweep, infeasible_sizes
        start_time = time.monotonic() if start_time is None else start_time
        self._deadline = start_time + 3600 * space.search.max_hours if space.search.max_hours else None
        self.proposed_keys: set[str] = set()
        self.failed_keys: set[str] = set()
        self.stop_reason = StopReason()
        self._numbers: dict[str, int] = {}  # by key
        self._running: dict[str, optuna.Trial] = {}  # by the caller's id
        journal = sweep / "study.log"
        if storage is None:
            truncate_corrupt_tail(journal)
        with corrupt_file_error(journal, CORRUPT_STUDY_REMEDY):
            self._study = optuna.create_study(
                study_name=space.name,
                storage=storage or JournalStorage(JournalFileBackend(str(journal))),
                sampler=_make_sampler(space.search),
                pruner=optuna.pruners.NopPruner(),
                directions=["maximize", "minimize"],
                load_if_exists=True,
            )
            self.reconcile()

    @property
    def num_finished(self) -> int:
        """Number of finished trials."""
        return sum(_is_finished(trial) for trial in self._study.get_trials(deepcopy=False))

    @property
    def num_remaining(self) -> int:
        """Number of trials to run until there are `search.trials`."""
        return max(0, self.space.search.trials - self.num_finished)

    @property
    def num_running(self) -> int:
        """Number of trials that were proposed by this process and not reported yet."""
        return len(self._running)

    def propose(self, trial_id: str) -> Proposal | None:
        """The next trial; None if the search is over, with the reason in `stop_reason`.

        Args:
            trial_id: The name by which `report` refers to the trial.
        """
        num_rejected = 0
        while not (stop := self._find_stop_reason(num_rejected)).message:
            if num_rejected >= MAX_DUPLICATES and self.space.search.sampler != "grid":
                self._enqueue_random()
            trial = self._study.ask()
            params = suggest_params(self.space.run, trial)
            run = make_run(self.space, params, self.space.name)
            key = trial_key(run)
            if run.student.size in self.infeasible_sizes:
                trial.set_user_attr("infeasible", f"no budget admits {run.student.size or 'the full size'}")
                self._study.tell(trial, state=TrialState.PRUNED)
            elif key in self.proposed_keys:
                self._study.tell(trial, state=TrialState.FAIL)
            else:
                return self._start(
                    trial_id, trial, Proposal(key, self._number(key), run.student.size or "full", params)
                )
            num_rejected += 1
        self.stop_reason = stop
        return None

    def report(self, trial_id: str, result: dict[str, Any] | None) -> None:
        """Record the end of a trial. Calls after the first for a trial are ignored.

        Args:
            trial_id: The name given to `propose`.
            result: The `final_report` of a finished run; anything else means that the trial was lost, and the next
                study proposes the trial again.
        """
        trial = self._running.pop(trial_id, None)
        if trial is None:
            return
        if not (result and result.get("finished")):
            self.failed_keys.add(trial.user_attrs["key"])
        self._tell(trial, result or {})
        sync.push(self.sweep / "study.log")

    def reconcile(self) -> None:
        """Bring the study of a killed search into order: every trial is finished, failed or waiting.

        Trials that were running are closed by their results. Trials without a result, and the initial points that were
        never proposed, are put into the queue. Initial points are recognised by their values, since a kill can come
        while they are being enqueued, or between a proposal and the setting of its key.
        """
        study = self._study
        self.failed_keys = set()
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            self._close_running(trial)
        trials = study.get_trials()
        # From the folders too: the end of the journal may be lost
        self._numbers = {
            path.parent.name: _read_trial_number(path) for path in (self.sweep / "trials").glob(f"*/{RESULT_FILE}")
        }
        self._numbers |= {t.user_attrs["key"]: t.user_attrs["number"] for t in trials if "number" in t.user_attrs}
        self.proposed_keys = {t.user_attrs["key"] for t in trials if _is_finished(t) and "key" in t.user_attrs}
        known = [t.params for t in trials if _is_finished(t)]
        known += [t.system_attrs.get("fixed_params", {}) for t in trials if t.state == TrialState.WAITING]
        lost = [t.params for t in trials if "key" in t.user_attrs and t.user_attrs["key"] not in self.proposed_keys]
        points = [sampler_params(self.space.run, params) for params in self._initial_points()]
        for values in [*lost, *points]:
            if values not in known:
                study.enqueue_trial(values)
                known.append(values)

    def _start(self, trial_id: str, trial: optuna.Trial, proposal: Proposal) -> Proposal:
        self._running[trial_id] = trial
        self.proposed_keys.add(proposal.key)
        trial.set_user_attr("key", proposal.key)
        trial.set_user_attr("number", proposal.number)
        sync.push(self.sweep / "study.log")
        return proposal

    def _number(self, key: str) -> int:
        """The number of a key: the one it had before, else the next one."""
        return self._numbers.setdefault(key, 1 + max(self._numbers.values(), default=-1))

    def _close_running(self, trial: FrozenTrial) -> None:
        """Close a trial that was running when the search was killed, by its result if there is one."""
        path = safe_join(self.sweep / "trials", trial.user_attrs.get("key", "-")) / RESULT_FILE
        result = RunResult.read_if_present(path)
        self._tell(trial.number, final_report(result, self.space.search.cost) if result else {})

    def _tell(self, trial: optuna.Trial | int, result: dict[str, Any]) -> None:
        """Tell Optuna how a trial ended: complete with a score, pruned for a failed run, failed for a lost trial."""
        if not result.get("finished"):
            self._study.tell(trial, state=TrialState.FAIL)
        elif "score" not in result:
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            self._study.tell(trial, [result["score"], result[self.space.search.cost]])

    def _find_stop_reason(self, num_rejected: int) -> StopReason:
        """Why no further trial starts, after `num_rejected` consecutive rejections; running trials are not affected."""
        search = self.space.search
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return StopReason(f"the {search.max_hours:g} hours of this run of the command are used up")
        if search.max_device_hours is not None and device_hours(self.sweep) >= search.max_device_hours:
            return StopReason(f"the search's {search.max_device_hours:g} device-hours are used up")
        if search.sampler == "grid":
            exhausted = not self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        else:  # not before MAX_DUPLICATES, since listing a large space takes seconds
            exhausted = (
                num_rejected >= MAX_DUPLICATES
                and self._combinations_by_key is not None
                and not self._untried_combinations()
            )
            if num_rejected >= MAX_REJECTIONS and not exhausted:
                return StopReason(
                    f"{num_rejected} consecutive proposals had been tried before or are of sizes that no budget admits",
                    True,
                )
        return StopReason("every combination of the space has had its trial", True) if exhausted else StopReason()

    def _enqueue_random(self) -> None:
        """Enqueue a random combination, the same one for the same state of the study.

        TPE does not avoid proposals that were tried before; in a space of few choices it can repeat one for ever.
        """
        run = self.space.run
        rng = random.Random(f"{self.space.search.seed}:{len(self._study.get_trials(deepcopy=False))}")
        if self._combinations_by_key is None:
            sampler = optuna.samplers.RandomSampler(seed=rng.getrandbits(32))
            params = suggest_params(run, optuna.create_study(sampler=sampler).ask())
        else:
            params = rng.choice(self._untried_combinations())
        self._study.enqueue_trial(sampler_params(run, params))

    @cached_property
    def _combinations_by_key(self) -> dict[str, dict[str, Any]] | None:
        """Every feasible combination of a space of choices; None if the space has ranges or too many combinations."""
        space = self.space
        if any(case.distribution.choice is None for case in split_parameters(space.run)[1]):
            return None
        combinations = list(iter_corners(space.run))
        if len(combinations) >= MAX_CORNERS:  # a random sample of a larger space
            return None
        runs = [(make_run(space, params, space.name), params) for params in combinations]
        return {trial_key(run): params for run, params in runs if run.student.size not in self.infeasible_sizes}

    def _untried_combinations(self) -> list[dict[str, Any]]:
        return [params for key, params in (self._combinations_by_key or {}).items() if key not in self.proposed_keys]

    def _initial_points(self) -> list[dict[str, Any]]:
        """The space's own points, followed by every combination for a grid."""
        space = self.space
        points = [resolve_point(space.run, point) for point in space.points]
        if space.search.sampler == "grid":
            points += [params for params in iter_corners(space.run) if params not in points]
        return points


def trial_key(run: Run) -> str:
    """The key of a trial, which names its folder: a function of all settings that change the result.

    Settings at their default do not count, so a setting that a later release adds does not change existing keys.
    """
    settings = run.model_dump(mode="json", exclude={"name": True, **RUNTIME_ONLY_FIELDS}, exclude_defaults=True)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return f"{run.method}-{run.student.size or 'full'}-{digest}"


def final_report(result: RunResult, cost: str) -> dict[str, Any]:
    """What the search learns of a finished run.

    Args:
        result: The result of the run.
        cost: Name of the cost metric to minimise.

    Returns:
        The run's metrics, "status" and "finished"; for a run with a checkpoint, also "score" and the cost.
    """
    report = {**result.metrics, "status": result.status, "finished": True}
    if result.scored:
        report |= {"score": result.metrics["score"], cost: result.metrics.get(cost, 0.0)}
    return report


def truncate_corrupt_tail(journal: Path) -> None:
    """Cut a study's journal at its first damaged line, which a full disk can leave, and keep a copy as *.damaged.

    The trials of the lost lines are recognised by their folders.
    """
    if not journal.is_file():
        return
    content = journal.read_bytes()
    intact_bytes = 0
    for line in content.splitlines(keepends=True):
        if not line.endswith(b"\n") or not _is_json_object(line):
            break
        intact_bytes += len(line)
    if intact_bytes < len(content):
        copy = journal.with_suffix(".damaged")
        write_atomic(copy, content)
        write_atomic(journal, content[:intact_bytes])
        print_progress(
            f"{journal}: removed a damaged end; finished trials are recognised by their folders (copy: {copy})"
        )


def _make_sampler(search: Search) -> optuna.samplers.BaseSampler:
    """The sampler; a grid is a queue of initial points, for which any sampler works."""
    if search.sampler == "random":
        return optuna.samplers.RandomSampler(seed=search.seed)
    return optuna.samplers.TPESampler(seed=search.seed, multivariate=False)


def _is_finished(trial: FrozenTrial) -> bool:
    """Whether a trial has a result. Infeasible proposals are pruned too, but never get a key."""
    return trial.state == TrialState.COMPLETE or (trial.state == TrialState.PRUNED and "key" in trial.user_attrs)


def _is_json_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_trial_number(path: Path) -> int:
    """The number in a result.json; -1 if there is none."""
    number = RunResult.read(path).number
    return -1 if number is None else number
