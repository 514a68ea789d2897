"""One optimiser step over a global batch: its inputs, its gradients, the learning rate, the update of the weights."""

import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.attention import SDPBackend, sdpa_kernel

from raydistill.config.run import Training
from raydistill.data.batching import Examples, epoch_batches, shard_batch, split_by_tokens
from raydistill.models import families
from raydistill.training.distillation import DistillationStep, MicroBatch
from raydistill.training.workers import Worker, all_reduce_gradients

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ParameterGroup = dict[str, Any]  # "params" and, where it differs from the optimiser's, "lr"

# Length in tokens up to which torch's math attention kernel trains faster in bf16 on a CPU than its flash kernel.
MATH_ATTENTION_MAX_TOKENS = 128
# Steps whose cached states the kernel reads ahead. The states of a batch of 64 rows of BART-large, with three layers of
# the decoder, are some 30 MB in int8, which a slow disk has to start early and a fast disk reads in one step's time.
READ_AHEAD_STEPS = 8
# Padded tokens of a micro-batch on a whole GPU, and on a CPU, where larger micro-batches are not faster.
DEFAULT_MICRO_TOKENS = 16_384


@dataclass(frozen=True)
class StepInputs:
    """The inputs of an optimiser step: each loss term's weight in the global batch, and the worker's micro-batches."""

    term_weights: dict[str, float]
    micro_batches: list[MicroBatch]


@dataclass(frozen=True)
class OptimizerStep:
    """Reads the inputs of optimiser steps and carries the steps out, for one worker.

    Attributes:
        distillation: Computes the loss of a micro-batch.
        settings: The run's training settings.
        optimizer: Updates the student's trainable parameters.
        worker: The worker that takes the steps.
    """

    distillation: DistillationStep
    settings: Training
    optimizer: torch.optim.Optimizer
    worker: Worker = field(default_factory=Worker)

    @classmethod
    def create(
        cls, distillation: DistillationStep, settings: Training, worker: Worker | None = None
    ) -> "OptimizerStep":
        """A step with a new optimiser of the kind that the settings name."""
        optimizer = make_optimizer(parameter_groups(distillation.student, settings), settings)
        return cls(distillation, settings, optimizer, worker or Worker())

    @cached_property
    def parameters(self) -> list[Parameter]:
        """The trainable parameters of the student."""
        return trainable_parameters(self.distillation.student)

    @cached_property
    def autocast(self) -> torch.dtype | None:
        """The dtype of autocast; None where the step computes in float32."""
        return autocast_dtype(self.settings, self.worker)

    def iter_inputs(self, first_step: int, total_steps: int) -> Iterator[StepInputs]:
        """The inputs of the steps `first_step` to `total_steps - 1`, read from memory and disk on demand.

        The kernel reads the cached states of the following `READ_AHEAD_STEPS` steps meanwhile.
        """
        upcoming: deque[list[int]] = deque()
        for batch in self._iter_batches(first_step, total_steps):
            for rows in self._own_parts(batch):
                self.distillation.read_ahead(rows)
            upcoming.append(batch)
            if len(upcoming) > READ_AHEAD_STEPS:
                yield self.read_inputs(upcoming.popleft())
        yield from map(self.read_inputs, upcoming)

    def _iter_batches(self, first_step: int, total_steps: int) -> Iterator[list[int]]:
        """The global batches of the steps `first_step` to `total_steps - 1`."""
        examples, settings = self.distillation.examples, self.settings
        lengths = effective_lengths(examples)
        steps_per_epoch = math.ceil(len(examples) / settings.batch_size)
        batches: list[list[int]] = []
        for step in range(first_step, total_steps):
            epoch, position = divmod(step, steps_per_epoch)
            if not batches or position == 0:
                batches = epoch_batches(lengths, settings.batch_size, settings.seed, epoch)
            yield batches[position]

    def _own_parts(self, batch: Sequence[int]) -> list[list[int]]:
        """The examples of a global batch that this worker reads, in `accumulation` parts."""
        return shard_batch(batch, self.worker.rank, self.worker.world_size, self.settings.accumulation)

    def read_inputs(self, batch: Sequence[int]) -> StepInputs:
        """The inputs of a step over a global batch of examples.

        The batch is split over the workers, then into `accumulation` parts, then into micro-batches by `micro_tokens`.
        """
        worker, examples = self.worker, self.distillation.examples
        max_tokens, source_weight = micro_batch_limits(self.settings, worker, self.distillation.encoder_shared)
        micro_batches = [
            self.distillation.read_batch(rows)
            for part in self._own_parts(batch)
            for rows in split_by_tokens(part, examples, max_tokens, source_weight)
        ]
        if worker.device_type == "cuda":
            micro_batches = [micro_batch.pin_memory() for micro_batch in micro_batches]
        return StepInputs(self.distillation.term_weights(batch), micro_batches)

    def run(self, inputs: StepInputs) -> dict[str, Tensor]:
        """Take one step: compute the gradients over all micro-batches and workers, and update the weights.

        Each loss term is scaled by its coefficient divided by its weight in the global batch, so that the gradients of
        micro-batches and workers add up to the gradient of the global batch.

        Returns:
            This worker's share of each term's mean over the global batch, and of their weighted sum "loss": scalars on
            the worker's device, so that the step does not wait for the device.
        """
        alphas = self.distillation.alphas()
        scales = {name: alphas[name] / weight for name, weight in inputs.term_weights.items()}
        self.optimizer.zero_grad(set_to_none=True)
        # All terms, since a worker without a row of a small batch computes none.
        sums = {name: torch.zeros((), device=self.worker.device) for name in inputs.term_weights}
        for micro_batch in inputs.micro_batches:
            with (
                torch.autocast(self.worker.device_type, dtype=self.autocast, enabled=self.autocast is not None),
                attention_kernel(_longest(micro_batch), self.worker.device_type, self.autocast),
            ):
                loss, term_sums = self.distillation.loss_terms(micro_batch.to(self.worker.device), scales)
            loss.backward()
            for name, value in term_sums.items():
                sums[name] += value
        if self.worker.world_size > 1:
            all_reduce_gradients(self.parameters)
        clip_and_step(self.optimizer, self.parameters, self.settings.gradient_clip)
        means = {name: value / inputs.term_weights[name] for name, value in sums.items()}
        return means | {"loss": torch.stack([alphas[name] * value for name, value in means.items()]).sum()}


def trainable_parameters(model: torch.nn.Module) -> list[Parameter]:
    """The parameters that are not frozen."""
    return [p for p in model.parameters() if p.requires_grad]


def parameter_groups(model: "PreTrainedModel", settings: Training) -> list[ParameterGroup]:
    """The trainable parameters for an optimiser; the encoder's have the rate `training.encoder_learning_rate`."""
    parameters = trainable_parameters(model)
    if settings.encoder_learning_rate is None:
        return [{"params": parameters}]
    encoder = {id(parameter) for parameter in families.encoder_parameters(model)}
    groups: list[ParameterGroup] = [
        {"params": [p for p in parameters if id(p) not in encoder]},
        {"params": [p for p in parameters if id(p) in encoder], "lr": settings.encoder_learning_rate},
    ]
    return [group for group in groups if group["params"]]


def effective_lengths(examples: Examples) -> list[int]:
    """The length by which examples are sorted: target tokens, plus a quarter of the source tokens.

    The time of a decoder step grows with the target tokens, and less with the source tokens that it attends to.
    """
    pairs = zip(examples.targets, examples.source_indices, strict=True)
    return [len(target) + len(examples.sources[row]) // 4 for target, row in pairs]


def micro_batch_limits(settings: Training, worker: Worker, encoder_shared: bool) -> tuple[int, float]:
    """The largest number of padded tokens of a micro-batch, and how much of a token each source token counts.

    `training.micro_tokens` decides where it is set; otherwise the device and its share. On a GPU, a source token counts
    a quarter where the encoder is shared: without gradients in the encoder, only its keys and values stay in memory.
    """
    if settings.micro_tokens:
        return settings.micro_tokens, 1.0
    if worker.device_type != "cuda":
        return DEFAULT_MICRO_TOKENS, 1.0
    return max(1, int(DEFAULT_MICRO_TOKENS * settings.gpus)), 0.25 if encoder_shared else 1.0


def _longest(micro_batch: MicroBatch) -> int:
    return max(micro_batch.labels.shape[1], micro_batch.source_mask.shape[1])


def attention_kernel(longest: int, device_type: str, autocast: torch.dtype | None) -> AbstractContextManager[None]:
    """A context in which attention uses the fastest kernel for training on up to `longest` source or target tokens.

    This is torch's own choice, except for sequences up to `MATH_ATTENTION_MAX_TOKENS` in bf16 on a CPU: there the
    backward pass of torch's flash kernel is not faster for short sequences than for long ones (256 heads of 15 tokens
    on one core: 13.2 ms, and 2.3 ms with the math kernel; docs/log.md).
    """
    if device_type == "cpu" and autocast is torch.bfloat16 and longest <= MATH_ATTENTION_MAX_TOKENS:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def clip_and_step(optimizer: torch.optim.Optimizer, parameters: list[Parameter], max_norm: float) -> None:
    """Clip the global norm of the gradients to `max_norm`, as `clip_grad_norm_` does, and take the optimiser's step.

    Fused AdamW divides the gradients by its `grad_scale` attribute, which exists for torch's GradScaler, while it reads
    them. This saves a pass over all gradients: 3 % of a step of BART-large's decoder in bf16 on two cores.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1)  # type: ignore[attr-defined]
    else:
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()


def seed_step(seed: int, rank: int, step: int) -> None:
    """Seed torch for a step, so that a resumed run draws the random numbers of dropout again."""
    torch.manual_seed(random.Random(f"{seed}:{rank}:{step}").getrandbits(63))


def make_optimizer(parameters: list[Parameter] | list[ParameterGroup], settings: Training) -> torch.optim.Optimizer:
    """Fused AdamW or Adafactor, selected by `training.optimizer`.

    Adafactor has the options of the paper's released recipe. torch's Adafactor always multiplies the step by the root
    mean square of the parameter (`scale_parameter`), which makes steps of typical weights about 100 times smaller.
    """
    if settings.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(
            parameters,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            scale_parameter=False,
            relative_step=False,
        )
    return torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        eps=settings.adam_eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def learning_rate_factor(step: int, settings: Training, total_steps: int) -> float:
    """The factor of the learning rate at a step: linear warm-up, then linear decay to zero or a constant.

    `transformers.get_scheduler` is not used: its first step has the factor 0, here it is 1 / warm-up steps.
    """
    warmup_steps = settings.get_warmup_steps(total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if settings.schedule == "constant":
        return 1.0
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))


def autocast_dtype(settings: Training, worker: Worker) -> torch.dtype | None:
    """The autocast dtype of a run; None for float32.

    In this order: `training.precision`, the worker's `compute_dtype`, bf16 where the device computes in bf16.
    """
    precision = worker.compute_dtype if settings.precision == "auto" else settings.precision
    if precision is not None:
        return torch.bfloat16 if precision == "bf16" else None
    if worker.device_type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None
