"""The trials of a sweep for a process that reads them again and again: each file is read once, and again if it changed.

A search asks for the other trials at every validation and at the end of every trial. With thousands of trials, only
the files that changed since the last question are read. A trial that has a result does not change any more; it is only
looked for in the list of folders. The files of other trials are recognised by their times and sizes.
"""

import os
from functools import cached_property, lru_cache
from pathlib import Path

from raydistill.config.shapes import Shape
from raydistill.results.records import SEED_RUNS, SEED_SEPARATOR, Trial, read_trial
from raydistill.results.sweep_record import read_sweep
from raydistill.training.records import HISTORY_FILE, RESULT_FILE, RUN_FILE, Validation

MAX_SWEEPS = 4  # sweeps of which a process remembers the trials
# The newest of the files of a trial that exists, its modification time in nanoseconds and its size.
Version = tuple[str, int, int]


class IndexedTrial:
    """A trial whose shape and validations are read when they are first needed."""

    def __init__(self, trial: Trial, version: Version, earlier: "IndexedTrial | None" = None) -> None:
        self.trial, self.version = trial, version
        if earlier is not None and "shape" in vars(earlier):  # the config of a run does not change
            self.shape = earlier.shape

    @cached_property
    def shape(self) -> Shape:
        """The shape that the run's config names."""
        return self.trial.requested_shape()

    @cached_property
    def history(self) -> list[Validation]:
        """The validations in order."""
        return self.trial.history()

    @property
    def device_hours(self) -> float:
        """As `Trial.device_hours`."""
        if self.trial.status != "running":
            return self.trial.device_hours
        return max((validation.device_hours for validation in self.history), default=0.0)


class TrialIndex:
    """The trials of a sweep by key, and their runs with other seeds; each question brings them up to date."""

    def __init__(self, sweep: Path) -> None:
        self.sweep = sweep
        self._runs: dict[str, dict[str, IndexedTrial]] = {}  # by folder of the sweep and name of the run's folder

    def read(self) -> dict[str, IndexedTrial]:
        """Every trial that was started, by key, as `read_trials` reads them, without their runs with other seeds.

        Raises:
            UserError: A record is damaged.
        """
        return self._read_runs("trials")

    def finished(self) -> list[Trial]:
        """The trials that have a result."""
        return [indexed.trial for indexed in self.read().values() if indexed.trial.status != "running"]

    def device_hours(self) -> float:
        """Device-hours of the sweep so far: trials, their runs with other seeds and the teacher's passes.

        Runs of any status count. As in `read_trials`, a run with another seed belongs to a trial that exists.
        """
        trials = self.read()
        hours = sum(run.device_hours for run in trials.values())
        for name, run in self._read_runs(SEED_RUNS).items():
            if name.rpartition(SEED_SEPARATOR)[0] in trials:
                hours += run.device_hours
        return hours + read_sweep(self.sweep).teacher.passes.total_hours

    def _read_runs(self, parent: str) -> dict[str, IndexedTrial]:
        """The runs in a folder of the sweep, by name."""
        known_runs = self._runs.get(parent, {})
        runs: dict[str, IndexedTrial] = {}
        for name in _list_names(self.sweep / parent):
            known = known_runs.get(name)
            if known is not None and known.version[0] == RESULT_FILE:
                runs[name] = known
                continue
            version = _version(f"{self.sweep}/{parent}/{name}")
            if known is not None and known.version == version:
                runs[name] = known
            elif version is not None and (trial := read_trial(self.sweep / parent / name)) is not None:
                runs[name] = IndexedTrial(trial, version, known)
        self._runs[parent] = runs
        return runs


@lru_cache(maxsize=MAX_SWEEPS)
def trial_index(sweep: Path) -> TrialIndex:
    """The index of a sweep in this process."""
    return TrialIndex(sweep)


def _list_names(folder: Path) -> list[str]:
    """The names in a folder, without hidden ones: each trial has a lock file next to its folder."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except FileNotFoundError:
        return []


def _version(folder: str) -> Version | None:
    """The version of a trial; None if the trial has no file yet."""
    for name in (RESULT_FILE, HISTORY_FILE, RUN_FILE):
        try:
            status = os.stat(f"{folder}/{name}")
        except (FileNotFoundError, NotADirectoryError):
            continue
        return name, status.st_mtime_ns, status.st_size
    return None
