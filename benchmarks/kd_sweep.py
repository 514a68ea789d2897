"""A sweep of 12 KD trials compared with the same runs one after another by the released code's method, on Multi30k.

This package is timed with the whole `raydistill sweep` command: start of Ray, score of the teacher, latency
table, teacher pass, 12 trials and their scores. The released method is timed with training and scoring alone: the
encoder runs at every step, once for both models; batches of similar length; `generate` for validation, longest rows
first; bf16 where the processor computes in bf16, with the teacher and, in training, the student's frozen weights stored
in bf16; fused AdamW; one run at a time with all threads; the same steps and validations. Then one run of this package's
loop is repeated with each of its methods enabled in turn, beginning with float32 and random batches.

    python -m benchmarks.kd_sweep --teacher ../shared/teachers/multi30k-marian-6-6 \
        --data ../shared/data/multi30k_en_de --train-rows 2000
"""

import argparse
import copy
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.common import RESULTS, BenchmarkResult, describe_machine
from benchmarks.kd_step import decode_with_states, frozen_tensors, kd_loss
from raydistill.config.run import Run
from raydistill.config.space import Space, corner_runs
from raydistill.core.files import write_json_atomic
from raydistill.data.batching import epoch_batches
from raydistill.evaluation.metrics import score
from raydistill.inference.decoding import BeamSearchParams, resolve_decoding
from raydistill.inference.transformers_engine import TransformersEngine
from raydistill.jobs.run_inputs import CacheDecisions
from raydistill.models import families
from raydistill.models.freezing import freeze, resolve_frozen_parts
from raydistill.models.teacher import open_teacher
from raydistill.models.tensors import make_attention_mask, pad_to_tensor
from raydistill.training import optimizer_step
from raydistill.training.inputs import RunInputs
from raydistill.training.records import RUN_FILE, RunResult, read_run
from raydistill.training.run import train
from raydistill.training.student import make_student
from raydistill.training.tokenized_data import load_tokenized_data, make_examples
from raydistill.training.workers import Worker

THREADS = os.cpu_count() or 1
PARTIAL_RESULT = RESULTS / "kd_sweep.partial.json"
STEPS: list[tuple[str, dict[str, Any]]] = [
    ("the released method, in this package's loop", {}),
    ("+ teacher cache", {"teacher_cache": "full"}),
    ("+ length buckets", {"buckets": True}),
    ("+ CTranslate2 for validation", {"engine": "ctranslate2"}),
    ("+ bf16", {"precision": "bf16"}),
]


def make_space(options: argparse.Namespace) -> dict[str, Any]:
    """A space of twelve KD trials: three sizes, two coefficients, two learning rates."""
    return {
        "name": "kd_sweep",
        "run": {
            "teacher": str(Path(options.teacher).absolute()),
            "dataset": {
                "name": str(Path(options.data).absolute()),
                "train_rows": options.train_rows,
                "validation_rows": options.validation_rows,
                "test_rows": options.test_rows,
                "max_source_tokens": 64,
                "max_target_tokens": 64,
            },
            "method": "kd",
            "student": {"size": {"choice": ["6-3", "6-2", "6-1"]}},
            "loss": {"alpha_hidden": {"choice": [1, 3]}, "normalize_hidden": True},
            "training": {
                "learning_rate": {"choice": [3.0e-4, 6.0e-4]},
                "batch_size": 64,
                "epochs": options.epochs,
                "warmup_steps": 20,
                "checks_per_epoch": 1,
                "patience": 99,
                "dropout": 0.1,
            },
            "evaluation": {"metric": "bleu"},
        },
        "search": {"trials": options.trials, "sampler": "grid", "seed": 0},
    }


def run_sweep(space: Path, home: Path) -> dict[str, Any]:
    """Run `raydistill sweep`; return its seconds in total and by stage, and the results of its trials."""
    seconds, lines = _run_sweep_command(space, home)
    folder = home / "sweeps" / "kd_sweep"
    results = [RunResult.read(path) for path in sorted(folder.glob("trials/*/result.json"))]
    start = min(path.stat().st_mtime for path in folder.glob("trials/*/run.json"))
    end = max(path.stat().st_mtime for path in folder.glob("trials/*/result.json"))
    done = [result for result in results if result.status == "done"]
    busy_seconds = sum(result.metrics["device_hours"] * 3600 for result in results)
    names = {result.key: read_trial_name(folder / "trials" / result.key) for result in results}
    return {
        "seconds": seconds,
        "latency_seconds": seconds_between(lines, "latency:", "teacher cache:"),
        "finalists_seconds": seconds_between(lines, "finalists:", "sweep kd_sweep:"),
        "cache": CacheDecisions.read(folder / "cache.json").model_dump(mode="json"),
        "trials_seconds": end - start,
        "around_a_trial_s": (THREADS * (end - start) - busy_seconds) / len(results),
        "startup_s": [result.metrics["startup_s"] for result in sorted(done, key=lambda result: result.number or 0)],
        "scores": {names[result.key]: result.test.metrics["bleu"] for result in done if result.test},
        "not_done": {
            names[result.key]: f"{result.status}: {result.reason}" for result in results if result not in done
        },
    }


def _run_sweep_command(space: Path, home: Path) -> tuple[float, list[tuple[float, str]]]:
    """Seconds of the command, and its output lines with the seconds after which they appeared."""
    start = time.monotonic()
    lines: list[tuple[float, str]] = []
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "raydistill.sweep", str(space)],
        env={**os.environ, "RAYDISTILL_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", file=sys.stderr)
            lines.append((time.monotonic() - start, line))
    seconds = time.monotonic() - start
    if process.returncode:
        raise SystemExit(f"raydistill sweep failed with exit status {process.returncode}")
    return seconds, lines


def seconds_between(lines: list[tuple[float, str]], first: str, then: str) -> float:
    """Seconds from the line that starts with `first` to the next line that starts with `then`."""
    start = next(at for at, line in lines if line.startswith(first))
    return next(at for at, line in lines if at >= start and line.startswith(then)) - start


def read_trial_name(folder: Path) -> str:
    """`trial_name` of the trial in a folder."""
    return trial_name(read_run(folder / RUN_FILE))


def trial_name(run: Run) -> str:
    """The settings in which the trials differ."""
    return f"{run.student.size}, alpha_hidden {run.loss.alpha_hidden:g}, lr {run.training.learning_rate:g}"


class FrozenValues:
    """The frozen weights of a model, exact and rounded to the dtype of autocast, which then converts none of them.

    Args:
        model: The model, which has the exact weights at first.
        dtype: The dtype of autocast.
    """

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype) -> None:
        self.tensors = frozen_tensors(model)
        self.exact = [tensor.data for tensor in self.tensors]
        self.rounded = [tensor.data.to(dtype) for tensor in self.tensors]

    def use_exact(self) -> None:
        """Give the model the exact weights, with which it is scored."""
        self._use(self.exact)

    def use_rounded(self) -> None:
        """Give the model the rounded weights, with which it is trained."""
        self._use(self.rounded)

    def _use(self, values: list[torch.Tensor]) -> None:
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.data = value


class ReleasedMethod:
    """One run by the released code's method.

    Args:
        run: the run's settings.
        inputs: the run's inputs, for its label sets.
    """

    def __init__(self, run: Run, inputs: RunInputs) -> None:
        torch.manual_seed(run.training.seed)
        torch.set_num_threads(THREADS)
        assert run.teacher is not None
        self.run = run
        self.teacher = open_teacher(run.teacher, run.dataset)
        self.start = time.monotonic()
        self.student, self.layers = make_student(run, self.teacher)
        freeze(self.student, resolve_frozen_parts(run, self.layers))
        self.autocast = optimizer_step.autocast_dtype(run.training, Worker())
        # A copy, since later runs make their students from the teacher of this process
        teacher: Any = copy.deepcopy(self.teacher.model)
        self.teacher_model = teacher.to(self.autocast or torch.float32)
        self.data = load_tokenized_data(run, None, self.teacher.tokenizer, self.student.config)
        self.examples = make_examples(run, self.data, self.teacher.tokenizer, inputs.label_folders)
        self.parameters = [p for p in self.student.parameters() if p.requires_grad]
        self.frozen = FrozenValues(self.student, self.autocast or torch.float32)
        settings = run.training
        self.optimizer = optimizer_step.make_optimizer(self.parameters, settings)
        self.total_steps = round(-(-len(self.examples) // settings.batch_size) * settings.epochs)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: optimizer_step.learning_rate_factor(step, settings, self.total_steps)
        )
        generation_config = self.student.generation_config
        self.beam = resolve_decoding(run.decoding, generation_config, None, self.data.max_target_tokens)

    def train_and_score(self) -> dict[str, float]:
        """Train with a validation after every epoch; return the seconds and the best checkpoint's BLEU on test."""
        best_score, best_weights, step = -1.0, {}, 0
        batch_size = self.run.training.batch_size
        lengths, epoch = optimizer_step.effective_lengths(self.examples), 0
        while step < self.total_steps:
            batches = epoch_batches(lengths, batch_size, self.run.training.seed, epoch)
            self.frozen.use_rounded()
            for rows in batches[: self.total_steps - step]:
                self.train_step(rows)
                step += 1
            epoch += 1
            validation_score = self.bleu("validation", beams=2)
            if validation_score > best_score:
                weights = self.student.named_parameters()
                best_score = validation_score
                best_weights = {name: p.detach().clone() for name, p in weights if p.requires_grad}
        self.student.load_state_dict(best_weights, strict=False)
        self.bleu("validation", self.beam.beams)
        test_score = self.bleu("test", self.beam.beams)
        return {"seconds": time.monotonic() - self.start, "bleu": test_score}

    def train_step(self, rows: list[int]) -> None:
        """One optimisation step on the examples with these indices."""
        student, examples = self.student, self.examples
        student.train()
        student.get_encoder().eval()
        labels = pad_to_tensor([examples.targets[i] for i in rows], -100)
        sources = [examples.sources[examples.source_indices[i]] for i in rows]
        ids, mask = pad_to_tensor(sources, student.config.pad_token_id), make_attention_mask(sources)
        self.optimizer.zero_grad(set_to_none=True)
        # Not `labels`, with which transformers would compute a cross-entropy that is not used.
        batch = {"decoder_input_ids": families.shift_right(student, labels), "attention_mask": mask}
        longest = max(ids.shape[1], labels.shape[1])
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=self.autocast is not None),
            optimizer_step.attention_kernel(longest, "cpu", self.autocast),
        ):
            with torch.no_grad():
                states = self.teacher_model.get_encoder()(ids, mask).last_hidden_state  # also the student's
                teacher_output = decode_with_states(self.teacher_model, states, batch)
            student_output = decode_with_states(student, states, batch)
            loss = kd_loss(student_output, teacher_output, labels, self.layers.supervised_decoder, self.run.loss)
        loss.backward()
        optimizer_step.clip_and_step(self.optimizer, self.parameters, self.run.training.gradient_clip)
        self.schedule.step()

    def bleu(self, split: str, beams: int) -> float:
        """BLEU of a split, generated by transformers' `generate`."""
        corpus = self.data.corpora[split]
        self.frozen.use_exact()
        engine = TransformersEngine(self.student, self.teacher.tokenizer, threads=THREADS)
        beam: BeamSearchParams = replace(self.beam, beams=beams)
        rows = engine.generate(corpus.sources, beam, max_source_tokens=self.data.max_source_tokens)
        return score("bleu", [hypotheses[0].text for hypotheses in rows], corpus.targets).metrics["bleu"]


def run_steps(run: Run, home: Path) -> Iterator[dict[str, Any]]:
    """Repeat one run with all threads, with one more of `STEPS` enabled each time, each in its own process."""
    settings: dict[str, Any] = {"teacher_cache": "off", "buckets": False, "engine": "transformers", "precision": "fp32"}
    for name, change in STEPS:
        settings |= change
        data = run.model_dump(mode="json")
        data["training"] |= {"teacher_cache": settings["teacher_cache"], "precision": settings["precision"]}
        data["training"]["threads"] = THREADS
        data["evaluation"]["engine"] = settings["engine"]
        request = {"run": data, "buckets": settings["buckets"], "cache": str(home / "steps-cache")}
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.kd_sweep", "--single-run", json.dumps(request)],
            env={**os.environ, "RAYDISTILL_HOME": str(home)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        yield {"what": name, **json.loads(done.stdout.strip().splitlines()[-1])}


def time_single_run(request: dict[str, Any]) -> dict[str, Any]:
    """Time one run in this process. Its cache is built before; the time of that is returned separately."""
    torch.set_num_threads(THREADS)
    run = Run.model_validate(request["run"])
    if not request["buckets"]:
        optimizer_step.epoch_batches = random_batches
    inputs = RunInputs(cache_root=Path(request["cache"]))
    warmup = run.model_copy(update={"training": run.training.model_copy(update={"max_steps": 1, "warmup_steps": 0})})
    warmup_start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        # One step loads libraries and corpora, and builds the cache.
        train(warmup, Path(folder) / "warmup", lambda metrics, folder: None, inputs)
        start = time.monotonic()
        validations: list[dict[str, Any]] = []
        result = train(run, Path(folder) / "run", lambda metrics, folder: validations.append(metrics), inputs)
        seconds = time.monotonic() - start
    assert result is not None
    assert result.test is not None
    return {
        "seconds": seconds,
        "before": start - warmup_start,
        "steps": result.steps,
        "step_ms": statistics.mean(validation["step_ms"] for validation in validations),
        "data_wait": max(validation["data_wait"] for validation in validations),
        "val_loss": validations[-1]["val_loss"],
        "bleu": result.test.metrics["bleu"],
        "startup_s": result.metrics["startup_s"],
    }


def random_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """All examples once in random batches, regardless of their lengths; replaces `optimizer_step.epoch_batches`."""
    order = list(range(len(lengths)))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def compare(options: argparse.Namespace) -> None:
    """Run the steps and both sides; write benchmarks/results/kd_sweep.md, and `PARTIAL_RESULT` after each stage."""
    machine = describe_machine()
    data: dict[str, Any] = {"options": vars(options), "one_by_one": [], "released": {}}
    with tempfile.TemporaryDirectory(dir=options.work) as scratch:
        home = Path(scratch)
        space = home / "space.yaml"
        space.write_text(yaml.safe_dump(make_space(options)))
        os.environ["RAYDISTILL_HOME"] = str(home / "sweep")
        runs = corner_runs(Space.model_validate(make_space(options)))[: options.trials]
        for row in run_steps(runs[0], home / "steps"):
            data["one_by_one"].append(row)
            save_partial_result(data, row)
        data["ours"] = run_sweep(space, home / "sweep")
        save_partial_result(data, data["ours"])
        for run in runs:
            figures = ReleasedMethod(run, RunInputs()).train_and_score()
            data["released"][trial_name(run)] = figures
            save_partial_result(data, {trial_name(run): figures})
    title = "A sweep of KD trials and the same runs one after another"
    BenchmarkResult("kd_sweep", title, as_markdown(data), data, machine).write()
    PARTIAL_RESULT.unlink()


def save_partial_result(data: dict[str, Any], latest: Any) -> None:
    """Save all figures so far, so that a later failure does not lose them, and print the latest."""
    write_json_atomic(PARTIAL_RESULT, data)
    print(json.dumps(latest), file=sys.stderr)


def as_markdown(data: dict[str, Any]) -> str:
    """Tables of times, of scores by trial, and of the steps."""
    ours, released = data["ours"], data["released"]
    compared = [name for name in released if name in ours["scores"]]
    gaps = [ours["scores"][name] - released[name]["bleu"] for name in compared]
    failures = [
        f"Not done in the sweep, so that the work is unequal: {name}: {reason}"
        for name, reason in ours["not_done"].items()
    ]
    groups = ours["cache"]["groups"].values()
    lines = [
        f"{len(released)} trials of {data['options']['epochs']} epochs, {data['options']['train_rows']} rows.",
        "",
        *_time_table(data),
        "",
        f"Teacher cache: {'; '.join(group['mode'] + ': ' + group['reason'] for group in groups)}.",
        "",
        f"Seconds per trial outside of its run (Ray, search): {ours['around_a_trial_s']:.1f}, which is "
        f"{100 * ours['around_a_trial_s'] / 300:.1f} % of a trial of 5 minutes. Seconds from a run's start to its "
        f"first step: {', '.join(f'{s:.1f}' for s in ours['startup_s'])}.",
        "",
        describe_score_gaps(gaps),
        "",
        *[line for failure in failures for line in (failure, "")],
        "| trial | released: s | BLEU | ours: BLEU |",
        "|---|---|---|---|",
    ]
    for name in compared:
        seconds, bleu = released[name]["seconds"], released[name]["bleu"]
        lines.append(f"| {name} | {seconds:.0f} | {bleu:.2f} | {ours['scores'][name]:.2f} |")
    lines += [
        "",
        "One run alone, with all threads:",
        "",
        "| setting | s | step, ms | waiting for data, at most | BLEU |",
        "|---|---|---|---|---|",
    ]
    for row in data["one_by_one"]:
        wait = f"{100 * row['data_wait']:.1f} %"
        lines.append(f"| {row['what']} | {row['seconds']:.1f} | {row['step_ms']:.0f} | {wait} | {row['bleu']:.2f} |")
    return "\n".join(lines)


def _time_table(data: dict[str, Any]) -> list[str]:
    ours, released = data["ours"], data["released"]
    total = sum(run["seconds"] for run in released.values())
    passes = sum(sum(group["device_seconds"].values()) for group in ours["cache"]["groups"].values())
    same_work = ours["seconds"] - ours["latency_seconds"] - ours["finalists_seconds"]
    return [
        "| side | seconds |",
        "|---|---|",
        f"| released method, {len(released)} runs | {total:.0f} |",
        f"| `raydistill sweep`, the whole command | {ours['seconds']:.0f} |",
        f"| of which the latency table, which the other side lacks | {ours['latency_seconds']:.0f} |",
        f"| of which serving and timing the finalists, which the other side lacks | {ours['finalists_seconds']:.0f} |",
        f"| of which the trials | {ours['trials_seconds']:.0f} |",
        f"| of which the teacher pass, device-seconds | {passes:.0f} |",
        f"| **ratio for the same work** | **{total / same_work:.2f}** |",
        f"| ratio for the whole command | {total / ours['seconds']:.2f} |",
    ]


def describe_score_gaps(gaps: list[float]) -> str:
    """Mean and standard deviation of the differences between scores; needs two trials."""
    if len(gaps) < 2:
        return f"BLEU on test was compared for {len(gaps)} trials only."
    mean, spread = statistics.mean(gaps), statistics.stdev(gaps)
    return f"BLEU on test, ours minus released, {len(gaps)} trials: mean {mean:+.2f}, standard deviation {spread:.2f}."


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="the teacher's folder")
    parser.add_argument("--data", help="the folder of the data set")
    parser.add_argument("--train-rows", type=int, default=2000, help="default: 2000")
    parser.add_argument("--validation-rows", type=int, default=200, help="default: 200")
    parser.add_argument("--test-rows", type=int, default=200, help="default: 200")
    parser.add_argument("--epochs", type=int, default=3, help="default: 3")
    parser.add_argument("--trials", type=int, default=12, help="default: 12")
    parser.add_argument("--work", help="folder for temporary files; default: the system's")
    parser.add_argument("--single-run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.single_run:
        print(json.dumps(time_single_run(json.loads(options.single_run))))
    elif options.teacher and options.data:
        compare(options)
    else:
        parser.error("--teacher and --data are required")


if __name__ == "__main__":
    main()
