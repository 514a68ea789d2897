"""The training loop: steps, validations and early stop."""

import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.attention import SDPBackend, sdpa_kernel

from raydistill.config.run import Training
from raydistill.core.files import write_atomic
from raydistill.data.batching import epoch_batches, shard_batch, split_by_tokens
from raydistill.models import families
from raydistill.training.distillation import DistillationStep, MicroBatch
from raydistill.training.prefetch import prefetch
from raydistill.training.state import TrainingState, has_state, load_state, save_state, write_state_file
from raydistill.training.workers import Worker, all_reduce_gradients, broadcast_metrics

# Tokens up to which torch's plain attention trains faster in bf16 on a CPU than its flash kernel.
MATH_ATTENTION_MAX_TOKENS = 128
# Told of every validation; a text that it returns is the reason why the run should stop here.
ReportFn = Callable[[dict[str, Any], Path | None], str | None]
ValidateFn = Callable[[Path], dict[str, float]]


class NonFiniteLoss(Exception):
    """The loss is no number any more, after `seconds` of training: the run failed, and its search should learn so."""

    def __init__(self, reason: str, seconds: float) -> None:
        super().__init__(reason)
        self.seconds = seconds


class Preempted(Exception):
    """The machine is about to go: the run's state was saved just now, and it is to be taken up elsewhere."""


def fit(
    distillation: DistillationStep,
    settings: Training,
    validate: ValidateFn,
    folder: Path,
    report: ReportFn,
    worker: Worker | None = None,
    started_at: float | None = None,
) -> TrainingState:
    """Train the student until its epochs are over or its score has stopped rising; the best is in `folder`/best.

    `validate(checkpoint folder)` returns metrics with `score` (higher is better). After each validation metrics.jsonl
    and the state are saved in `folder` and `report(metrics, folder)` is called, whose answer may stop the run. Called
    again on the same folder it goes on from there. Raises `NonFiniteLoss` when the loss or a metric is not finite, and
    `Preempted` when the machine is about to go.

    `started_at`: when the run began, on the monotonic clock; its seconds count from there (default: from this call).
    """
    worker = worker or Worker()
    lengths = _effective_lengths(distillation)
    per_epoch = math.ceil(len(lengths) / settings.batch_size)
    total = max(1, math.ceil(round(settings.epochs * per_epoch, 6)))
    total = min(total, settings.max_steps or total)
    check_every = max(1, round(per_epoch / settings.checks_per_epoch))
    parameters = [p for p in distillation.student.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, settings, total))
    state = load_state(folder, distillation, optimizer, schedule) if has_state(folder) else TrainingState()
    autocast = autocast_dtype(settings, worker)
    started = (time.monotonic() if started_at is None else started_at) - state.seconds
    losses = _RunningMeans()
    check = _ValidationStep(distillation, settings, validate, folder, report, worker, per_epoch, total, started)
    with prefetch(iter_step_inputs(distillation, settings, worker, lengths, state.step, total)) as feed:
        while state.step < total and not state.finished:
            step_begun, waited = time.monotonic(), feed.wait_seconds
            now = next(feed)
            _set_train_mode(distillation)
            seed_step(settings.seed, worker.rank, state.step)
            means = train_step(distillation, now, settings, worker, autocast, parameters, optimizer)
            losses.add(means, step_begun, feed.wait_seconds - waited)
            schedule.step()
            state.step += 1
            if state.step % check_every == 0 or state.step == total:
                since = losses.pop(worker)  # waits for the device, so that the clock is read after its work
                check.run(state, since, optimizer)
            elif worker.is_main_process and worker.is_draining is not None and worker.is_draining():
                state.seconds = time.monotonic() - started
                save_state(folder, state, distillation, optimizer)
                raise Preempted(f"the machine is about to go; the run is saved at step {state.step}")
    state.seconds = time.monotonic() - started
    return state


@dataclass(frozen=True)
class StepInputs:
    """What one optimiser step is made from: the global batch's weights by term, and this worker's micro-batches."""

    term_weights: dict[str, float]
    micro_batches: list[MicroBatch]


def iter_step_inputs(
    distillation: DistillationStep,
    settings: Training,
    worker: Worker,
    lengths: list[int],
    first_step: int,
    total_steps: int,
) -> Iterator[StepInputs]:
    """The steps `first_step` to `total_steps` (not included) in order, read from memory and disk as they are asked
    for."""
    per_epoch = math.ceil(len(lengths) / settings.batch_size)
    batches: list[list[int]] = []
    for number in range(first_step, total_steps):
        epoch, position = divmod(number, per_epoch)
        if not batches or position == 0:
            batches = epoch_batches(lengths, settings.batch_size, settings.seed, epoch)
        yield read_step_inputs(distillation, batches[position], settings, worker)


def read_step_inputs(
    distillation: DistillationStep, batch: list[int], settings: Training, worker: Worker
) -> StepInputs:
    """One global batch as a step: split by workers, then by `accumulation`, then by `micro_tokens`."""
    mine = shard_batch(batch, worker.rank, worker.world_size, settings.accumulation)
    most, per_source = micro_batch_limits(distillation, settings, worker)
    micros = [m for part in mine for m in split_by_tokens(part, distillation.examples, most, per_source)]
    read = [distillation.read_batch(micro) for micro in micros]
    if worker.device.startswith("cuda"):
        read = [micro.pin_memory() for micro in read]
    return StepInputs(distillation.term_weights(batch), read)


def micro_batch_limits(distillation: DistillationStep, settings: Training, worker: Worker) -> tuple[int, float]:
    """Tokens of a micro-batch, and what of one a source token counts: as `micro_tokens` says, else by the device.

    From a source of which nothing is learned only keys and values stay for the gradient: on a GPU it counts a quarter.
    On a CPU a larger micro-batch would bring nothing.
    """
    if settings.micro_tokens:
        return settings.micro_tokens, 1.0
    if not worker.device.startswith("cuda"):
        return 16_384, 1.0
    return max(1, int(16_384 * settings.gpus)), 0.25 if distillation.encoder_shared else 1.0


def train_step(
    distillation: DistillationStep,
    inputs: StepInputs,
    settings: Training,
    worker: Worker,
    autocast: torch.dtype | None,
    parameters: list[Parameter],
    optimizer: torch.optim.Optimizer,
) -> dict[str, Tensor]:
    """One optimiser step on a global batch; returns this worker's share of each loss term's mean, on its device.

    Each term is scaled by its coefficient over the weight of the whole global batch, so that gradients add up exactly
    over micro-batches and workers.
    """
    alphas = distillation.alphas()
    scales = {name: alphas[name] / weight for name, weight in inputs.term_weights.items()}
    optimizer.zero_grad(set_to_none=True)
    # A worker without a row of a small batch has no loss, but all the names.
    sums = {name: torch.zeros((), device=worker.device) for name in inputs.term_weights}
    here = torch.device(worker.device).type
    for micro in inputs.micro_batches:
        with (
            torch.autocast(here, dtype=autocast, enabled=autocast is not None),
            attention_kernel(micro, here, autocast),
        ):
            loss, found = distillation.loss_terms(micro.to(worker.device), scales)
        loss.backward()
        for name, value in found.items():
            sums[name] += value
    if worker.world_size > 1:
        all_reduce_gradients(parameters)
    clip_and_step(optimizer, parameters, settings.gradient_clip)
    means = {name: value / inputs.term_weights[name] for name, value in sums.items()}
    return means | {"loss": torch.stack([alphas[name] * value for name, value in means.items()]).sum()}


def attention_kernel(batch: MicroBatch, device: str, autocast: torch.dtype | None) -> AbstractContextManager[None]:
    """Which of torch's attention kernels a micro-batch is trained with: its own choice, but for short bf16 on a CPU.

    There the gradient of torch's flash kernel takes as long for a sentence as for a page: 13.2 ms against 2.3 for 256
    heads of 15 tokens on one core (docs/log.md). Up to 128 tokens the plain kernel is the faster one.
    """
    short = max(batch.labels.shape[1], batch.source_mask.shape[1]) <= MATH_ATTENTION_MAX_TOKENS
    if device == "cpu" and autocast is torch.bfloat16 and short:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def clip_and_step(optimizer: torch.optim.Optimizer, parameters: list[Parameter], max_norm: float) -> None:
    """Clip the gradients' common norm to `max_norm`, as `clip_grad_norm_` does, and take the optimiser's step.

    Fused AdamW divides gradients by its `grad_scale` while it reads them (which is there for torch's GradScaler). That
    saves a pass over all gradients: 3 % of a step of BART-large's decoder in bf16 on two cores.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1)  # type: ignore[attr-defined]
    else:
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()


def seed_step(seed: int, rank: int, step: int) -> None:
    """Dropout's random numbers are decided by the step alone, so a run that is taken up again draws the same."""
    torch.manual_seed(random.Random(f"{seed}:{rank}:{step}").getrandbits(63))


def make_optimizer(parameters: list[Parameter], settings: Training) -> torch.optim.Optimizer:
    """AdamW (fused) or Adafactor, as the paper's recipes ask."""
    if settings.optimizer == "adafactor":
        return torch.optim.Adafactor(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        eps=settings.adam_eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def learning_rate_factor(step: int, settings: Training, total_steps: int) -> float:
    """Linear warm-up, then linear decay to zero at `total_steps` steps, or constant."""
    warmup = settings.get_warmup_steps(total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "constant":
        return 1.0
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup))


def autocast_dtype(settings: Training, worker: Worker) -> torch.dtype | None:
    """The autocast dtype: as the setting says, else as it was decided, else bf16 where this hardware computes in it."""
    asked = worker.compute_dtype if settings.precision == "auto" else settings.precision
    if asked is not None:
        return torch.bfloat16 if asked == "bf16" else None
    if worker.device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None


@dataclass(frozen=True)
class _ValidationStep:
    """What happens between steps: validate, keep the best, decide whether to stop, save the state, report."""

    distillation: DistillationStep
    settings: Training
    validate: ValidateFn
    folder: Path
    report: ReportFn
    worker: Worker
    steps_per_epoch: int
    total_steps: int
    started_at: float  # on the monotonic clock, less what earlier calls took

    def run(self, state: TrainingState, means: dict[str, float], optimizer: torch.optim.Optimizer) -> None:
        """One check, after `state.step` steps whose loss terms and times have these means."""
        state.seconds = time.monotonic() - self.started_at
        if not math.isfinite(means["loss"]):
            raise self._non_finite_loss("the loss", means["loss"], state)
        metrics = broadcast_metrics(
            self._measure(state, means, optimizer) if self.worker.is_main_process else {}, self.worker
        )
        if wrong := [name for name, value in metrics.items() if not math.isfinite(value)]:
            raise self._non_finite_loss(wrong[0], metrics[wrong[0]], state)
        self._update_best(metrics["score"], state)
        state.history.append(metrics)
        if self.worker.is_main_process:
            self._save(state, optimizer)
        self._report_and_check_stop(metrics, state)

    def _measure(
        self, state: TrainingState, means: dict[str, float], optimizer: torch.optim.Optimizer
    ) -> dict[str, Any]:
        started = time.monotonic()
        found = self.validate(self.folder / f"checkpoint-{state.step}")
        state.seconds = time.monotonic() - self.started_at  # with this validation, before the state is saved
        return {
            "step": state.step,
            "epoch": round(state.step / self.steps_per_epoch, 4),
            "progress": round(state.step / self.total_steps, 4),
            "time_s": round(state.seconds, 3),
            "validation_s": round(time.monotonic() - started, 3),
            "gpu_hours": state.seconds * self.worker.num_devices(self.settings) / 3600,
            "learning_rate": optimizer.param_groups[0]["lr"],
            **{k if k in ("loss", "step_ms", "data_wait") else f"loss_{k}": v for k, v in means.items()},
            **found,
        }

    def _update_best(self, score: float, state: TrainingState) -> None:
        """Keep the best step; finished after as many checks without a better score as the settings allow."""
        if state.best_score is None or score > state.best_score:
            state.best_score, state.best_step, state.checks_since_best = score, state.step, 0
        else:
            state.checks_since_best += 1
        if state.checks_since_best >= (self.settings.patience or self.settings.checks_per_epoch):
            state.finished, state.reason = True, f"no better score in {state.checks_since_best} validations"

    def _save(self, state: TrainingState, optimizer: torch.optim.Optimizer) -> None:
        lines = [json.dumps(line) + "\n" for line in state.history]
        write_atomic(self.folder / "metrics.jsonl", "".join(lines).encode())
        save_state(self.folder, state, self.distillation, optimizer)
        for stale in {*self.folder.glob("checkpoint-*"), *self.folder.glob(".checkpoint-*")}:
            if stale.name != f"checkpoint-{state.best_step}":
                shutil.rmtree(stale, ignore_errors=True)

    def _report_and_check_stop(self, metrics: dict[str, Any], state: TrainingState) -> None:
        """Report, and stop if told to; the answer is kept: a run that dies while it is scored is not told again."""
        told = broadcast_metrics({"stop": self.report(metrics, self.folder)}, self.worker)["stop"]
        if told and not state.finished and state.step < self.total_steps:
            state.finished, state.stopped, state.reason = True, True, told
            if self.worker.is_main_process:
                write_state_file(self.folder, state)

    def _non_finite_loss(self, name: str, value: float, state: TrainingState) -> NonFiniteLoss:
        return NonFiniteLoss(f"{name} is {value} at step {state.step}; try a lower learning rate", state.seconds)


class _RunningMeans:
    """Means of the loss terms since the last validation, and where the time of the steps went."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.started_at = self.wait_seconds = 0.0

    def add(self, means: dict[str, Tensor], started_at: float, wait_seconds: float) -> None:
        """Count a step that began at `started_at` on the monotonic clock."""
        if not self.steps:
            self.started_at = started_at
        for name, value in means.items():  # left on the device: a number of it would make the step wait for its end
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1
        self.wait_seconds += wait_seconds

    def pop(self, worker: Worker) -> dict[str, float]:
        """Means over the steps, summed over the workers (each holds its share); starts anew.

        `step_ms` is a step's mean time, and `data_wait` the share of it for which this worker waited for its data. A
        GPU's steps are over only once their numbers are here, so the clock is read after that.
        """
        names = sorted(self.sums)
        values = torch.stack([self.sums[n] / self.steps for n in names])
        if worker.world_size > 1:
            torch.distributed.all_reduce(values)
        means = dict(zip(names, values.tolist(), strict=True))
        seconds = time.monotonic() - self.started_at
        time_of = {"step_ms": 1000 * seconds / self.steps, "data_wait": self.wait_seconds / seconds}
        self.sums, self.steps, self.wait_seconds = {}, 0, 0.0
        return means | time_of


def _set_train_mode(distillation: DistillationStep) -> None:
    """Dropout in what is trained only: a frozen encoder has none."""
    student = distillation.student.train()
    if not any(p.requires_grad for p in families.encoder_parameters(student)):
        student.get_encoder().eval()


def _effective_lengths(distillation: DistillationStep) -> list[int]:
    """What to sort examples by: the decoder pays for target tokens first, then for attending to source tokens."""
    examples = distillation.examples
    pairs = zip(examples.targets, examples.source_indices, strict=True)
    return [len(target) + len(examples.sources[row]) // 4 for target, row in pairs]
