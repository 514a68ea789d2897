"""The search: Ray Tune proposes trials through Optuna, and an unfinished sweep goes on from its study on disk."""

import hashlib
import json
import random
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from raydistill.cluster import sync
from raydistill.config.corners import MAX_CORNERS
from raydistill.config.run import HOW, Run
from raydistill.config.space import Space, corners, point_values, propose, resolve, sampler_names, split
from raydistill.core.console import progress
from raydistill.core.files import damage_told, inside, read_json, write_atomic
from raydistill.jobs.train import Metrics
from raydistill.results.records import device_hours

# Of proposals that were tried before, or are barred: after so many the sampler is stuck, and chance takes its place;
# after so many more there is nothing new to be found by chance either.
STUCK, GIVEN_UP = 10, 200
STUDY_LOST = "Delete this file to go on with a new study: finished trials are known again by their folders"


def key_of(run: Run) -> str:
    """A trial's key, and its folder's name: the same settings are the same trial, whatever it is called."""
    # Without defaults, so that a setting that a later release adds does not make another trial of it.
    settings = run.model_dump(mode="json", exclude={"name": True, **HOW}, exclude_defaults=True)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return f"{run.method}-{run.student.size or 'full'}-{digest}"


@dataclass(frozen=True)
class Ending:
    """Why a search proposes nothing more ("" while it does), and whether it would not either when asked again."""

    why: str = ""
    exhausted: bool = False


def mend(journal: Path) -> None:
    """Cut a study's journal at its first damaged line, such as a full disk leaves; a copy of it stays beside.

    What is left is the study as it was then, and trials that are missing in it are known again by their folders.
    """
    if not journal.is_file():
        return
    content = journal.read_bytes()
    whole = 0
    for line in content.splitlines(keepends=True):
        if not line.endswith(b"\n") or not _is_record(line):
            break
        whole += len(line)
    if whole < len(content):
        kept = journal.with_suffix(".damaged")
        write_atomic(kept, content)
        write_atomic(journal, content[:whole])
        progress(f"{journal}: its end was damaged and is left out; finished trials are known by their folders ({kept})")


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _number(result: Path) -> int:
    """The number that a finished trial had."""
    found = read_json(result)
    with damage_told(result):
        return int(found.get("number", -1))


class StudySearch(OptunaSearch):
    """OptunaSearch on a study that outlives the process.

    The study's journal and the trials' own results are the only memory: a sweep that was killed is not restored from
    Tune's snapshots (which lag behind), but started anew on the same study. A trial that was under way is proposed
    again and goes on from its folder; a finished one is never started again; the same settings are not tried twice.

    What the sampler learns: a trial that was stopped early has the score of its best checkpoint, which is real; a
    failed one, and a proposal of a size in `barred`, stand in the study as pruned, which TPE ranks below all others.

    `room` tells how many trials may be under way, whenever one is asked for; the default is any number. `storage` is
    for a search that is to leave nothing; the default is the journal SWEEP/study.log.
    """

    _ot_study: Any

    def __init__(
        self,
        space: Space,
        sweep: Path,
        barred: Collection[str | None] = (),
        storage: BaseStorage | None = None,
        room: Callable[[], int] | None = None,
        begun: float | None = None,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.search_space = space
        self.barred = barred
        begun = time.monotonic() if begun is None else begun
        self.ends = begun + 3600 * space.search.max_hours if space.search.max_hours else None
        self.sweep = sweep
        self.trials_folder = sweep / "trials"
        self.cost = space.search.cost
        self.numbers: dict[str, int] = {}
        self.given: set[str] = set()
        self.room = room
        self.under_way: set[str] = set()
        self.died: set[str] = set()
        self.ended = Ending()
        sampler = (
            optuna.samplers.RandomSampler(seed=space.search.seed)
            if space.search.sampler == "random"
            else optuna.samplers.TPESampler(seed=space.search.seed, multivariate=False)
        )
        journal = sweep / "study.log"
        if storage is None:
            mend(journal)
        with damage_told(journal, STUDY_LOST):
            super().__init__(
                partial(_define, run=space.run),
                metric=["score", self.cost],
                mode=["max", "min"],
                sampler=sampler,
                study_name=space.name,
                storage=storage or JournalStorage(JournalFileBackend(str(journal))),
            )
            self.take_up()

    @property
    def finished(self) -> int:
        """Trials of the study that are over."""
        return sum(_is_over(trial) for trial in self._ot_study.get_trials(deepcopy=False))

    @property
    def missing(self) -> int:
        """Trials that are still to be run."""
        return max(0, self.search_space.search.trials - self.finished)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """The next proposal whose settings no trial has had, or that a killed trial had; None while there is no room.

        Tune asks again then. Its own limit would be what the cluster can hold when the search starts.
        """
        if self.room and len(self.under_way) >= self.room():
            return None
        rejected = 0
        while not (ended := self._ending(rejected)).why:
            if rejected >= STUCK and self.search_space.search.sampler != "grid":
                self._draw()
            trial = self._ot_study.ask()
            chosen = propose(self.search_space.run, trial)
            run = resolve(self.search_space, chosen, self.search_space.name)
            key = key_of(run)
            if run.student.size in self.barred:
                trial.set_user_attr("barred", f"no budget admits {run.student.size or 'the full size'}")
                self._ot_study.tell(trial, state=TrialState.PRUNED)
            elif key in self.given:
                self._ot_study.tell(trial, state=TrialState.FAIL)
            else:
                self._ot_trials[trial_id] = trial
                self.under_way.add(trial_id)
                self.given.add(key)
                number = self.numbers.setdefault(key, 1 + max(self.numbers.values(), default=-1))
                trial.set_user_attr("key", key)
                trial.set_user_attr("number", number)
                sync.keep(self.sweep / "study.log")
                return {"chosen": chosen, "key": key, "number": number, "size": run.student.size or "full"}
            rejected += 1
        self.ended = ended
        return Searcher.FINISHED

    def _draw(self) -> None:
        """Have the study propose by chance what a sampler that is stuck does not; the same again for the same study.

        TPE takes no notice of a proposal that was tried before, and with a few choices would make it for ever.
        """
        run = self.search_space.run
        rng = random.Random(f"{self.search_space.search.seed}:{len(self._ot_study.get_trials(deepcopy=False))}")
        if self._corners is None:
            sampler = optuna.samplers.RandomSampler(seed=rng.getrandbits(32))
            chosen = propose(run, optuna.create_study(sampler=sampler).ask())
        else:
            chosen = rng.choice(self._untried())
        self._ot_study.enqueue_trial(sampler_names(run, chosen))

    @cached_property
    def _corners(self) -> dict[str, dict[str, Any]] | None:
        """By key, every combination that may be trained, of a space made of choices; None where there is no end."""
        space = self.search_space
        if any(case.distribution.choice is None for case in split(space.run)[1]):
            return None
        found = list(corners(space.run))
        if len(found) >= MAX_CORNERS:  # drawn at random, and not all
            return None
        runs = [(resolve(space, chosen, space.name), chosen) for chosen in found]
        return {key_of(run): chosen for run, chosen in runs if run.student.size not in self.barred}

    def _untried(self) -> list[dict[str, Any]]:
        return [chosen for key, chosen in (self._corners or {}).items() if key not in self.given]

    def _ending(self, rejected: int) -> Ending:
        """Why nothing more starts, if so: what is under way ends all the same. `rejected`: proposals in a row."""
        search = self.search_space.search
        if self.ends is not None and time.monotonic() >= self.ends:
            return Ending(f"the {search.max_hours:g} hours of this run of the command are used up")
        if search.max_device_hours is not None and device_hours(self.sweep) >= search.max_device_hours:
            return Ending(f"its {search.max_device_hours:g} device-hours are used up")
        if search.sampler == "grid":
            exhausted = not self._ot_study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        else:  # looked at late, since a large space takes seconds to walk
            exhausted = rejected >= STUCK and self._corners is not None and not self._untried()
            if rejected >= GIVEN_UP and not exhausted:
                return Ending(f"{rejected} proposals in a row had been tried before, or are of shapes too dear", True)
        return Ending("every combination of the space has had its trial", True) if exhausted else Ending()

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study. A run that failed is over; a trial whose process died is proposed again next time.

        Neither has values: a made-up score and cost could stand on the study's front.
        """
        self.under_way.discard(trial_id)
        if error:
            self.died.add(self._ot_trials[trial_id].user_attrs["key"])
        finished = result is not None and bool(result.get("finished"))
        scored = finished and result is not None and "score" in result
        if finished and not scored:
            self._ot_trials[trial_id].set_user_attr("over", True)
        # Without values and without an error the parent tells "pruned"
        super().on_trial_complete(trial_id, result if scored else None, error=not finished)
        sync.keep(self.sweep / "study.log")

    def take_up(self) -> None:
        """Put a study that was killed in order: each trial over, waiting, or waiting again.

        First points are looked for by their values, since a kill may come while they are being enqueued, or after one
        was taken and before it got its key.
        """
        self.died = set()
        for trial in self._ot_study.get_trials(states=(TrialState.RUNNING,)):
            self._settle(trial)
        trials = self._ot_study.get_trials()
        # Of folders too: the end of a journal may have been lost.
        self.numbers = {path.parent.name: _number(path) for path in self.trials_folder.glob("*/result.json")}
        self.numbers |= {t.user_attrs["key"]: t.user_attrs["number"] for t in trials if "number" in t.user_attrs}
        self.given = {t.user_attrs["key"] for t in trials if _is_over(t) and "key" in t.user_attrs}
        seen = [t.params for t in trials if _is_over(t)]
        seen += [t.system_attrs.get("fixed_params") for t in trials if t.state == TrialState.WAITING]
        died = [t.params for t in trials if "key" in t.user_attrs and t.user_attrs["key"] not in self.given]
        points = [sampler_names(self.search_space.run, chosen) for chosen in self._first_points()]
        for values in [*died, *points]:
            if values not in seen:
                self._ot_study.enqueue_trial(values)
                seen.append(values)

    def _settle(self, trial: optuna.trial.FrozenTrial) -> None:
        """A trial that was under way when the sweep died: over if its result is there, else failed for now."""
        path = inside(self.trials_folder, trial.user_attrs.get("key", "-")) / "result.json"
        values = final_report(read_json(path), self.cost) if path.is_file() else {}
        if "score" in values:
            self._ot_study.tell(trial.number, [values["score"], values[self.cost]])
            return
        if values:
            self._ot_study._storage.set_trial_user_attr(trial._trial_id, "over", True)
        self._ot_study.tell(trial.number, state=TrialState.PRUNED if values else TrialState.FAIL)

    def _first_points(self) -> list[dict[str, Any]]:
        space = self.search_space
        points = [point_values(space.run, point) for point in space.points]
        if space.search.sampler == "grid":
            points += [chosen for chosen in corners(space.run) if chosen not in points]
        return points


def _is_over(trial: optuna.trial.FrozenTrial) -> bool:
    return trial.state == TrialState.COMPLETE or bool(trial.user_attrs.get("over"))


def _define(trial: Any, run: dict[str, Any]) -> None:
    propose(run, trial)


def final_report(result: Metrics, cost: str) -> Metrics:
    """What a search is told of a finished run: its score and cost, or that it failed."""
    metrics = {k: v for k, v in result["metrics"].items() if isinstance(v, int | float)}
    report = {**metrics, "status": result["status"], "finished": True}
    if result["status"] in ("done", "stopped"):
        report |= {"score": metrics["score"], cost: metrics.get(cost, 0.0)}
    return report
