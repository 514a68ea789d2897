"""Progress of a search on stderr: a line for each validation and for each finished trial."""

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray.tune import Callback

from raydistill.cluster import snapshots
from raydistill.config.space import Search
from raydistill.core.console import print_progress
from raydistill.core.errors import TransientError
from raydistill.results.records import count_finished_trials, scoring_engines
from raydistill.results.trial_index import trial_index


class ProgressCallback(Callback):
    """Prints a line when a trial starts, is validated, finishes or fails.

    The progress of the search is read from the sweep's folder, so that a resumed search counts earlier trials too.

    Args:
        sweep: The sweep's folder.
        search: Number of trials and limits of the search.
        metric: The main metric.
        setup_s: Seconds that the command took before the search.
        start_time: When the search started, by the monotonic clock; by default, now.
    """

    def __init__(
        self, sweep: Path, search: Search, metric: str, setup_s: float = 0.0, start_time: float | None = None
    ) -> None:
        self.sweep, self.search, self.metric, self.setup_s = sweep, search, metric, setup_s
        self.start_time = time.monotonic() if start_time is None else start_time
        self.num_finished_before = count_finished_trials(sweep)
        self.device_hours_before = trial_index(sweep).device_hours()
        self.trial_start_times: dict[str, float] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called when a trial starts, and when Tune restarts the trial after its process was lost."""
        restarted = trial.trial_id in self.trial_start_times
        self.trial_start_times.setdefault(trial.trial_id, time.monotonic())
        print_progress(f"{_name(trial)} {'resumes' if restarted else 'starts'}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Called at every validation, and at the end of a trial."""
        if "error_message" in result:
            print_progress(f"{_name(trial)} failed: {result['error_message']}")
        if not result.get("finished"):
            if "score" in result:
                print_progress(f"  {_name(trial)}: step {result.get('step')}, {self.metric} {result['score']:.2f}")
            return
        with suppress(TransientError):  # the storage is unavailable: the line counts the trials that are known here
            snapshots.pull_records(self.sweep / "trials" / trial.config["key"])
        now = time.monotonic()
        seconds = now - self.trial_start_times.get(trial.trial_id, now)
        verdict = f"{self.metric} {result['score']:.2f}" if "score" in result else "failed"
        verdict += ", stopped early" if result["status"] == "stopped" else ""
        print_progress(f"{_name(trial)} finished after {seconds:.0f} s: {verdict}")
        print_progress(f"  {self.status_line(now)}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called when a trial failed more often than `search.retries` allows."""
        reason = ""
        if trial.error_file:
            with open(trial.error_file, encoding="utf-8") as file:
                reason = next((line for line in reversed(file.read().splitlines()) if line.strip()), "")
        print_progress(f"{_name(trial)} failed: {reason}")

    def status_line(self, now: float) -> str:
        """Finished trials, device-hours with the teacher's passes, time left and best score per size, in one line."""
        index = trial_index(self.sweep)
        finished, hours = index.finished(), index.device_hours()
        best: dict[str, float] = {}
        for trial in finished:
            score = trial.score(self.metric)
            if trial.scored and score is not None:
                best[trial.size] = max(score, best.get(trial.size, score))
        parts = [f"{len(finished)} of {self.search.trials} trials finished", f"{hours:.3f} device-hours"]
        minutes = self.estimate_minutes_left(now - self.start_time, len(finished), hours)
        if minutes is not None:
            parts.append(f"about {minutes:.0f} min left" if minutes >= 0.5 else "less than 1 min left")
        if best:
            parts.append(f"best so far: {', '.join(f'{size} {score:.2f}' for size, score in sorted(best.items()))}")
        if len(engines := scoring_engines(finished)) > 1:
            parts.append(f"scored by different engines: {', '.join(engines)}")
        return "; ".join(parts)

    def estimate_minutes_left(self, elapsed_s: float, num_finished: int, hours: float) -> float | None:
        """Minutes until all trials are finished or a limit of the search is reached; None for lack of data.

        Args:
            elapsed_s: Seconds since the search started.
            num_finished: Finished trials of this command and of earlier commands.
            hours: Device-hours of this command and of earlier commands.
        """
        new, remaining = num_finished - self.num_finished_before, self.search.trials - num_finished
        new_hours = hours - self.device_hours_before
        if remaining <= 0 or new < 2:
            return None
        seconds_left = [elapsed_s / new * remaining]
        if self.search.max_hours is not None:
            seconds_left.append(3600 * self.search.max_hours - self.setup_s - elapsed_s)
        if self.search.max_device_hours is not None and new_hours > 0:
            seconds_left.append(elapsed_s / new_hours * (self.search.max_device_hours - hours))
        return max(0.0, min(seconds_left)) / 60


def _name(trial: Any) -> str:
    return f"trial {trial.config['number']} {trial.config['key']}"
