"""Live progress of a search: one calm line per validation and per finished trial."""

import time
from typing import Any

from ray.tune import Callback

from raydistill.config.console import progress


class Watch(Callback):
    """Tells of trials as they start, are validated, finish or die."""

    def __init__(self, trials: int, metric: str, over: int = 0) -> None:
        self.trials, self.metric, self.over = trials, metric, over
        self.before, self.begun = over, time.monotonic()
        self.started: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.hours = 0.0

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
        if not result.get("finished"):
            if "score" in result:
                progress(f"  {name}: step {result.get('step')}, {self.metric} {result['score']:.2f}")
            return
        self.over += 1
        now = time.monotonic()
        took = now - self.started.get(trial.trial_id, now)
        outcome = f"{self.metric} {result['score']:.2f}" if "score" in result else "failed"
        outcome += ", stopped early" if result["status"] == "stopped" else ""
        progress(f"{name} is over after {took:.0f} s: {outcome}")
        self.hours += float(result.get("gpu_hours", 0.0))
        if "score" in result:
            size = trial.config["size"]
            self.best[size] = max(result["score"], self.best.get(size, result["score"]))
        progress(f"  {self.standing(now)}")

    def standing(self, now: float) -> str:
        """Where the search stands: trials over, device-hours of this run of the command, time left, best per shape."""
        done, left = self.over - self.before, max(0, self.trials - self.over)
        minutes = (now - self.begun) / max(1, done) * left / 60
        parts = [f"{self.over} of {self.trials} trials over", f"{self.hours:.3f} device-hours"]
        parts += [f"about {minutes:.0f} min left"] if left and done > 1 else []
        parts += [f"best so far: {', '.join(f'{size} {score:.2f}' for size, score in sorted(self.best.items()))}"]
        return "; ".join(parts if self.best else parts[:-1])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial died more often than the space allows."""
        reason = ""
        if trial.error_file:
            with open(trial.error_file, encoding="utf-8") as file:
                reason = next((line for line in reversed(file.read().splitlines()) if line.strip()), "")
        progress(f"trial {trial.config['number']} {trial.config['key']} died: {reason}")
