"""Live progress of a search: one calm line per validation and per finished trial."""

import time
from typing import Any

from ray.tune import Callback

from raydistill.config.console import progress


class Watch(Callback):
    """Tells of trials as they start, are validated, finish or die."""

    def __init__(self, trials: int, metric: str, over: int = 0) -> None:
        self.trials, self.metric, self.over = trials, metric, over
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
        if not result.get("finished"):
            if "score" in result:
                progress(f"  {name}: step {result.get('step')}, {self.metric} {result['score']:.2f}")
            return
        self.over += 1
        took = time.monotonic() - self.started.get(trial.trial_id, time.monotonic())
        outcome = f"{self.metric} {result['score']:.2f}" if "score" in result else "failed"
        outcome += ", stopped early" if result["status"] == "stopped" else ""
        progress(f"{name} is over after {took:.0f} s: {outcome} ({self.over} over, {self.trials} in all)")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial died more often than the space allows."""
        reason = ""
        if trial.error_file:
            with open(trial.error_file, encoding="utf-8") as file:
                reason = next((line for line in reversed(file.read().splitlines()) if line.strip()), "")
        progress(f"trial {trial.config['number']} {trial.config['key']} died: {reason}")
