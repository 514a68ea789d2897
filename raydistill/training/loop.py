"""The training loop of a run: optimiser steps, validations, early stopping and saved states."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raydistill.config.run import Training
from raydistill.models import families
from raydistill.training.optimizer_step import OptimizerStep, StepInputs, learning_rate_factor, seed_step
from raydistill.training.prefetch import Prefetcher, prefetch
from raydistill.training.records import PROGRESS_FILE, RunProgress, write_history
from raydistill.training.run_folder import delete_checkpoints
from raydistill.training.state import TrainingState, has_state, load_state, save_progress, save_state
from raydistill.training.workers import Worker, broadcast_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Called after every validation with its metrics and the run's folder; a text that it returns stops the run and is
# recorded as the reason.
ReportFn = Callable[[dict[str, Any], Path | None], str | None]
# Saves the student in a folder and returns its metrics, with "metric", "score" (higher is better) and "val_loss". The
# second argument is the engine of the run's earlier validations, None at the first one.
ValidateFn = Callable[[Path, str | None], dict[str, Any]]
# Metrics of steps that are reported under these names; all others are loss terms, reported as loss_NAME.
STEP_METRICS = ("loss", "step_ms", "data_wait")
PROGRESS_INTERVAL_S = 3.0  # between two records of the progress


class NonFiniteLoss(Exception):
    """The loss or a metric is NaN or infinite: the run has failed, after `seconds` of training."""

    def __init__(self, reason: str, seconds: float) -> None:
        super().__init__(reason)
        self.seconds = seconds


class Preempted(Exception):
    """The node is being preempted: the run's state is saved, and the run resumes on another node."""


@dataclass(frozen=True)
class StepCounts:
    """Numbers of optimiser steps: of an epoch, of the whole run, and from one validation to the next.

    `patience` is the number of validations without a better score after which the run ends. By default these are the
    validations of an epoch, which has at most one per step.
    """

    per_epoch: int
    total: int
    per_validation: int
    patience: int

    @classmethod
    def of(cls, settings: Training, num_examples: int) -> "StepCounts":
        """The step counts of a run over `num_examples` examples."""
        per_epoch = math.ceil(num_examples / settings.batch_size)
        # Rounded first: 1.1 epochs of 10 steps are 11.000000000000002 in floating point.
        total = max(1, math.ceil(round(settings.epochs * per_epoch, 6)))
        total = min(total, settings.max_steps or total)
        patience = settings.patience or min(settings.checks_per_epoch, per_epoch)
        return cls(per_epoch, total, max(1, round(per_epoch / settings.checks_per_epoch)), patience)


def fit(
    step: OptimizerStep, folder: Path, validate: ValidateFn, report: ReportFn, started_at: float | None = None
) -> TrainingState:
    """Train the student until its epochs are finished, its score stops rising or `report` stops the run.

    After each validation the checkpoint with the best score stays in `folder`/checkpoint-STEP, metrics.jsonl and the
    state are saved in `folder`, and `report` is called. A call on a folder with a saved state resumes from that state.

    Args:
        step: Takes the optimiser steps.
        folder: The run's folder.
        validate: Saves and scores the student.
        report: Receives the metrics of every validation and may stop the run.
        started_at: When the run began, in seconds of the monotonic clock; its time counts from there. Default: now.

    Returns:
        The state after the last step.

    Raises:
        NonFiniteLoss: The loss or a metric is not finite.
        Preempted: The node is being preempted; the state is saved.
    """
    return TrainingLoop(step, folder, validate, report, started_at).run()


class TrainingLoop:
    """The loop of `fit`, and what it keeps between steps."""

    def __init__(
        self, step: OptimizerStep, folder: Path, validate: ValidateFn, report: ReportFn, started_at: float | None
    ) -> None:
        self.step, self.folder, self.validate, self.report = step, folder, validate, report
        self.worker, self.settings = step.worker, step.settings
        self.student = step.distillation.student
        self.counts = StepCounts.of(self.settings, len(step.distillation.examples))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            step.optimizer, lambda n: learning_rate_factor(n, self.settings, self.counts.total)
        )
        self.state = (
            load_state(folder, self.student, step.optimizer, self.scheduler) if has_state(folder) else TrainingState()
        )
        # On the monotonic clock, earlier by the time of previous calls.
        self.started_at = (time.monotonic() if started_at is None else started_at) - self.state.seconds
        self.means = RunningMeans()
        self.resumed_step, self.loop_started_at, self.next_progress_at = self.state.step, time.monotonic(), 0.0

    def run(self) -> TrainingState:
        """Take the remaining steps, with a validation after every `counts.per_validation` of them."""
        state, total = self.state, self.counts.total
        self._write_progress()
        with prefetch(self.step.iter_inputs(state.step, total)) as inputs:
            while state.step < total and not state.ended_early:
                self._take_step(inputs)
                self._write_progress()
                if state.step % self.counts.per_validation == 0 or state.step == total:
                    self._validate()
                else:
                    self._stop_if_preempted()
        state.seconds = self._elapsed_seconds()
        return state

    def _take_step(self, inputs: Prefetcher[StepInputs]) -> None:
        started_at, waited = time.monotonic(), inputs.wait_seconds
        step_inputs = next(inputs)
        set_train_mode(self.student)
        seed_step(self.settings.seed, self.worker.rank, self.state.step)
        means = self.step.run(step_inputs)
        self.means.add(means, started_at, inputs.wait_seconds - waited)
        self.scheduler.step()
        self.state.step += 1

    def _write_progress(self) -> None:
        """Record the step for `raydistill status` and the progress bar, every `PROGRESS_INTERVAL_S` seconds."""
        now = time.monotonic()
        if not self.worker.is_main_process or now < self.next_progress_at:
            return
        self.next_progress_at = now + PROGRESS_INTERVAL_S
        RunProgress(
            step=self.state.step,
            total_steps=self.counts.total,
            resumed_step=self.resumed_step,
            seconds=now - self.loop_started_at,
            updated_at=time.time(),
        ).write(self.folder / PROGRESS_FILE)

    def _stop_if_preempted(self) -> None:
        if not self.worker.is_main_process or self.worker.is_draining is None or not self.worker.is_draining():
            return
        self.state.seconds = self._elapsed_seconds()
        save_state(self.folder, self.state, self.student, self.step.optimizer)
        raise Preempted(f"node is being preempted; the run is saved at step {self.state.step}")

    def _validate(self) -> None:
        """Score the student, keep the best checkpoint, save the state, report, and upload what was saved."""
        means = self.means.pop(self.worker)  # waits for the device, so that the clock is read after its work
        self.state.seconds = self._elapsed_seconds()
        self._check_finite("the loss", means["loss"])
        metrics = broadcast_metrics(self._measure(means) if self.worker.is_main_process else {}, self.worker)
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self._check_finite(name, value)
        self._update_best(metrics)
        self.state.history.append(metrics)
        if self.worker.is_main_process:
            self._save()
        self._report(metrics)
        self.worker.save_folder()

    def _measure(self, means: dict[str, float]) -> dict[str, Any]:
        """The metrics of a validation, as metrics.jsonl holds them."""
        state, started = self.state, time.monotonic()
        scores = self.validate(self.folder / f"checkpoint-{state.step}", state.engine)
        state.seconds = self._elapsed_seconds()  # includes this validation when the state is saved
        return {
            "step": state.step,
            "epoch": round(state.step / self.counts.per_epoch, 4),
            "total_steps": self.counts.total,
            "time_s": round(state.seconds, 3),
            "validation_s": round(time.monotonic() - started, 3),
            "device_hours": self.worker.device_hours(state.seconds, self.settings),
            "learning_rate": self.step.optimizer.param_groups[0]["lr"],
            **{name if name in STEP_METRICS else f"loss_{name}": value for name, value in means.items()},
            **scores,
        }

    def _update_best(self, metrics: dict[str, Any]) -> None:
        """Record a better validation; finish the run after `patience` validations without a better score.

        Of two equal scores the one with the lower loss is better, but does not prolong the run.
        """
        state, best = self.state, self.state.best
        rises = best is None or metrics["score"] > best["score"]
        if best is None or _rank(metrics) > _rank(best):
            state.best_step = state.step
        state.checks_since_best = 0 if rises else state.checks_since_best + 1
        if state.checks_since_best >= self.counts.patience:
            state.ended_early, state.reason = True, f"no better score in {state.checks_since_best} validations"

    def _save(self) -> None:
        write_history(self.folder, self.state.history)
        save_state(self.folder, self.state, self.student, self.step.optimizer)
        delete_checkpoints(self.folder, keep_step=self.state.best_step)

    def _report(self, metrics: dict[str, Any]) -> None:
        """Report a validation; a reason to stop is saved, so that a run killed while it is scored stays stopped."""
        state = self.state
        reason = broadcast_metrics({"stop": self.report(metrics, self.folder)}, self.worker)["stop"]
        if reason and not state.ended_early and state.step < self.counts.total:
            state.ended_early, state.stopped, state.reason = True, True, reason
            if self.worker.is_main_process:
                save_progress(self.folder, state)

    def _check_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            reason = f"{name} is {value} at step {self.state.step}; try a lower learning rate"
            raise NonFiniteLoss(reason, self.state.seconds)

    def _elapsed_seconds(self) -> float:
        return time.monotonic() - self.started_at


def _rank(metrics: dict[str, Any]) -> tuple[float, float]:
    """The order of validations: by score, then by loss."""
    return metrics["score"], -metrics["val_loss"]


class RunningMeans:
    """Means of the loss terms since the last validation, the time of a step and the time spent waiting for data."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.started_at = self.wait_seconds = 0.0

    def add(self, means: dict[str, Tensor], started_at: float, wait_seconds: float) -> None:
        """Count a step that began at `started_at` on the monotonic clock and waited `wait_seconds` for its inputs."""
        if not self.steps:
            self.started_at = started_at
        for name, value in means.items():  # sums stay on the device: a conversion would wait for the end of the step
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1
        self.wait_seconds += wait_seconds

    def pop(self, worker: Worker) -> dict[str, float]:
        """Means over the steps, summed over the workers' shares; the counts restart.

        `step_ms` is the mean time of a step in milliseconds, `data_wait` the share of the time for which this worker
        waited for its data. The clock is read after the values have arrived: only then are the steps of a GPU complete.
        """
        names = sorted(self.sums)
        values = torch.stack([self.sums[name] / self.steps for name in names])
        if worker.world_size > 1:
            torch.distributed.all_reduce(values)
        means = dict(zip(names, values.tolist(), strict=True))
        seconds = time.monotonic() - self.started_at
        timing = {"step_ms": 1000 * seconds / self.steps, "data_wait": self.wait_seconds / seconds}
        self.sums, self.steps, self.wait_seconds = {}, 0, 0.0
        return means | timing


def set_train_mode(student: "PreTrainedModel") -> None:
    """Set the student to train mode, but a frozen encoder to eval mode: dropout acts only on trained parts."""
    student.train()
    if not any(p.requires_grad for p in families.encoder_parameters(student)):
        student.get_encoder().eval()
