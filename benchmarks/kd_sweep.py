"""A sweep of 12 KD trials against the same runs one after another the released code's way, on Multi30k.

Ours is the whole `raydistill sweep` command: Ray's start, the teacher's score, the latency table, the teacher pass, 12
trials, their scores. The other side is training and scoring alone: the encoder run with every step for both models,
random batches, `generate` for validation, float32, all threads for one run at a time; the same steps and checks. Then
one run again with what makes the difference switched on, one thing after another.

    python -m benchmarks.kd_sweep --teacher ../shared/teachers/multi30k-marian-6-6 \
        --data ../shared/data/multi30k_en_de --train-rows 2000
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.common import RESULTS, describe_machine, write_result
from benchmarks.kd_step import kd_loss
from raydistill.config.run import Run
from raydistill.config.space import Space, corner_runs
from raydistill.core.files import write_json_atomic
from raydistill.evaluation.metrics import score
from raydistill.inference.decoding import BeamSearchParams, resolve_decoding
from raydistill.inference.transformers_engine import TransformersEngine
from raydistill.models import families
from raydistill.models.freezing import freeze, resolve_frozen_parts
from raydistill.models.teacher import open_teacher
from raydistill.models.tensors import make_attention_mask, pad_to_tensor
from raydistill.training import optimizer_step
from raydistill.training.inputs import RunInputs
from raydistill.training.run import train
from raydistill.training.student import make_student
from raydistill.training.tokenized_data import load_tokenized_data, make_examples

THREADS = os.cpu_count() or 1
PARTIAL = RESULTS / "kd_sweep.partial.json"


def space_of(options: argparse.Namespace) -> dict[str, Any]:
    """Twelve KD trials: three sizes, two coefficients, two learning rates."""
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


def the_sweep(space: Path, home: Path) -> dict[str, Any]:
    """Seconds of the whole command, and what its trials came to."""
    started = time.monotonic()
    told: list[tuple[float, str]] = []
    command = [sys.executable, "-u", "-m", "raydistill.sweep", str(space)]
    with subprocess.Popen(
        command,
        env={**os.environ, "RAYDISTILL_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as sweep:
        assert sweep.stdout is not None
        for line in sweep.stdout:
            print(line, end="", file=sys.stderr)
            told.append((time.monotonic() - started, line))
    seconds = time.monotonic() - started
    if sweep.returncode:
        raise SystemExit(f"the sweep ended with status {sweep.returncode}")
    folder = home / "sweeps" / "kd_sweep"
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("trials/*/result.json"))]
    begun = min(path.stat().st_mtime for path in folder.glob("trials/*/run.json"))
    ended = max(path.stat().st_mtime for path in folder.glob("trials/*/result.json"))
    done = [r for r in results if r["status"] == "done"]
    at_work = sum(r["metrics"]["gpu_hours"] * 3600 for r in results)  # each from its start to its result
    cache = json.loads((folder / "cache.json").read_text())
    return {
        "seconds": seconds,
        "latency_seconds": between(told, "latency:", "teacher cache:"),
        "finalists_seconds": between(told, "finalists:", "sweep kd_sweep:"),
        "cache": cache,
        "trials_seconds": ended - begun,
        "around_a_trial_s": (THREADS * (ended - begun) - at_work) / len(results),
        "startup_s": [r["metrics"]["startup_s"] for r in sorted(done, key=lambda r: r["number"])],
        "scores": {name_in(folder / "trials" / r["key"]): r["test"]["bleu"] for r in done},
        "not_done": {
            name_in(folder / "trials" / r["key"]): f"{r['status']}: {r['reason']}" for r in results if r not in done
        },
    }


def between(told: list[tuple[float, str]], first: str, then: str) -> float:
    """Seconds from the line that starts with `first` to the next that starts with `then`."""
    begun = next(at for at, line in told if line.startswith(first))
    return next(at for at, line in told if at >= begun and line.startswith(then)) - begun


def name_in(trial: Path) -> str:
    """`trial_name` of a trial's folder."""
    return trial_name(Run.model_validate_json((trial / "run.json").read_text()))


def trial_name(run: Run) -> str:
    """The values that tell the trials apart."""
    return f"{run.student.size}, alpha_hidden {run.loss.alpha_hidden:g}, lr {run.training.learning_rate:g}"


# The released code's way


def released(run: Run, inputs: RunInputs) -> dict[str, float]:
    """One run: seconds and the test score of the checkpoint with the best validation."""
    torch.manual_seed(run.training.seed)
    torch.set_num_threads(THREADS)
    assert run.teacher is not None
    teacher = open_teacher(run.teacher, run.dataset)
    started = time.monotonic()
    student, layers = make_student(run, teacher)
    freeze(student, resolve_frozen_parts(run, layers))
    material = load_tokenized_data(run, None, teacher.tokenizer, student.config)
    examples = make_examples(run, material, teacher.tokenizer, inputs.label_folders)
    settings = run.training
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    per_epoch = -(-len(examples) // settings.batch_size)
    total = round(per_epoch * settings.epochs)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: optimizer_step.learning_rate_factor(step, settings, total)
    )
    beam = resolve_decoding(run.decoding, student.generation_config, None, material.max_target_tokens)
    best, kept, done = -1.0, {}, 0
    while done < total:
        order = torch.randperm(len(examples)).tolist()
        for at in range(0, len(order), settings.batch_size):
            student.train()
            student.get_encoder().eval()
            rows = order[at : at + settings.batch_size]
            labels = pad_to_tensor([examples.targets[i] for i in rows], -100)
            sources = [examples.sources[examples.source_indices[i]] for i in rows]
            ids, mask = pad_to_tensor(sources, student.config.pad_token_id), make_attention_mask(sources)
            optimizer.zero_grad()
            with torch.no_grad():
                encoded = student.get_encoder()(ids, mask)
                # Labels would make transformers work out a cross-entropy that nobody uses.
                more: dict[str, Any] = {
                    "decoder_input_ids": families.shift_right(student, labels),
                    "attention_mask": mask,
                }
                more |= {"encoder_outputs": encoded, "output_hidden_states": True, "use_cache": False}
                theirs = teacher.model(**more)
            ours = student(**more)
            kd_loss(ours, theirs, labels, layers.supervised_decoder, run.loss).backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.gradient_clip)
            optimizer.step()
            schedule.step()
            done += 1
            if done >= total:
                break
        found = by_generate(student, teacher.tokenizer, material, "validation", beam, 2, run)
        if found > best:
            best, kept = found, {name: value.clone() for name, value in student.state_dict().items()}
    student.load_state_dict(kept)
    for split in ("validation", "test"):
        last = by_generate(student, teacher.tokenizer, material, split, beam, beam.beams, run)
    return {"seconds": time.monotonic() - started, "bleu": last}


def by_generate(
    student: Any, tokenizer: Any, material: Any, split: str, beam: BeamSearchParams, beams: int, run: Run
) -> float:
    """BLEU of a split, written by transformers' generate."""
    corpus = material.corpora[split]
    engine = TransformersEngine(student, tokenizer, threads=THREADS)
    narrow = BeamSearchParams(**{**vars(beam), "beams": beams})
    texts = engine.generate(corpus.sources, narrow, max_source_tokens=material.max_source_tokens)
    return score("bleu", [hypotheses[0].text for hypotheses in texts], corpus.targets).metrics["bleu"]


# What each part brings


STEPS: list[tuple[str, dict[str, Any]]] = [
    ("the released way, in our loop", {}),
    ("+ teacher cache", {"teacher_cache": "full"}),
    ("+ length buckets", {"buckets": True}),
    ("+ CTranslate2 for validation", {"engine": "ctranslate2"}),
    ("+ bf16", {"precision": "bf16"}),
]


def one_by_one(run: Run, home: Path) -> Iterator[dict[str, Any]]:
    """The first trial alone with all threads, each line with one thing more, each in a process of its own."""
    switches: dict[str, Any] = {"teacher_cache": "off", "buckets": False, "engine": "transformers", "precision": "fp32"}
    for name, change in STEPS:
        switches |= change
        data = run.model_dump(mode="json")
        data["training"] |= {"teacher_cache": switches["teacher_cache"], "precision": switches["precision"]}
        data["training"]["threads"] = THREADS
        data["evaluation"]["engine"] = switches["engine"]
        asked = {"run": data, "buckets": switches["buckets"], "cache": str(home / "ladder-cache")}
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.kd_sweep", "--one", json.dumps(asked)],
            env={**os.environ, "RAYDISTILL_HOME": str(home)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        yield {"what": name, **json.loads(done.stdout.strip().splitlines()[-1])}


def one(asked: dict[str, Any]) -> dict[str, Any]:
    """One run in this process; its cache is made before the clock starts and told apart."""
    torch.set_num_threads(THREADS)
    run = Run.model_validate(asked["run"])
    if not asked["buckets"]:
        optimizer_step.epoch_batches = random_batches
    inputs = RunInputs(cache_root=Path(asked["cache"]))
    first = run.model_copy(update={"training": run.training.model_copy(update={"max_steps": 1, "warmup_steps": 0})})
    before = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        train(first, Path(folder) / "warm", lambda m, f: None, inputs)  # libraries, corpora, the cache
        warm = time.monotonic() - before
        started = time.monotonic()
        lines: list[dict[str, Any]] = []
        result = train(run, Path(folder) / "run", lambda m, f: lines.append(m), inputs)
        seconds = time.monotonic() - started
    last = lines[-1]
    step_ms = statistics.mean(line["step_ms"] for line in lines)
    return {
        "seconds": seconds,
        "before": warm,
        "steps": result["steps"],
        "step_ms": step_ms,
        "data_wait": max(line["data_wait"] for line in lines),
        "val_loss": last["val_loss"],
        "bleu": result["test"]["bleu"],
        "startup_s": result["metrics"]["startup_s"],
    }


def random_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """All examples once, in random batches whatever their lengths."""
    order = list(range(len(lengths)))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def compare(options: argparse.Namespace) -> None:
    """The ladder and both sides; writes benchmarks/results/kd_sweep.md, and what is there so far as PARTIAL."""
    machine = describe_machine()
    data: dict[str, Any] = {"options": vars(options), "one_by_one": [], "released": {}}
    with tempfile.TemporaryDirectory(dir=options.work) as place:
        home = Path(place)
        space = home / "space.yaml"
        space.write_text(yaml.safe_dump(space_of(options)))
        os.environ["RAYDISTILL_HOME"] = str(home / "sweep")
        runs = corner_runs(Space.model_validate(space_of(options)))[: options.trials]
        for row in one_by_one(runs[0], home / "ladder"):
            data["one_by_one"].append(row)
            keep_partial(data, row)
        data["ours"] = the_sweep(space, home / "sweep")
        keep_partial(data, data["ours"])
        for run in runs:
            data["released"][trial_name(run)] = found = released(run, RunInputs())
            keep_partial(data, {trial_name(run): found})
    write_result(
        "kd_sweep", "A sweep of KD trials against the same runs one after another", as_markdown(data), data, machine
    )
    PARTIAL.unlink()


def keep_partial(data: dict[str, Any], latest: Any) -> None:
    """Write what is there so far, so that a fault in a later stage loses none of it; and say the latest."""
    write_json_atomic(PARTIAL, data)
    print(json.dumps(latest), file=sys.stderr)


def as_markdown(data: dict[str, Any]) -> str:
    """Times, scores side by side, the ladder."""
    ours, theirs = data["ours"], data["released"]
    total = sum(run["seconds"] for run in theirs.values())
    failures = [
        f"Not done in the sweep, so the work is unequal: {name}: {why}" for name, why in ours["not_done"].items()
    ]
    shared = [name for name in theirs if name in ours["scores"]]
    gaps = [ours["scores"][name] - theirs[name]["bleu"] for name in shared]
    groups = ours["cache"]["groups"].values()
    passes = sum(sum(group["device_seconds"].values()) for group in groups)
    same_work = ours["seconds"] - ours["latency_seconds"] - ours["finalists_seconds"]
    lines = [
        f"{len(theirs)} trials of {data['options']['epochs']} epochs, {data['options']['train_rows']} rows.",
        "",
        "| side | seconds |",
        "|---|---|",
        f"| the released code's way, {len(theirs)} runs | {total:.0f} |",
        f"| `raydistill sweep`, the whole command | {ours['seconds']:.0f} |",
        f"| of it the latency table, which the other side does not make | {ours['latency_seconds']:.0f} |",
        f"| of it the finalists served and timed, which it does not either | {ours['finalists_seconds']:.0f} |",
        f"| of it the trials | {ours['trials_seconds']:.0f} |",
        f"| of it the teacher pass, device-seconds | {passes:.0f} |",
        f"| **ratio for the same work** (promised: 3) | **{total / same_work:.2f}** |",
        f"| ratio for the whole command | {total / ours['seconds']:.2f} |",
        "",
        f"Teacher cache: {'; '.join(group['keep'] + ': ' + group['why'] for group in groups)}.",
        "",
        f"Seconds of a trial that its run does not see (Ray, the search): {ours['around_a_trial_s']:.1f}, which is "
        f"{100 * ours['around_a_trial_s'] / 300:.1f} % of a trial of 5 minutes. Start-up to the first step, s: "
        f"{', '.join(f'{s:.1f}' for s in ours['startup_s'])}.",
        "",
        score_gap(gaps),
        "",
        *[line for failure in failures for line in (failure, "")],
        "| trial | released: s | BLEU | ours: BLEU |",
        "|---|---|---|---|",
        *[f"| {n} | {theirs[n]['seconds']:.0f} | {theirs[n]['bleu']:.2f} | {ours['scores'][n]:.2f} |" for n in shared],
        "",
        "One run alone, with all threads:",
        "",
        "| what | s | step, ms | data wait, at most | BLEU |",
        "|---|---|---|---|---|",
    ]
    for r in data["one_by_one"]:
        wait = f"{100 * r['data_wait']:.1f} %"
        lines.append(f"| {r['what']} | {r['seconds']:.1f} | {r['step_ms']:.0f} | {wait} | {r['bleu']:.2f} |")
    return "\n".join(lines)


def score_gap(gaps: list[float]) -> str:
    """Mean and spread of the scores' differences; needs two trials for a spread."""
    if len(gaps) < 2:
        return f"BLEU on test was compared for {len(gaps)} trials only."
    mean, spread = statistics.mean(gaps), statistics.stdev(gaps)
    return f"BLEU on test, ours less theirs, {len(gaps)} trials: mean {mean:+.2f}, standard deviation {spread:.2f}."


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--teacher")
    parser.add_argument("--data")
    parser.add_argument("--train-rows", type=int, default=2000)
    parser.add_argument("--validation-rows", type=int, default=200)
    parser.add_argument("--test-rows", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--work", help="a folder for what is made; default: the system's for temporary files")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(json.loads(options.one))))
    elif options.teacher and options.data:
        compare(options)
    else:
        parser.error("--teacher and --data are needed")


if __name__ == "__main__":
    main()
