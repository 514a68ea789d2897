"""What a training step costs: KD naive, KD with a shared encoder, KD from the cache; SFT by the Trainer and by us.

BART-large to 12-3 (or Pegasus-large to 16-4) with random weights, sources of 400 tokens and targets of 25. Every side
has its loader, its reading from disk and its optimiser, and but for a GPU a process of its own. Needs torch,
transformers and, for the Trainer, accelerate; neither Ray nor MLflow.

    python -m benchmarks.kd_step                       # two threads, batch 4: about 12 minutes
    python -m benchmarks.kd_step --device cuda --batch 64 --form pegasus
"""

import argparse
import gc
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, BartConfig, PegasusConfig, PreTrainedModel

from benchmarks.common import describe_machine, write_result
from raydistill.config.run import Loss, Student, Training
from raydistill.core.machine import malloc_trim
from raydistill.data.batching import Examples
from raydistill.models import families
from raydistill.models.freezing import FrozenParts, freeze
from raydistill.models.shrinking import plan_layers, shrink
from raydistill.teacher_cache.builder import build_cache
from raydistill.teacher_cache.layout import CacheDtypes, CacheLayout
from raydistill.teacher_cache.reader import open_decoder_states, open_encoder_states
from raydistill.training.distillation import DistillationStep
from raydistill.training.optimizer_step import OptimizerStep
from raydistill.training.prefetch import prefetch
from raydistill.training.workers import Worker

LOSS = Loss(alpha_data=1.0, alpha_logits=0.8, alpha_hidden=3.0, temperature=2.0)
SIDES = ("naive", "shared", "ours", "trainer", "ours-sft")
# Steps timed together: a GPU works while the next ones are prepared, and this script asks for no step's loss.
BLOCK = {"cpu": 1, "cuda": 5}
WARM_UP = 2


def models(form: str, layers: int, size: str, device: str) -> tuple[PreTrainedModel, PreTrainedModel, Any]:
    """A random teacher and a student of it, dropout 0, with encoder and embeddings frozen."""
    config = (
        BartConfig(dropout=0.0, encoder_layers=layers, decoder_layers=layers)
        if form == "bart"
        else PegasusConfig(vocab_size=96103, encoder_layers=16, decoder_layers=16, dropout=0.0)
    )
    torch.manual_seed(0)
    with torch.device(device):  # random weights of this size take a CPU many seconds
        teacher = AutoModelForSeq2SeqLM.from_config(config).eval().requires_grad_(False)
    layout = plan_layers(families.num_layers(config), Student(size=size))
    assert layout.copies_full_encoder, f"{size}: a student whose encoder is not the teacher's reads no encoder states"
    student = shrink(teacher, layout)
    freeze(student, FrozenParts(True, True, True))
    return teacher, student, layout


def pairs(rows: int, source: int, target: int, vocabulary: int) -> Examples:
    """Random tokens."""
    draw = torch.Generator().manual_seed(1)
    sources = torch.randint(5, vocabulary, (rows, source), generator=draw).tolist()
    targets = torch.randint(5, vocabulary, (rows, target), generator=draw).tolist()
    return Examples(sources, targets, list(range(rows)))


# The baselines: each the obvious way, well written


def loader(examples: Examples, batch: int, device: str, pad_id: int) -> Iterator[dict[str, Tensor]]:
    """Random batches through torch's DataLoader, padded, without end."""

    def collate(rows: list[int]) -> dict[str, Tensor]:
        pad_rows = torch.nn.utils.rnn.pad_sequence
        ids = pad_rows([torch.tensor(examples.sources[i]) for i in rows], True, pad_id)
        labels = pad_rows([torch.tensor(examples.targets[i]) for i in rows], True, -100)
        return {"input_ids": ids, "attention_mask": (ids != pad_id).long(), "labels": labels}

    rows: Any = list(range(len(examples)))
    while True:
        for found in torch.utils.data.DataLoader(rows, batch, shuffle=True, collate_fn=collate):
            yield {name: tensor.to(device) for name, tensor in found.items()}


def kd_loss(ours: Any, theirs: Any, labels: Tensor, phi: list[int], how: Loss = LOSS) -> Tensor:
    """CE, KL and hidden loss from two models' outputs."""
    real = labels != -100
    temperature = how.temperature
    logits = ours.logits[real].float()
    ce = F.cross_entropy(logits, labels[real])
    kl = F.kl_div(
        F.log_softmax(logits / temperature, -1),
        F.log_softmax(theirs.logits[real].float() / temperature, -1),
        reduction="batchmean",
        log_target=True,
    )
    hidden = torch.zeros((), device=labels.device)
    for n, t in enumerate(phi):
        pair = [out[real].float() for out in (ours.decoder_hidden_states[n + 1], theirs.decoder_hidden_states[t + 1])]
        if how.normalize_hidden:
            pair = [F.layer_norm(states, states.shape[-1:]) for states in pair]
        hidden = hidden + F.mse_loss(*pair)
    return how.alpha_data * ce + how.alpha_logits * temperature**2 * kl + how.alpha_hidden * hidden


def time_steps(call: Callable[[], Any], count: int, device: str) -> list[float]:
    """Seconds of each of `count` steps, on a GPU the mean of each `BLOCK`, after those of the warm-up."""
    each = BLOCK[device]
    seconds = []
    for _ in range(WARM_UP + count // each):
        begun = time.perf_counter()
        for _ in range(each):
            call()
        synchronize(device)
        seconds.append((time.perf_counter() - begun) / each)
    return seconds[WARM_UP:]


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def baseline(side: str, options: argparse.Namespace, precision: str) -> Callable[[], Tensor]:
    """A KD step that runs the teacher: `naive` all of both models, `shared` the encoder once for both."""
    teacher, student, layout = models(options.form, options.layers, options.size, options.device)
    student.to(options.device).train()
    student.get_encoder().eval()
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-4, weight_decay=0.0, fused=True)
    examples = pairs(options.batch * 16, options.source, options.target, student.config.vocab_size)
    batches = loader(examples, options.batch, options.device, student.config.pad_token_id)

    def call() -> Tensor:
        batch = next(batches)
        labels = batch.pop("labels")  # given them, transformers would work out a cross-entropy that nobody uses
        batch["decoder_input_ids"] = families.shift_right(student, labels)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(options.device, torch.bfloat16, enabled=precision == "bf16"):
            more: dict[str, Any] = {"output_hidden_states": True, "use_cache": False}
            if side == "shared":
                with torch.no_grad():
                    encoded = student.get_encoder()(batch["input_ids"], batch["attention_mask"])
                more["encoder_outputs"] = encoded
            with torch.no_grad():
                theirs = teacher(**batch, **more)
            loss = kd_loss(student(**batch, **more), theirs, labels, layout.supervised_decoder)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.detach()

    return call


def trainer(options: argparse.Namespace, precision: str) -> list[float]:
    """Seconds, as of `time_steps`, of a step of Hugging Face's Seq2SeqTrainer; encoder and embeddings are frozen."""
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

    _, student, _ = models(options.form, options.layers, options.size, options.device)
    gc.collect()
    examples = pairs(options.batch * 16, options.source, options.target, student.config.vocab_size)
    rows = [{"input_ids": s, "labels": t} for s, t in zip(examples.sources, examples.targets, strict=True)]

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        ids, labels = (torch.tensor([row[name] for row in batch]) for name in ("input_ids", "labels"))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    ends: list[float] = []
    each = BLOCK[options.device]
    count = each * WARM_UP + options.steps

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % each == 0:
                synchronize(options.device)
                ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = Seq2SeqTrainingArguments(
            folder,
            per_device_train_batch_size=options.batch,
            max_steps=count,
            bf16=precision == "bf16",
            use_cpu=options.device == "cpu",
            learning_rate=3e-4,
            optim="adamw_torch_fused",
            max_grad_norm=1.0,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        Seq2SeqTrainer(student, arguments, collate, rows, callbacks=[Clock()]).train()
    return [(after - before) / each for before, after in itertools.pairwise(ends)][WARM_UP - 1 :]


# Ours


def from_cache(side: str, options: argparse.Namespace, precision: str) -> tuple[list[float], dict[str, Any]]:
    """Seconds, as of `time_steps`, of a step of the product's own loop from `make_cache`'s stores; and what it says."""
    teacher, student, layout = models(options.form, options.layers, options.size, options.device)
    key, width = "random", student.config.d_model
    examples = pairs(options.batch * 16, options.source, options.target, student.config.vocab_size)
    method: Any = "sft" if side == "ours-sft" else "kd"
    autocast = torch.bfloat16 if precision == "bf16" else None
    layers = sorted({*layout.supervised_decoder, families.num_layers(teacher.config)[1] - 1})
    wanted = [(examples, layers)] if method == "kd" else []
    work = CacheLayout(Path(options.cache), key, examples, width, True, wanted, CacheDtypes(precision, precision))
    del teacher  # as `train` releases it: all that a step reads of it is in the stores
    malloc_trim()
    student.to(options.device)
    head: Any = student.lm_head
    supervision = DistillationStep(
        student,
        None,
        examples,
        method,
        LOSS,
        layout,
        encoder_shared=True,
        lm_head_shared=True,
        cached_encoder_states=open_encoder_states(work),
        cached_decoder_states=open_decoder_states(work) if wanted else {},
        lm_head_weight=None if autocast is None else head.weight.detach().to(autocast),
    )
    settings = Training(batch_size=options.batch, learning_rate=3e-4, precision="fp32" if autocast is None else "bf16")
    step = OptimizerStep.create(supervision, settings, Worker(device=options.device))
    student.train()
    student.get_encoder().eval()
    forget_peak(options.device)
    with prefetch(step.iter_inputs(0, sys.maxsize)) as feed:

        def call() -> Tensor:
            return step.run(next(feed))["loss"]

        begun = time.perf_counter()
        seconds = time_steps(call, options.steps, options.device)
        facts: dict[str, Any] = {"data_wait": feed.wait_seconds / (time.perf_counter() - begun), "loss": float(call())}
        if options.profile:
            facts["profile"] = profile(call, options.device)
        return seconds, facts


def make_cache(options: argparse.Namespace, precision: str) -> None:
    """The stores that `from_cache` reads."""
    teacher, student, layout = models(options.form, options.layers, options.size, options.device)
    examples = pairs(options.batch * 16, options.source, options.target, student.config.vocab_size)
    layers = sorted({*layout.supervised_decoder, families.num_layers(teacher.config)[1] - 1})
    numbers = CacheDtypes(precision, precision)
    build_cache(
        CacheLayout(
            Path(options.cache), "random", examples, student.config.d_model, True, [(examples, layers)], numbers
        ),
        teacher,
    )


# One side in its process, and all of them


def run_side(options: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a step, the range, and the peak memory while the steps ran, in MB."""
    torch.set_num_threads(options.threads)
    forget_peak(options.device)
    precision = options.precision
    facts: dict[str, Any] = {}
    if options.side == "cache":
        make_cache(options, precision)
        return {}
    if options.side in ("naive", "shared"):
        call = baseline(options.side, options, precision)
        forget_peak(options.device)
        seconds = time_steps(call, options.steps, options.device)
        facts["loss"] = float(call())
        if options.profile:
            facts["profile"] = profile(call, options.device)
    elif options.side == "trainer":
        seconds = trainer(options, precision)
    else:
        seconds, facts = from_cache(options.side, options, precision)
    return {
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "peak_mb": peak_mb(options.device),
        **facts,
    }


def profile(call: Callable[[], Any], device: str) -> str:
    """torch's table of where the time of one step goes, and where it waited for the GPU."""
    if device == "cuda":
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            call()
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    with torch.profiler.profile(activities=activities) as found:
        call()
        synchronize(device)
    return found.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=15)


def forget_peak(device: str) -> None:
    """Start to count the peak anew: what loading took is not a step's."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb(device: str) -> float:
    """The largest memory since `reset_peak_rss`: of the GPU, or resident of this process (mapped files count)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3


def compare(options: argparse.Namespace) -> None:
    """All sides, each in its own process, and the table of the ratios."""
    machine = describe_machine(options.device)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=options.cache_root) as cache:
        for precision in options.precisions:
            for side in ("cache", *SIDES):
                name = f"{side} {precision}"
                found[name] = measured(options, side, precision, cache)
                print(
                    f"{name}: {json.dumps({k: v for k, v in found[name].items() if k != 'profile'})}", file=sys.stderr
                )
    write_result(
        "kd_step",
        f"A training step: {options.form} {options.size}, {options.source} source and {options.target} target tokens, "
        f"batch {options.batch}, {options.device}",
        as_markdown(found),
        found,
        machine,
        device=options.device,
        form=options.form,
    )


def measured(options: argparse.Namespace, side: str, precision: str, cache: str) -> dict[str, Any]:
    """One side's figures, from a process of its own; on a GPU, whose memory torch counts, from this one."""
    if options.device == "cuda":
        found = run_side(argparse.Namespace(**vars(options) | {"side": side, "precision": precision, "cache": cache}))
        gc.collect()
        torch.cuda.empty_cache()
        return found
    given = [f"--{name}={getattr(options, name)}" for name in PASSED_ON]
    command = [sys.executable, "-m", "benchmarks.kd_step", *given, f"--side={side}", f"--precision={precision}"]
    done = subprocess.run([*command, f"--cache={cache}"], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def as_markdown(found: dict[str, dict[str, Any]]) -> str:
    """Every side's step, and the ratios that the project promises."""
    rows = ["| side | s a step, median | range | peak MB | data wait |", "|---|---|---|---|---|"]
    for name, facts in found.items():
        if facts:
            wait = f"{100 * facts['data_wait']:.1f} %" if "data_wait" in facts else ""
            rows.append(
                f"| {name} | {facts['seconds']:.3f} | {facts['fastest']:.3f} to {facts['slowest']:.3f} "
                f"| {facts['peak_mb']:.0f} | {wait} |"
            )

    def ratio(a: str, b: str, what: str = "seconds") -> str:
        return f"{found[a][what] / found[b][what]:.2f}"

    precisions = list(dict.fromkeys(name.split()[1] for name in found))
    rows += ["", f"| ratio | {' | '.join(precisions)} |", f"|---|{'---|' * len(precisions)}"]
    for text, a, b, what in RATIOS:
        if all(f"{side} {p}" in found for side in (a, b) for p in precisions):
            rows.append(f"| {text} | {' | '.join(ratio(f'{a} {p}', f'{b} {p}', what) for p in precisions)} |")
    if len(precisions) > 1:
        rows.append(f"| KD: naive in fp32 / ours in bf16 | | {ratio('naive fp32', 'ours bf16')} |")
    tables = [f"{name}:\n\n```\n{facts['profile']}\n```" for name, facts in found.items() if "profile" in facts]
    return "\n".join(rows) + "\n\n" + "\n\n".join(tables)


RATIOS = [
    ("KD: naive / ours", "naive", "ours", "seconds"),
    ("KD: shared encoder / ours", "shared", "ours", "seconds"),
    ("SFT: Seq2SeqTrainer / ours", "trainer", "ours-sft", "seconds"),
    ("KD, peak memory: ours / naive", "ours", "naive", "peak_mb"),
]
PASSED_ON = ("device", "threads", "batch", "source", "target", "form", "layers", "size", "steps", "profile")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--source", type=int, default=400)
    parser.add_argument("--target", type=int, default=25)
    parser.add_argument("--form", default="bart", choices=["bart", "pegasus"])
    parser.add_argument("--layers", type=int, default=12, help="of each stack of the teacher (bart)")
    parser.add_argument(
        "--size", help="of the student: a whole encoder, and by default 3 (bart) or 4 (pegasus) decoder layers"
    )
    parser.add_argument("--steps", type=int, help="measured steps, after those of the warm-up; default: 5, on a GPU 40")
    parser.add_argument("--profile", type=int, default=0, help="1: torch's profile of a step of each side")
    parser.add_argument("--cache-root", help="a folder on the disk to read from; default: the system's for temporary")
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--side", choices=["cache", *SIDES], help=argparse.SUPPRESS)
    parser.add_argument("--precision", default="fp32", help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.steps = options.steps or {"cpu": 5, "cuda": 40}[options.device]
    if options.steps < BLOCK[options.device]:
        parser.error(f"--steps: on a GPU {BLOCK['cuda']} are timed together; ask for as many at least")
    options.size = options.size or {"bart": f"{options.layers}-3", "pegasus": "16-4"}[options.form]
    if options.side:
        print(json.dumps(run_side(options)))
    else:
        compare(options)


if __name__ == "__main__":
    main()
