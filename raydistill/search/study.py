"""The Optuna study of a sweep: which trial comes next, and what the sampler learns from the finished ones.

The state of a search is SWEEP/proposals.json and the results in the trials' folders. Every command builds the study
from them, in memory. The journal SWEEP/study.log is a copy of the finished trials for optuna-dashboard and never read.
"""

import random
import time
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FixedTrial, FrozenTrial, TrialState, create_trial
from pydantic import BaseModel, ConfigDict

from raydistill.cluster import snapshots
from raydistill.config.corners import MAX_CORNERS, iter_corners, resolve_point
from raydistill.config.distributions import TrialLike, split_parameters, suggest_params
from raydistill.config.run import RUNTIME_ONLY_FIELDS, Run
from raydistill.config.space import Space, make_run, sampler_params
from raydistill.core.artifact import LockHeld
from raydistill.core.console import print_progress
from raydistill.core.errors import TransientError
from raydistill.core.files import corrupt_file_error
from raydistill.core.hashing import content_hash
from raydistill.core.records import Record
from raydistill.results.records import repeat_trial_remedy
from raydistill.results.sweep_record import StopReason
from raydistill.results.trial_index import trial_index
from raydistill.training.records import RESULT_FILE, RunResult

PROPOSALS_FILE = "proposals.json"
# Consecutive rejected proposals (tried before, or infeasible) after which random combinations replace the sampler's
MAX_DUPLICATES = 10
# Finished trials that the sampler learns from. It loops over them for each value that it proposes.
MAX_SAMPLER_TRIALS = 1000
# Consecutive rejected proposals after which the search ends
MAX_REJECTIONS = 200


class Proposal(BaseModel):
    """A trial to run.

    Attributes:
        key: Name of the trial's folder.
        number: Position in the order of proposals, from 0.
        params: The values that were chosen, by dotted key.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    number: int
    params: dict[str, Any]


class ProposalLog(Record):
    """The content of SWEEP/proposals.json: all trials that were ever proposed."""

    remedy: ClassVar[str | None] = "Delete this file: finished trials are recognised by their folders"
    indent: ClassVar[int | None] = None  # written at every proposal

    proposals: tuple[Proposal, ...] = ()


class SweepStudy:
    """An Optuna study that outlives the process, maximises the score and minimises `search.cost`.

    No two trials have the same settings. A proposed trial without a result, because it was killed, failed to run or its
    folder was deleted, is proposed again under the same key and number, and resumes from its folder. A trial with a
    result is never proposed again.

    A trial that was stopped early counts with the score of its best checkpoint. A failed run and a proposal of an
    infeasible size count as pruned, which TPE ranks below all others: an invented score and cost could be on the
    study's Pareto front.

    Args:
        space: The space to search.
        sweep: The sweep's folder.
        infeasible_sizes: Names of the shapes that must not be trained.
        start_time: Time of the monotonic clock from which `search.max_hours` counts; by default, now.

    Attributes:
        finished_keys: Keys of all trials with a result.
        proposed_keys: Keys of all trials that are finished or were proposed by this study.
        failed_keys: Keys of the trials that were reported to this study with an error.
        stop_reason: Why `propose` returned None.

    Raises:
        UserError: The proposals or the result of a trial cannot be read.
    """

    def __init__(
        self,
        space: Space,
        sweep: Path,
        infeasible_sizes: Collection[str] = (),
        start_time: float | None = None,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.space, self.sweep, self.infeasible_sizes = space, sweep, infeasible_sizes
        start_time = time.monotonic() if start_time is None else start_time
        self._deadline = start_time + 3600 * space.search.max_hours if space.search.max_hours else None
        self.finished_keys: set[str] = set()
        self.proposed_keys: set[str] = set()
        self.failed_keys: set[str] = set()
        self.stop_reason = StopReason()
        self._running: dict[str, optuna.Trial] = {}  # by the caller's id
        self._study = _create_study(space.name, sampler=self._make_sampler())
        self._journal = _create_study(space.name, storage=_new_journal(sweep / "study.log"))
        self._num_asked = 0
        self._proposals = read_proposals(sweep)  # by key
        self._add_results()
        self._queue = self._make_queue()  # values to propose before the sampler's, by key

    @property
    def num_finished(self) -> int:
        """Number of finished trials."""
        return len(self.finished_keys)

    @property
    def num_remaining(self) -> int:
        """Number of trials to run until there are `search.trials`."""
        return max(0, self.space.search.trials - self.num_finished)

    @property
    def num_running(self) -> int:
        """Number of trials that were proposed by this study and not reported yet."""
        return len(self._running)

    def propose(self, trial_id: str) -> Proposal | None:
        """The next trial; None if the search is over, with the reason in `stop_reason`.

        Args:
            trial_id: The name by which `report` refers to the trial.
        """
        num_rejected = 0
        while not (stop := self._find_stop_reason(num_rejected)).message:
            if self._queue:
                self._enqueue(self._queue.pop(next(iter(self._queue))))
            elif num_rejected >= MAX_DUPLICATES:
                self._enqueue(self._random_params())
            trial = self._study.ask()
            self._num_asked += 1
            params = self._suggest(trial)
            run = make_run(self.space, params, self.space.name)
            key = trial_key(run)
            if run.student.shape.name in self.infeasible_sizes:
                trial.set_user_attr("infeasible", f"no budget admits {run.student.shape.name}")
                self._study.tell(trial, state=TrialState.PRUNED)
            elif key in self.proposed_keys:
                self._study.tell(trial, state=TrialState.FAIL)
            else:
                return self._start(trial_id, trial, key, params)
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
        key = trial.user_attrs["key"]
        if result and result.get("finished"):
            self.finished_keys.add(key)
            frozen = trial.study.tell(trial, **self._reported_values(result))
            self._journal.add_trial(frozen)
            if trial.study is not self._study:  # the study was replaced while the trial was running
                self._study.add_trial(frozen)
            self._limit_study()
        else:
            self.failed_keys.add(key)
            trial.study.tell(trial, state=TrialState.FAIL)

    def _add_results(self) -> None:
        """Add the finished trials to the study, in the order of proposals."""
        trials = []
        for path in (self.sweep / "trials").glob(f"*/{RESULT_FILE}"):
            key, result = path.parent.name, RunResult.read(path)
            with corrupt_file_error(path, repeat_trial_remedy(path.parent)):
                proposal = Proposal.model_validate({"key": key, "number": result.number, "params": result.params})
                trials.append(self._finished_trial(proposal, final_report(result, self.space.search.cost)))
            self._proposals[key] = proposal
            self.finished_keys.add(key)
        self.proposed_keys |= self.finished_keys
        for trial in sorted(trials, key=lambda trial: trial.user_attrs["number"]):
            self._study.add_trial(trial)
            self._journal.add_trial(trial)
        self._limit_study()

    def _limit_study(self) -> None:
        """Replace a study of too many trials by a study of its Pareto front and its latest trials.

        A quarter more than `MAX_SAMPLER_TRIALS` are allowed, so that this is rare. The sampler keeps its state.
        """
        trials = self._study.get_trials(deepcopy=False)
        if len(trials) <= 1.25 * MAX_SAMPLER_TRIALS:
            return
        finished = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
        best = {trial.number for trial in self._study.best_trials}
        first = len(finished) - max(0, MAX_SAMPLER_TRIALS - len(best))
        kept = [trial for i, trial in enumerate(finished) if i >= first or trial.number in best]
        self._study = _create_study(self.space.name, sampler=self._study.sampler)
        self._study.add_trials(kept)

    def _make_sampler(self) -> optuna.samplers.BaseSampler:
        """The sampler; a grid is a queue of initial points, for which any sampler works."""
        if self.space.search.sampler == "random":
            return optuna.samplers.RandomSampler(seed=self.space.search.seed)
        return optuna.samplers.TPESampler(seed=self.space.search.seed, multivariate=False)

    def _suggest(self, trial: TrialLike) -> dict[str, Any]:
        """The values by dotted key that the sampler suggests for a trial."""
        return suggest_params(self.space.run, trial)

    def _sampler_values(self, params: dict[str, Any]) -> dict[str, Any]:
        """Values by dotted key as values by sampler name; the inverse of `_suggest`."""
        return sampler_params(self.space.run, params)

    def _finished_trial(self, proposal: Proposal, report: dict[str, Any]) -> FrozenTrial:
        fixed = FixedTrial(self._sampler_values(proposal.params))
        self._suggest(fixed)  # sets `distributions`
        attrs = {"key": proposal.key, "number": proposal.number}
        return create_trial(
            params=fixed.params, distributions=fixed.distributions, user_attrs=attrs, **self._reported_values(report)
        )

    def _reported_values(self, report: dict[str, Any]) -> dict[str, Any]:
        """How a finished trial counts in the study: its values, or pruned for a failed run."""
        if "score" not in report:
            return {"state": TrialState.PRUNED}
        return {"state": TrialState.COMPLETE, "values": [report["score"], report[self.space.search.cost]]}

    def _make_queue(self) -> dict[str, dict[str, Any]]:
        """Values to propose before the sampler's, by key: unfinished trials, points and, for a grid, combinations."""
        space = self.space
        unfinished = [p.params for p in self._proposals.values() if p.key not in self.finished_keys]
        with corrupt_file_error(self.sweep / PROPOSALS_FILE, ProposalLog.remedy):
            candidates = [resolve_point(space.run, params) for params in unfinished]
        candidates += [resolve_point(space.run, point) for point in space.points]
        candidates += iter_corners(space.run) if space.search.sampler == "grid" else []
        queue: dict[str, dict[str, Any]] = {}
        for params in candidates:
            run = make_run(space, params, space.name)
            key = trial_key(run)
            if run.student.shape.name not in self.infeasible_sizes and key not in self.finished_keys:
                queue.setdefault(key, params)
        return queue

    def _start(self, trial_id: str, trial: optuna.Trial, key: str, params: dict[str, Any]) -> Proposal:
        """Write a proposal to disk, so that the trial is proposed again after a kill."""
        number = 1 + max((proposal.number for proposal in self._proposals.values()), default=-1)
        proposal = self._proposals.setdefault(key, Proposal(key=key, number=number, params=params))
        path = self.sweep / PROPOSALS_FILE
        ProposalLog(proposals=tuple(self._proposals.values())).write(path)
        self._save_proposals()
        trial.set_user_attr("key", key)
        trial.set_user_attr("number", proposal.number)
        self._running[trial_id] = trial
        self.proposed_keys.add(key)
        return proposal

    def _save_proposals(self) -> None:
        """Copy the proposals to the storage. If the storage does not answer, the next proposal copies them.

        Raises:
            TransientError: Another command has taken over the sweep.
        """
        try:
            snapshots.save(self.sweep)
        except TransientError as error:
            if isinstance(error, LockHeld) or not isinstance(error.__context__, OSError):
                raise
            print_progress(f"the search continues without a copy of its proposals in the storage: {error.__context__}")

    def _enqueue(self, params: dict[str, Any]) -> None:
        """Let `ask` return these values next."""
        self._study.enqueue_trial(self._sampler_values(params))

    def _find_stop_reason(self, num_rejected: int) -> StopReason:
        """Why no further trial starts, after `num_rejected` consecutive rejections; running trials are not affected."""
        search = self.space.search
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return StopReason(f"the time limit of this command is reached (search.max_hours = {search.max_hours:g})")
        if search.max_device_hours is not None and trial_index(self.sweep).device_hours() >= search.max_device_hours:
            return StopReason(
                f"the limit of {search.max_device_hours:g} device-hours is reached (search.max_device_hours)"
            )
        if self._queue:
            return StopReason()
        # Not before MAX_DUPLICATES, since listing a large space takes seconds
        if search.sampler == "grid" or (num_rejected >= MAX_DUPLICATES and self._untried_combinations() == []):
            return StopReason("every combination of the space has had its trial", True)
        if num_rejected >= MAX_REJECTIONS:
            return StopReason(
                f"{num_rejected} consecutive proposals had been tried before or are of sizes that no budget admits",
                True,
            )
        return StopReason()

    def _random_params(self) -> dict[str, Any]:
        """A random combination, which is a function of the numbers of finished trials and of proposals.

        TPE does not avoid proposals that were tried before; in a space of few choices it can repeat a proposal without
        end.
        """
        run = self.space.run
        rng = random.Random(f"{self.space.search.seed}:{self.num_finished}:{self._num_asked}")
        if (untried := self._untried_combinations()) is not None:
            return rng.choice(untried)
        sampler = optuna.samplers.RandomSampler(seed=rng.getrandbits(32))
        return suggest_params(run, optuna.create_study(sampler=sampler).ask())

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
        return {trial_key(run): params for run, params in runs if run.student.shape.name not in self.infeasible_sizes}

    def _untried_combinations(self) -> list[dict[str, Any]] | None:
        """The feasible combinations without a proposal; None if they cannot be listed."""
        if self._combinations_by_key is None:
            return None
        return [params for key, params in self._combinations_by_key.items() if key not in self.proposed_keys]


def trial_key(run: Run) -> str:
    """The key of a trial, which names its folder: a function of all settings that change the result.

    Settings at their default do not count, so a setting that a later release adds does not change existing keys.
    """
    settings = run.model_dump(mode="json", exclude={"name": True, **RUNTIME_ONLY_FIELDS}, exclude_defaults=True)
    return f"{run.method}-{run.student.shape.name}-{content_hash(settings, digits=8)}"


def final_report(result: RunResult, cost: str) -> dict[str, Any]:
    """What is reported to the search about a finished run.

    Args:
        result: The run's result.
        cost: Name of the cost metric to minimise.

    Returns:
        The run's metrics, "status" and "finished"; for a run with a checkpoint, also "score" and the cost.

    Raises:
        LookupError: A run with a checkpoint has no score or no cost.
    """
    report = {**result.metrics, "status": result.status, "finished": True}
    if result.scored:
        report |= {name: result.metrics[name] for name in ("score", cost)}
    return report


def read_proposals(sweep: Path) -> dict[str, Proposal]:
    """The trials that were proposed in a sweep, by key.

    Raises:
        UserError: SWEEP/proposals.json is damaged.
    """
    log = ProposalLog.read_if_present(sweep / PROPOSALS_FILE) or ProposalLog()
    return {proposal.key: proposal for proposal in log.proposals}


def has_deleted_trials(sweep: Path) -> bool:
    """Whether the folder of a trial that was proposed is missing, which a study proposes again."""
    return not read_proposals(sweep).keys() <= {path.name for path in (sweep / "trials").glob("*/")}


def _create_study(name: str, **options: Any) -> optuna.Study:
    """A study that maximises the score and minimises the cost."""
    return optuna.create_study(study_name=name, directions=["maximize", "minimize"], **options)


def _new_journal(path: Path) -> JournalStorage:
    """A new journal in place of that of an earlier command, whose lock a kill can leave too."""
    for old in (path, *path.parent.glob(f"{path.name}.lock*")):
        old.unlink(missing_ok=True)
    return JournalStorage(JournalFileBackend(str(path)))
