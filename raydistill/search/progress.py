"""Live progress of a search: one calm line per validation and per finished trial."""

import time
from pathlib import Path
from typing import Any

from ray.tune import Callback

from raydistill.cluster import sync
from raydistill.config.space import Search
from raydistill.core.console import print_progress
from raydistill.results.records import Trial, device_hours, read_trials


class ProgressCallback(Callback):
    """Tells of trials as they start, are validated, finish or die.

    `prepared_s`: the seconds that the command took before the search. Where the search stands is read from the sweep's
    folder, so that a search that was taken up again counts on.
    """

    def __init__(self, sweep: Path, search: Search, metric: str, setup_s: float = 0.0) -> None:
        self.sweep, self.search, self.metric = sweep, search, metric
        self.begun, self.setup_s = time.monotonic(), setup_s
        self.num_finished_before, self.device_hours_before = len(finished_trials(sweep)), device_hours(sweep)
        self.started: dict[str, float] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial starts, or starts again after its process died."""
        again = trial.trial_id in self.started
        self.started.setdefault(trial.trial_id, time.monotonic())
        print_progress(f"trial {trial.config['number']} {trial.config['key']} {'goes on' if again else 'starts'}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A validation, or the end."""
        name = f"trial {trial.config['number']} {trial.config['key']}"
        if "died" in result:
            print_progress(f"{name} died: {result['died']}")
        if not result.get("finished"):
            if "score" in result:
                print_progress(f"  {name}: step {result.get('step')}, {self.metric} {result['score']:.2f}")
            return
        sync.pull(self.sweep / "trials" / trial.config["key"], patterns=sync.RECORD_PATTERNS)
        now = time.monotonic()
        took = now - self.started.get(trial.trial_id, now)
        outcome = f"{self.metric} {result['score']:.2f}" if "score" in result else "failed"
        outcome += ", stopped early" if result["status"] == "stopped" else ""
        print_progress(f"{name} is over after {took:.0f} s: {outcome}")
        print_progress(f"  {self.status_line(now)}")

    def status_line(self, now: float) -> str:
        """Where the search stands: trials over, device-hours with the teacher's passes, time left, best per shape."""
        over, hours = finished_trials(self.sweep), device_hours(self.sweep)
        best: dict[str, float] = {}
        for trial in over:
            score = trial.score(self.metric)
            if trial.scored and score is not None:
                best[trial.size] = max(score, best.get(trial.size, score))
        parts = [f"{len(over)} of {self.search.trials} trials over", f"{hours:.3f} device-hours"]
        minutes = self.estimate_minutes_left(now - self.begun, len(over), hours)
        parts += [f"about {minutes:.0f} min left"] if minutes is not None else []
        parts += [f"best so far: {', '.join(f'{size} {score:.2f}' for size, score in sorted(best.items()))}"]
        return "; ".join(parts if best else parts[:-1])

    def estimate_minutes_left(self, elapsed_s: float, num_finished: int, hours: float) -> float | None:
        """Until all trials are over or one of the search's limits is reached, at the pace of its first `elapsed_s`."""
        done, left, took = (
            num_finished - self.num_finished_before,
            self.search.trials - num_finished,
            hours - self.device_hours_before,
        )
        if left <= 0 or done < 2:
            return None
        ends = [elapsed_s / done * left]
        if self.search.max_hours is not None:
            ends.append(3600 * self.search.max_hours - self.setup_s - elapsed_s)
        if self.search.max_device_hours is not None and took > 0:
            ends.append(elapsed_s / took * (self.search.max_device_hours - hours))
        return max(0.0, min(ends)) / 60

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial died more often than the space allows."""
        reason = ""
        if trial.error_file:
            with open(trial.error_file, encoding="utf-8") as file:
                reason = next((line for line in reversed(file.read().splitlines()) if line.strip()), "")
        print_progress(f"trial {trial.config['number']} {trial.config['key']} died: {reason}")


def finished_trials(sweep: Path) -> list[Trial]:
    """The trials of a sweep that have left their result."""
    return [trial for trial in read_trials(sweep) if trial.status != "running"]
