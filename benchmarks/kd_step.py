"""Time and memory of a training step: KD with a live teacher, with a shared encoder, from the cache; SFT of two kinds.

The student is 12-3 of BART-large (or 16-4 of Pegasus-large) with random weights; sources have 400 tokens and targets
25. Every side includes its data loader, its reading from disk and its optimiser. On a CPU every side has its own
process. Requires torch, transformers and, for the Trainer, accelerate; neither Ray nor MLflow.

naive     KD that runs teacher and student in full
shared    KD that runs the encoder once for teacher and student
ours      KD of this package, from the teacher cache, which is in memory after the first steps
ours@R    the same with reads of at most R GB/s, as from a disk whose cache is cold; as in the product, the reads of the
          following steps are requested ahead
ours-xN   N processes that take the steps of `ours` at the same time (--together N), as N runs on one GPU
trainer   SFT with Hugging Face's Seq2SeqTrainer
ours-sft  SFT of this package, with encoder states from the cache

All baselines, the Trainer too, have the attention kernels, the fused optimiser and the clipping of this package. In
bf16, the teacher and all frozen weights of the student are stored in bf16, so that no step converts them, and on a GPU
the LM heads are padded like ours. No side computes states that it does not read.

    python -m benchmarks.kd_step                       # two threads, batch 4: about 12 minutes
    python -m benchmarks.kd_step --device cuda --batch 64 --family pegasus --read-gbps 0.5 1 3
    python -m benchmarks.kd_step --device cuda --batch 64 --layers 6 --width 256 --sides ours --together 2
"""

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, BartConfig, PegasusConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.cold_cache import SimulatedDisk, ThrottledArray
from benchmarks.common import BenchmarkResult, describe_machine, device_suffix
from raydistill.config.run import Loss, Student, Training
from raydistill.core.machine import malloc_trim
from raydistill.data.batching import Examples
from raydistill.models import families
from raydistill.models.freezing import FrozenParts, freeze
from raydistill.models.shrinking import plan_layers, shrink
from raydistill.teacher_cache.builder import build_cache
from raydistill.teacher_cache.layout import CacheDtypes, CacheLayout
from raydistill.teacher_cache.reader import RaggedArray, open_decoder_states, open_encoder_states
from raydistill.teacher_cache.storage_dtypes import vector_bytes
from raydistill.teacher_cache.store import ComputeDtype
from raydistill.training.distillation import DistillationStep
from raydistill.training.optimizer_step import OptimizerStep, attention_kernel, clip_and_step
from raydistill.training.prefetch import prefetch
from raydistill.training.teacher_states import GPU_ROW_MULTIPLE, frozen_lm_head_weight
from raydistill.training.workers import Worker

LOSS = Loss(alpha_data=1.0, alpha_logits=0.8, alpha_hidden=3.0, temperature=2.0)
SIDES = ("naive", "shared", "ours", "trainer", "ours-sft")
# Steps per measurement. A GPU works asynchronously, and this script reads no step's loss.
STEPS_PER_MEASUREMENT = {"cpu": 1, "cuda": 5}
WARMUP_MEASUREMENTS = 2
LEARNING_RATE = 3e-4
MAX_GRADIENT_NORM = 1.0
HEAD_WIDTH = 64
RATIOS = [
    ("KD: naive / ours", "naive", "ours", "seconds"),
    ("KD: shared encoder / ours", "shared", "ours", "seconds"),
    ("SFT: Seq2SeqTrainer / ours", "trainer", "ours-sft", "seconds"),
    ("KD, peak memory: ours / naive", "ours", "naive", "peak_mb"),
]
READ_RATES = (0.5, 1.0, 3.0)  # GB/s: a network disk, a SATA disk at its best, an NVMe disk
FORWARDED_OPTIONS = (
    *("device", "threads", "batch", "source", "target", "family", "layers", "width", "size", "steps", "profile"),
    *("cache_precision", "row_multiple"),
)
START_TIMEOUT_S = 120.0  # until all processes of `ours-xN` are ready


@dataclass
class Models:
    """A teacher with random weights, its student with frozen encoder and embeddings, and the copied layers."""

    teacher: PreTrainedModel
    student: PreTrainedModel
    layout: Any

    @property
    def cached_layers(self) -> list[int]:
        """The teacher's decoder layers that the KD loss reads: the supervised ones and the last one."""
        last = families.num_layers(self.teacher.config)[1] - 1
        return sorted({*self.layout.supervised_decoder, last})


def bart_config(layers: int, width: int) -> BartConfig:
    """A BART without dropout; 12 layers and width 1024 are BART-large."""
    heads, ffn = width // HEAD_WIDTH, 4 * width
    return BartConfig(
        dropout=0.0,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=ffn,
        decoder_ffn_dim=ffn,
    )


def make_models(options: argparse.Namespace) -> Models:
    """Create teacher and student without dropout."""
    config = (
        bart_config(options.layers, options.width)
        if options.family == "bart"
        else PegasusConfig(vocab_size=96103, encoder_layers=16, decoder_layers=16, dropout=0.0)
    )
    torch.manual_seed(0)
    with torch.device(options.device):  # random weights of this size take a CPU many seconds
        teacher = AutoModelForSeq2SeqLM.from_config(config).eval().requires_grad_(False)
    layout = plan_layers(families.num_layers(config), Student(size=options.size))
    assert layout.copies_full_encoder, f"{options.size}: the cache holds encoder states of the teacher's whole encoder"
    student = shrink(teacher, layout)
    freeze(student, FrozenParts(True, True, True))
    return Models(teacher, student, layout)


def make_examples(options: argparse.Namespace, vocabulary_size: int) -> Examples:
    """Sixteen batches of random tokens."""
    rows = options.batch * 16
    generator = torch.Generator().manual_seed(1)
    sources = torch.randint(5, vocabulary_size, (rows, options.source), generator=generator).tolist()
    targets = torch.randint(5, vocabulary_size, (rows, options.target), generator=generator).tolist()
    return Examples(sources, targets, list(range(rows)))


# The baselines: the obvious implementations, without avoidable costs


def iter_batches(examples: Examples, batch_size: int, device: str, pad_id: int) -> Iterator[dict[str, Tensor]]:
    """Endless padded random batches from torch's DataLoader: input_ids, attention_mask (B, S) and labels (B, T)."""

    def collate(rows: list[int]) -> dict[str, Tensor]:
        pad_rows = torch.nn.utils.rnn.pad_sequence
        ids = pad_rows([torch.tensor(examples.sources[i]) for i in rows], True, pad_id)
        labels = pad_rows([torch.tensor(examples.targets[i]) for i in rows], True, -100)
        return {"input_ids": ids, "attention_mask": (ids != pad_id).long(), "labels": labels}

    rows: Any = list(range(len(examples)))
    while True:
        for batch in torch.utils.data.DataLoader(rows, batch_size, shuffle=True, collate_fn=collate):
            yield {name: tensor.to(device) for name, tensor in batch.items()}


def kd_loss(student_output: Any, teacher_output: Any, labels: Tensor, phi: list[int], loss: Loss = LOSS) -> Tensor:
    """Cross-entropy, KL divergence and hidden loss from the outputs of two models.

    Args:
        student_output: with logits (B, T, V) and decoder_hidden_states.
        teacher_output: like `student_output`.
        labels: (B, T), -100 for padding.
        phi: the teacher's decoder layer for each decoder layer of the student.
        loss: coefficients and temperature.

    Returns:
        The weighted sum, a scalar.
    """
    mask = labels != -100
    temperature = loss.temperature
    logits = student_output.logits[mask].float()
    cross_entropy = F.cross_entropy(logits, labels[mask])
    kl = F.kl_div(
        F.log_softmax(logits / temperature, -1),
        F.log_softmax(teacher_output.logits[mask].float() / temperature, -1),
        reduction="batchmean",
        log_target=True,
    )
    hidden = torch.zeros((), device=labels.device)
    for student_layer, teacher_layer in enumerate(phi):
        pair = [
            student_output.decoder_hidden_states[student_layer + 1][mask].float(),
            teacher_output.decoder_hidden_states[teacher_layer + 1][mask].float(),
        ]
        if loss.normalize_hidden:
            pair = [F.layer_norm(states, states.shape[-1:]) for states in pair]
        hidden = hidden + F.mse_loss(*pair)
    return loss.alpha_data * cross_entropy + loss.alpha_logits * temperature**2 * kl + loss.alpha_hidden * hidden


def frozen_tensors(model: torch.nn.Module) -> list[Tensor]:
    """The frozen parameters and the floating-point buffers of a model, each once."""
    frozen: list[Tensor] = [p for p in model.parameters() if not p.requires_grad]
    return [*frozen, *(buffer for buffer in model.buffers() if buffer.is_floating_point())]


def prepare_precision(models: Models, precision: str) -> None:
    """Store the teacher and the frozen weights of the student in the precision in which they are used, in place."""
    if precision != "bf16":
        return
    teacher: Any = models.teacher
    teacher.to(torch.bfloat16)
    for tensor in frozen_tensors(models.student):
        tensor.data = tensor.data.to(torch.bfloat16)


class PaddedLMHead(torch.nn.Module):
    """A frozen LM head whose weight has rows of zeros after the vocabulary, as the product's step has on a GPU.

    Args:
        weight: The padded weight [rows, width].
        vocabulary: The number of rows that give logits.
    """

    def __init__(self, weight: Tensor, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """The logits [..., vocabulary] of decoder outputs [..., width]."""
        weight: Any = self.weight
        return F.linear(hidden, weight)[..., : self.vocabulary]


def pad_lm_head(model: Any, autocast: torch.dtype | None, row_multiple: int) -> None:
    """Give a model with a frozen LM head the weight that the product's step uses, where that is a padded one."""
    weight = frozen_lm_head_weight(model, autocast, row_multiple)
    if weight is not None and len(weight) > len(model.lm_head.weight):
        model.lm_head = PaddedLMHead(weight, len(model.lm_head.weight))


def prepare_baseline(models: Models, options: argparse.Namespace, precision: str) -> torch.dtype | None:
    """Give both models of a baseline the precision and the LM heads of this package; returns the dtype of autocast."""
    student: Any = models.student.to(options.device).train()
    student.get_encoder().eval()
    prepare_precision(models, precision)
    autocast = torch.bfloat16 if precision == "bf16" else None
    for model in (models.teacher, student):
        pad_lm_head(model, autocast, options.row_multiple)
    return autocast


class ClippingAdamW(torch.optim.AdamW):
    """Fused AdamW whose step first clips the gradients, as `clip_and_step` does, for loops that call `step` only."""

    def step(self, closure: Any = None) -> Any:
        """Clip the norm of all gradients to `MAX_GRADIENT_NORM` and update the weights."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.grad_scale = ((norm + 1e-6) / MAX_GRADIENT_NORM).clamp(min=1)
        return super().step(closure)


def decode_with_states(model: PreTrainedModel, encoder_states: Tensor, batch: dict[str, Tensor]) -> Any:
    """The outputs of a model with the hidden states of its decoder, and without those of its encoder."""
    return model(
        encoder_outputs=BaseModelOutput(last_hidden_state=encoder_states),
        attention_mask=batch["attention_mask"],
        decoder_input_ids=batch["decoder_input_ids"],
        output_hidden_states=True,
        use_cache=False,
    )


def time_steps(call: Callable[[], Any], count: int, device: str) -> list[float]:
    """Seconds per step of `count` steps, one value per measurement, after the measurements of the warm-up."""
    steps = STEPS_PER_MEASUREMENT[device]
    seconds = []
    for _ in range(WARMUP_MEASUREMENTS + count // steps):
        start = time.perf_counter()
        for _ in range(steps):
            call()
        synchronize(device)
        seconds.append((time.perf_counter() - start) / steps)
    return seconds[WARMUP_MEASUREMENTS:]


def synchronize(device: str) -> None:
    """Wait until the device has finished all queued work."""
    if device == "cuda":
        torch.cuda.synchronize()


def make_baseline_step(side: str, options: argparse.Namespace, precision: str) -> Callable[[], Tensor]:
    """A KD step with a live teacher: "naive" runs both models in full, "shared" runs the encoder once for both."""
    models = make_models(options)
    autocast = prepare_baseline(models, options, precision)
    student: Any = models.student
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    examples = make_examples(options, student.config.vocab_size)
    batches = iter_batches(examples, options.batch, options.device, student.config.pad_token_id)

    def step() -> Tensor:
        batch = next(batches)
        labels = batch.pop("labels")  # with labels, transformers would compute a cross-entropy that is not used
        batch["decoder_input_ids"] = families.shift_right(student, labels)
        optimizer.zero_grad(set_to_none=True)
        longest = max(batch["input_ids"].shape[1], labels.shape[1])
        with (
            torch.autocast(options.device, torch.bfloat16, enabled=autocast is not None),
            attention_kernel(longest, options.device, autocast),
        ):
            with torch.no_grad():  # the encoder is frozen on both sides
                inputs = batch["input_ids"], batch["attention_mask"]
                student_states = teacher_states = student.get_encoder()(*inputs).last_hidden_state
                if side == "naive":
                    teacher_states = models.teacher.get_encoder()(*inputs).last_hidden_state
                teacher_output = decode_with_states(models.teacher, teacher_states, batch)
            student_output = decode_with_states(student, student_states, batch)
            loss = kd_loss(student_output, teacher_output, labels, models.layout.supervised_decoder)
        loss.backward()
        clip_and_step(optimizer, parameters, MAX_GRADIENT_NORM)
        return loss.detach()

    return step


def time_trainer(options: argparse.Namespace, precision: str) -> list[float]:
    """Seconds per step, as from `time_steps`, of Seq2SeqTrainer with frozen encoder and embeddings.

    The Trainer's own clipping is off, since the optimiser clips.
    """
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

    models = make_models(options)
    autocast = prepare_baseline(models, options, precision)
    student = models.student
    del models  # SFT has no teacher
    gc.collect()
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = ClippingAdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    examples = make_examples(options, student.config.vocab_size)
    rows = [{"input_ids": s, "labels": t} for s, t in zip(examples.sources, examples.targets, strict=True)]

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        ids, labels = (torch.tensor([row[name] for row in batch]) for name in ("input_ids", "labels"))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    ends: list[float] = []
    steps = STEPS_PER_MEASUREMENT[options.device]

    class StepTimer(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % steps == 0:
                synchronize(options.device)
                ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = Seq2SeqTrainingArguments(
            folder,
            per_device_train_batch_size=options.batch,
            max_steps=steps * WARMUP_MEASUREMENTS + options.steps,
            bf16=precision == "bf16",
            use_cpu=options.device == "cpu",
            learning_rate=LEARNING_RATE,
            max_grad_norm=0.0,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = Seq2SeqTrainer(
            student, arguments, collate, rows, callbacks=[StepTimer()], optimizers=(optimizer, None)
        )
        with attention_kernel(max(options.source, options.target), options.device, autocast):
            trainer.train()
    return [(after - before) / steps for before, after in itertools.pairwise(ends)][WARMUP_MEASUREMENTS - 1 :]


# This package


def on_disk(array: RaggedArray, disk: SimulatedDisk | None, number: int) -> Any:
    """The same array, read from a simulated disk; `number` identifies the array on it."""
    return array if disk is None else ThrottledArray(array, disk, number)


def _cache_layout(
    options: argparse.Namespace, models: Models, precision: ComputeDtype, decoder_states: bool
) -> CacheLayout:
    examples = make_examples(options, models.student.config.vocab_size)
    requested_layers = [(examples, models.cached_layers)] if decoder_states else []
    dtypes = CacheDtypes(options.cache_precision, precision)
    width = models.student.config.d_model
    return CacheLayout(Path(options.cache), "random", examples, width, True, requested_layers, dtypes)


def make_cache(options: argparse.Namespace, precision: ComputeDtype) -> None:
    """Build the stores that `time_from_cache` reads."""
    models = make_models(options)
    build_cache(_cache_layout(options, models, precision, decoder_states=True), models.teacher)


def make_distillation_step(
    options: argparse.Namespace,
    method: Any,
    precision: ComputeDtype,
    autocast_dtype: torch.dtype | None,
    disk: SimulatedDisk | None,
) -> DistillationStep:
    """The product's step, which reads the stores that `make_cache` has built, from a disk if there is one."""
    models = make_models(options)
    cache = _cache_layout(options, models, precision, decoder_states=method == "kd")
    student, layout = models.student, models.layout
    del models  # `train` also releases the teacher: all that a step needs from it is in the stores
    malloc_trim()
    student.to(options.device)
    step = DistillationStep(
        student,
        None,
        make_examples(options, student.config.vocab_size),
        method,
        LOSS,
        layout,
        encoder_shared=True,
        lm_head_shared=True,
        cached_encoder_states=on_disk(open_encoder_states(cache), disk, -1),
        cached_decoder_states={
            layer: on_disk(array, disk, layer)
            for layer, array in (open_decoder_states(cache) if method == "kd" else {}).items()
        },
        lm_head_weight=frozen_lm_head_weight(student, autocast_dtype, options.row_multiple),
    )
    student.train()
    student.get_encoder().eval()
    return step


def read_mb_per_step(options: argparse.Namespace, distillation: DistillationStep) -> float:
    """MB that a step reads from the cache; all rows have the same length."""
    encoder = distillation.cached_encoder_states
    assert encoder is not None
    num_vectors = options.batch * (options.source + options.target * len(distillation.cached_decoder_states))
    first = encoder.parts[0]
    return num_vectors * vector_bytes(first.dtype, first.width) / 1e6


def time_from_cache(side: str, options: argparse.Namespace, precision: Any) -> tuple[list[float], dict[str, Any]]:
    """Seconds per step, as from `time_steps`, of the product's training loop, and further figures."""
    autocast_dtype = torch.bfloat16 if precision == "bf16" else None
    disk = SimulatedDisk(options.read_limit * 1e9) if options.read_limit else None
    method = "sft" if side == "ours-sft" else "kd"
    distillation = make_distillation_step(options, method, precision, autocast_dtype, disk)
    settings = Training(batch_size=options.batch, learning_rate=LEARNING_RATE, precision=precision)
    optimizer_step = OptimizerStep.create(distillation, settings, Worker(device=options.device))
    reset_peak_memory(options.device)
    if options.ready_folder:
        wait_for_others(Path(options.ready_folder), options.together)
    with prefetch(optimizer_step.iter_inputs(0, sys.maxsize)) as feed:

        def step() -> Tensor:
            return optimizer_step.run(next(feed))["loss"]

        start = time.perf_counter()
        seconds = time_steps(step, options.steps, options.device)
        wait_share = feed.wait_seconds / (time.perf_counter() - start)
        figures: dict[str, Any] = {"data_wait": wait_share, "loss": float(step())}
        figures["read_mb"] = read_mb_per_step(options, distillation)
        if options.profile:
            figures["profile"] = profile_step(step, options.device)
        return seconds, figures


def wait_for_others(folder: Path, count: int) -> None:
    """Wait until `count` processes have called this function with an equal folder.

    Raises:
        TimeoutError: A process is missing.
    """
    (folder / str(os.getpid())).touch()
    deadline = time.monotonic() + START_TIMEOUT_S
    while len(list(folder.iterdir())) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{count} processes did not start within {START_TIMEOUT_S:.0f} s")
        time.sleep(0.05)


# One side in its process, and all sides


def run_side(options: argparse.Namespace) -> dict[str, Any]:
    """Median, fastest and slowest step in seconds, and the peak memory during the steps in MB."""
    torch.set_num_threads(options.threads)
    reset_peak_memory(options.device)
    figures: dict[str, Any] = {}
    if options.side == "cache":
        make_cache(options, options.precision)
        return {}
    if options.side in ("naive", "shared"):
        step = make_baseline_step(options.side, options, options.precision)
        reset_peak_memory(options.device)
        seconds = time_steps(step, options.steps, options.device)
        figures["loss"] = float(step())
        if options.profile:
            figures["profile"] = profile_step(step, options.device)
    elif options.side == "trainer":
        seconds = time_trainer(options, options.precision)
    else:
        seconds, figures = time_from_cache(options.side, options, options.precision)
    return {
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "peak_mb": peak_memory_mb(options.device),
        **figures,
    }


def profile_step(step: Callable[[], Any], device: str) -> str:
    """torch's profile of one step as a table; on a GPU also warn about every synchronisation."""
    if device == "cuda":
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            step()
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    with torch.profiler.profile(activities=activities) as profile:
        step()
        synchronize(device)
    return profile.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=15)


def reset_peak_memory(device: str) -> None:
    """Restart the count of peak memory, so that loading is not included."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb(device: str) -> float:
    """Peak memory since `reset_peak_memory`: of the GPU, or resident in this process, including mapped files."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3


def compare(options: argparse.Namespace) -> None:
    """Run all sides and write the table of their ratios."""
    machine = describe_machine(options.device)
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=options.cache_root) as cache:
        sides = [("cache", "cache", None), *((side, side, None) for side in options.sides)]
        sides += [(f"ours@{rate:g}", "ours", rate) for rate in options.read_gbps if "ours" in options.sides]
        for precision in options.precisions:
            for label, side, rate in sides:
                name = f"{label} {precision}"
                side_options = argparse.Namespace(**{**vars(options), "read_limit": rate})
                figures[name] = measure_side(side_options, side, precision, cache)
                shown = {key: value for key, value in figures[name].items() if key != "profile"}
                print(f"{name}: {json.dumps(shown)}", file=sys.stderr)
            if options.together > 1:
                name = f"ours-x{options.together} {precision}"
                figures[name] = measure_together(options, precision, cache)
                print(f"{name}: {json.dumps(figures[name])}", file=sys.stderr)
    title = (
        f"A training step: {options.family} {options.size}, {options.source} source and {options.target} target "
        f"tokens, batch {options.batch}, {options.device}"
    )
    variant = [options.cache_precision] if options.cache_precision != "bf16" else []
    variant += [f"width{options.width}"] if options.width != BartConfig().d_model else []
    variant += [f"rows{options.row_multiple}"] if options.row_multiple != GPU_ROW_MULTIPLE else []
    suffix = "_".join(filter(None, (device_suffix(options.device, options.family), *variant)))
    BenchmarkResult("kd_step", title, as_markdown(figures), figures, machine, suffix).write()


def measure_side(options: argparse.Namespace, side: str, precision: str, cache: str) -> dict[str, Any]:
    """One side's figures, from its own process, or on a GPU, whose memory torch counts, from this process."""
    if options.device == "cuda":
        side_options = {**vars(options), "side": side, "precision": precision, "cache": cache}
        figures = run_side(argparse.Namespace(**side_options))
        gc.collect()
        torch.cuda.empty_cache()
        return figures
    done = subprocess.run(side_command(options, side, precision, cache), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def side_command(options: argparse.Namespace, side: str, precision: str, cache: str) -> list[str]:
    """The command that measures one side in a process of its own and prints its figures."""
    forwarded = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in FORWARDED_OPTIONS]
    forwarded += [f"--read-limit={options.read_limit}"] if options.read_limit else []
    command = [sys.executable, "-m", "benchmarks.kd_step", *forwarded, f"--side={side}", f"--precision={precision}"]
    return [*command, f"--cache={cache}"]


def measure_together(options: argparse.Namespace, precision: str, cache: str) -> dict[str, Any]:
    """The figures of `ours` in several processes that take their steps at the same time."""
    alone = argparse.Namespace(**{**vars(options), "profile": 0})
    with tempfile.TemporaryDirectory() as folder:
        command = side_command(alone, "ours", precision, cache)
        command += [f"--together={options.together}", f"--ready-folder={folder}"]
        processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(options.together)]
        outputs = [process.communicate()[0] for process in processes]
    for process in processes:
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
    return combine_processes([json.loads(output.strip().splitlines()[-1]) for output in outputs])


def combine_processes(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of processes that ran at the same time: seconds per step of all, the sum of memory, the longest wait."""
    times = {name: 1 / sum(1 / process[name] for process in figures) for name in ("seconds", "fastest", "slowest")}
    return {
        **times,
        "peak_mb": sum(process["peak_mb"] for process in figures),
        "data_wait": max(process["data_wait"] for process in figures),
        "read_mb": figures[0]["read_mb"],
        "loss": figures[0]["loss"],
    }


def as_markdown(figures: dict[str, dict[str, Any]]) -> str:
    """A table of the sides, a table of `RATIOS`, and the profiles."""
    rows = ["| side | s per step, median | range | peak MB | waiting for data | MB read per step | GB/s |"]
    rows += ["|---|---|---|---|---|---|---|"]
    for name, side in figures.items():
        if side:
            wait = f"{100 * side['data_wait']:.1f} %" if "data_wait" in side else ""
            read_mb = side.get("read_mb")
            read = f"{read_mb:.0f} | {read_mb / 1e3 / side['seconds']:.2f}" if read_mb else " | "
            rows.append(
                f"| {name} | {side['seconds']:.3f} | {side['fastest']:.3f} to {side['slowest']:.3f} "
                f"| {side['peak_mb']:.0f} | {wait} | {read} |"
            )

    def ratio(a: str, b: str, measure: str = "seconds") -> str:
        return f"{figures[a][measure] / figures[b][measure]:.2f}"

    precisions = list(dict.fromkeys(name.split()[1] for name in figures))
    rows += ["", f"| ratio | {' | '.join(precisions)} |", f"|---|{'---|' * len(precisions)}"]
    limited = dict.fromkeys(name.split()[0] for name in figures if "@" in name)
    at_rates = [(f"KD: naive / {side} GB/s", "naive", side, "seconds") for side in limited]
    together = dict.fromkeys(name.split()[0] for name in figures if "-x" in name)
    at_once = [(f"KD: ours / {side}, seconds per step of all processes", "ours", side, "seconds") for side in together]
    for text, a, b, measure in [*RATIOS, *at_rates, *at_once]:
        if all(f"{side} {p}" in figures for side in (a, b) for p in precisions):
            rows.append(f"| {text} | {' | '.join(ratio(f'{a} {p}', f'{b} {p}', measure) for p in precisions)} |")
    if {"naive fp32", "ours bf16"} <= figures.keys():
        rows.append(f"| KD: naive in fp32 / ours in bf16 | | {ratio('naive fp32', 'ours bf16')} |")
    profiles = [f"{name}:\n\n```\n{side['profile']}\n```" for name, side in figures.items() if "profile" in side]
    return "\n".join(rows) + "\n\n" + "\n\n".join(profiles)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--batch", type=int, default=4, help="rows per batch; default: 4")
    parser.add_argument("--source", type=int, default=400, help="source tokens; default: 400")
    parser.add_argument("--target", type=int, default=25, help="target tokens; default: 25")
    parser.add_argument("--family", default="bart", choices=["bart", "pegasus"])
    parser.add_argument("--layers", type=int, default=12, help="layers of a BART teacher's encoder and decoder")
    parser.add_argument("--width", type=int, default=1024, help="of a BART, a multiple of 64; default: 1024")
    parser.add_argument("--size", help="of the student, with the teacher's whole encoder; default: 12-3 or 16-4")
    parser.add_argument("--steps", type=int, help="measured steps, after the warm-up; default: 5, on a GPU 40")
    parser.add_argument("--profile", type=int, default=0, help="1: add torch's profile of a step of each side")
    parser.add_argument("--cache-root", help="folder for the cache; default: the system's for temporary files")
    parser.add_argument(
        "--read-gbps", nargs="*", type=float, default=READ_RATES, help=f"rates of a cold cache; default: {READ_RATES}"
    )
    parser.add_argument("--row-multiple", type=int, default=GPU_ROW_MULTIPLE, help="of the frozen LM head on a GPU")
    parser.add_argument("--cache-precision", choices=["int8", "bf16", "fp32"], default="bf16", help="of the states")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="default: all")
    parser.add_argument("--together", type=int, default=1, help="also `ours` in this many processes at the same time")
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--side", choices=["cache", *SIDES], help=argparse.SUPPRESS)
    parser.add_argument("--precision", default="fp32", help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    parser.add_argument("--read-limit", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--ready-folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.steps = options.steps or {"cpu": 5, "cuda": 40}[options.device]
    if options.steps < STEPS_PER_MEASUREMENT[options.device]:
        parser.error(f"--steps: give at least {STEPS_PER_MEASUREMENT['cuda']} on a GPU, where they are timed together")
    options.size = options.size or {"bart": f"{options.layers}-3", "pegasus": "16-4"}[options.family]
    if options.side:
        print(json.dumps(run_side(options)))
    else:
        compare(options)


if __name__ == "__main__":
    main()
