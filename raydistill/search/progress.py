"""Live progress of a search: one calm line per validation and per finished trial."""

import time
from pathlib import Path
from typing import Any

from ray.tune import Callback

from raydistill.cluster import sync
from raydistill.config.space import Search
from raydistill.core.console import progress
from raydistill.results.records import Trial, device_hours, read_trials


class Watch(Callback):
    """Tells of trials as they start, are validated, finish or die.

    `prepared_s`: the seconds that the command took before the search. Where the search stands is read from the sweep's
    folder, so that a search that was taken up again counts on.
    """

    def __init__(self, sweep: Path, search: Search, metric: str, prepared_s: float = 0.0) -> None:
        self.sweep, self.search, self.metric = sweep, search, metric
        self.begun, self.prepared_s = time.monotonic(), prepared_s
        self.before, self.hours_before = len(over_in(sweep)), device_hours(sweep)
        self.started: dict[str, float] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial starts, or starts again after its process died."""
        again = trial.trial_id in self.started
        self.started.setdefault(trial.trial_id, time.monotonic())
        progress(f"trial {trial.config['number']} {trial.config['key']} {'goes on' if again else 'starts'}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A validation, or the end."""
        name = f"trial {trial.config['number']} {trial.config['key']}"
        if "died" in result:
            progress(f"{name} died: {result['died']}")
        if not result.get("finished"):
            if "score" in result:
                progress(f"  {name}: step {result.get('step')}, {self.metric} {result['score']:.2f}")
            return
        sync.fetch(self.sweep / "trials" / trial.config["key"], names=sync.RECORDS)
        now = time.monotonic()
        took = now - self.started.get(trial.trial_id, now)
        outcome = f"{self.metric} {result['score']:.2f}" if "score" in result else "failed"
        outcome += ", stopped early" if result["status"] == "stopped" else ""
        progress(f"{name} is over after {took:.0f} s: {outcome}")
        progress(f"  {self.standing(now)}")

    def standing(self, now: float) -> str:
        """Where the search stands: trials over, device-hours with the teacher's passes, time left, best per shape."""
        over, hours = over_in(self.sweep), device_hours(self.sweep)
        best: dict[str, float] = {}
        for trial in over:
            score = trial.score(self.metric)
            if trial.scored and score is not None:
                best[trial.size] = max(score, best.get(trial.size, score))
        parts = [f"{len(over)} of {self.search.trials} trials over", f"{hours:.3f} device-hours"]
        minutes = self.minutes_left(now - self.begun, len(over), hours)
        parts += [f"about {minutes:.0f} min left"] if minutes is not None else []
        parts += [f"best so far: {', '.join(f'{size} {score:.2f}' for size, score in sorted(best.items()))}"]
        return "; ".join(parts if best else parts[:-1])

    def minutes_left(self, seconds: float, over: int, hours: float) -> float | None:
        """Until all trials are over or one of the search's limits is reached, at the pace of its first `seconds`."""
        done, left, took = over - self.before, self.search.trials - over, hours - self.hours_before
        if left <= 0 or done < 2:
            return None
        ends = [seconds / done * left]
        if self.search.max_hours is not None:
            ends.append(3600 * self.search.max_hours - self.prepared_s - seconds)
        if self.search.max_device_hours is not None and took > 0:
            ends.append(seconds / took * (self.search.max_device_hours - hours))
        return max(0.0, min(ends)) / 60

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial died more often than the space allows."""
        reason = ""
        if trial.error_file:
            with open(trial.error_file, encoding="utf-8") as file:
                reason = next((line for line in reversed(file.read().splitlines()) if line.strip()), "")
        progress(f"trial {trial.config['number']} {trial.config['key']} died: {reason}")


def over_in(sweep: Path) -> list[Trial]:
    """The trials of a sweep that have left their result."""
    return [trial for trial in read_trials(sweep) if trial.status != "running"]
