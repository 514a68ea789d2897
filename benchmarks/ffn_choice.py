"""The choice of feed-forward units, by activation and at random: scores after equal training, and latency.

    python -m benchmarks.ffn_choice --teacher ../shared/teachers/multi30k-marian-6-6 \
        --data ../shared/data/multi30k_en_de --sizes 6-6 6-3 --share 0.25 --seeds 3
    python -m benchmarks.ffn_choice --teacher demo --data demo --sizes 4-4 --share 0.25 --steps 40

The demo teacher is trained by `raydistill train demo`. Both choices take the same steps on the same batches. So do two
students with all units, which are the upper bound: with a frozen encoder, which is the product's default for the whole
encoder, and with an encoder that is trained like the encoders of the pruned students. A trained encoder has its own
learning rate. The loss before training shows what the choice alone does.

The latency of the pruned students is timed in pairs with the students with all units, with outputs of fixed length, on
a machine that should do nothing else. Finished students and timings stay in the working folder; the same command
resumes after a kill.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, BenchmarkResult, describe_machine
from benchmarks.fixed_latency import FixedLengths, compare_fixed_lengths, open_checkpoint
from benchmarks.pieces import PartialResults, never_stop
from raydistill.config.run import Dataset, Run
from raydistill.data.corpus import read_corpus
from raydistill.results.tables import markdown_table
from raydistill.training.inputs import RunInputs
from raydistill.training.run import train

ALL, ALL_FROZEN = "all, encoder trained", "all, encoder frozen"
CHOICES = ("activation", "random", ALL, ALL_FROZEN)
PRECISIONS, BEAMS = ("fp32", "int8"), (1, 4)  # of the timings
TIMED_ROWS = 128
MAX_TOKENS = 64


def make_run(options: argparse.Namespace, size: str, choice: str, seed: int) -> Run:
    """A run that trains a student of this size whose units are chosen by `choice`, or all kept."""
    student: dict[str, Any] = {"size": size}
    if choice not in (ALL, ALL_FROZEN):
        student |= {"encoder_ffn": options.share, "decoder_ffn": options.share, "ffn_choice": choice}
    rows = {"train_rows": options.train_rows, "validation_rows": options.score_rows, "test_rows": options.score_rows}
    return Run.model_validate(
        {
            "name": f"{size}-{choice.replace(', encoder ', '-')}-{seed}",
            "teacher": _path(options.teacher),
            "dataset": {
                "name": _path(options.data),
                **rows,
                "max_source_tokens": MAX_TOKENS,
                "max_target_tokens": MAX_TOKENS,
            },
            "method": options.method,
            "student": student,
            "loss": {"normalize_hidden": True},
            "training": {
                "learning_rate": options.learning_rate,
                "batch_size": 64,
                "epochs": 1000,
                "max_steps": options.steps,
                "warmup_steps": min(100, options.steps // 4),
                "checks_per_epoch": 1,
                "patience": 10_000,
                "dropout": 0.1,
                "freeze_encoder": choice == ALL_FROZEN,  # a pruned encoder is trained
                "encoder_learning_rate": options.encoder_learning_rate,
                "seed": seed,
                "threads": os.cpu_count(),
            },
            "evaluation": {"metric": "bleu"},
        }
    )


def _path(name: str) -> str:
    return str(Path(name).absolute()) if "/" in name else name


def train_student(run: Run, choice: str, scratch: Path) -> dict[str, Any]:
    """Train a student; returns its scores, and its validation loss after a single step of a tiny learning rate."""
    start = time.monotonic()
    inputs = RunInputs(cache_root=scratch / "cache")
    tiny = {"learning_rate": 1e-12, "encoder_learning_rate": 1e-12}
    untrained = run.training.model_copy(update={"max_steps": 1, "warmup_steps": 0, **tiny})
    before = train(run.model_copy(update={"training": untrained}), scratch / f"{run.name}-before", never_stop, inputs)
    result = train(run, scratch / run.name, never_stop, inputs)
    assert before is not None
    assert result is not None
    if result.test is None:
        raise SystemExit(f"{run.name}: {result.reason}")
    return {
        "size": run.student.size,
        "choice": choice,
        "seed": run.training.seed,
        "seconds": time.monotonic() - start,
        "steps": result.steps,
        "untrained_loss": before.metrics["val_loss"],
        "val_loss": result.metrics["val_loss"],
        "bleu": result.test.metrics["bleu"],
        "params_m": result.metrics["params_m"],
    }


def time_students(options: argparse.Namespace, size: str, precision: str, beams: int) -> dict[str, Any]:
    """The latency of a student with a share of the units, divided by the latency with all units, both of seed 0.

    Only the number of units matters for the latency, and not their choice.
    """
    dataset = Dataset.model_validate({"name": _path(options.data), "test_rows": TIMED_ROWS})
    lengths = FixedLengths(tuple(read_corpus(dataset, "test").sources), options.tokens, options.seconds)
    full, pruned = (
        (open_checkpoint(folder / "best", precision, 1, folder), beams)
        for folder in (options.work / make_run(options, size, choice, 0).name for choice in (ALL, "random"))
    )
    timing = compare_fixed_lengths(full, pruned, lengths)
    measured = {"ratio": timing.ratio, "interval": timing.interval, "stop_reason": timing.stop_reason}
    return {"size": size, "precision": precision, "beams": beams, **measured}


def compare(options: argparse.Namespace) -> None:
    """Train and time every student, and write benchmarks/results/ffn_choice.md."""
    torch.set_num_threads(os.cpu_count() or 1)
    machine = describe_machine()
    path = options.work / "measured.json"
    names = ("teacher", "data", "share", "method", "learning_rate", "encoder_learning_rate", "steps", "train_rows")
    settings = {name: getattr(options, name) for name in (*names, "score_rows", "tokens")}
    results = PartialResults.open(path, settings)
    rows: list[dict[str, Any]] = []
    for size, seed, choice in itertools.product(options.sizes, range(options.seeds), CHOICES):
        row = results.find(size=size, seed=seed, choice=choice)
        if row is None:
            row = train_student(make_run(options, size, choice, seed), choice, options.work)
            results = results.add(path, row)
            print(json.dumps(row), file=sys.stderr)
        rows.append(row)
    timings: list[dict[str, Any]] = []
    for size, precision, beams in itertools.product(options.sizes, PRECISIONS, BEAMS):
        timing = results.find(size=size, precision=precision, beams=beams)
        if timing is None:
            timing = time_students(options, size, precision, beams)
            results = results.add(path, timing)
        timings.append(timing)
    text = f"{as_markdown(rows, options.share)}\n\n{latency_table(timings, options.tokens)}"
    data = {"students": rows, "timings": timings}
    title = "Feed-forward units chosen by activation and at random"
    print(BenchmarkResult("ffn_choice", title, text, data, machine).write(options.results))


def as_markdown(rows: list[dict[str, Any]], share: float) -> str:
    """A table of means over seeds, and the paired differences of the choices."""
    lines = [f"Share of units kept on both sides: {share:g}.", ""]
    header = ["size", "units", "M params", "untrained loss", "validation loss", "test BLEU", "seeds"]
    lines.append(markdown_table(header, list(_table_rows(rows))))
    for size in dict.fromkeys(row["size"] for row in rows):
        lines.append("")
        for first, second in (("activation", "random"), ("random", ALL_FROZEN), ("random", ALL)):
            lines.append(f"- {size}: BLEU, {first} minus {second}: {_differences(rows, size, first, second)}")
    return "\n".join(lines)


def _differences(rows: list[dict[str, Any]], size: str, first: str, second: str) -> str:
    """The mean difference of two choices, and the difference of each seed."""
    pairs = zip(_select(rows, size, first), _select(rows, size, second), strict=True)
    gaps = [left["bleu"] - right["bleu"] for left, right in pairs]
    by_seed = ", ".join(f"{gap:+.2f}" for gap in gaps)
    return f"{statistics.mean(gaps):+.2f} on average over {len(gaps)} seeds ({by_seed})."


def latency_table(timings: list[dict[str, Any]], tokens: int) -> str:
    """A table of the latencies of pruned students, as shares of the latencies of students with all units."""
    cells = []
    for timing in timings:
        ratio, interval = timing["ratio"], timing["interval"]
        ends = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else f" ({timing['stop_reason']})"
        label = timing["stop_reason"] if ratio is None else f"{ratio:.3f}{ends}"
        cells.append([timing["size"], timing["precision"], str(timing["beams"]), label])
    note = (
        f"Latency of a batch of 32 rows, {tokens} source and {tokens} output tokens, one thread, over a student with "
        f"all units, with 95 % intervals:"
    )
    return f"{note}\n\n{markdown_table(['size', 'precision', 'beams', 'latency'], cells)}"


def _table_rows(rows: list[dict[str, Any]]) -> Iterable[list[str]]:
    for size, choice in itertools.product(dict.fromkeys(row["size"] for row in rows), CHOICES):
        group = _select(rows, size, choice)
        means = {name: statistics.mean(row[name] for row in group) for name in ("untrained_loss", "val_loss", "bleu")}
        losses = [f"{means['untrained_loss']:.3f}", f"{means['val_loss']:.3f}"]
        bleu = ", ".join(f"{row['bleu']:.2f}" for row in group)
        yield [size, choice, f"{group[0]['params_m']:.2f}", *losses, f"{means['bleu']:.2f} ({bleu})", str(len(group))]


def _select(rows: list[dict[str, Any]], size: str, choice: str) -> list[dict[str, Any]]:
    """The rows of a size and a choice, by seed."""
    return [row for row in rows if (row["size"], row["choice"]) == (size, choice)]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="the teacher's folder, or demo")
    parser.add_argument("--data", required=True, help="the folder of the data set, or demo")
    parser.add_argument("--sizes", nargs="+", default=["6-6", "6-3"], help="default: 6-6 6-3")
    parser.add_argument("--share", type=float, default=0.25, help="share of units to keep; default: 0.25")
    parser.add_argument("--method", choices=["sft", "kd"], default="sft", help="default: sft")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="default: 2e-3")
    parser.add_argument(
        "--encoder-learning-rate", type=float, default=1e-3, help="of every trained encoder; default: 1e-3"
    )
    parser.add_argument("--steps", type=int, default=681, help="optimiser steps of each student; default: 681")
    parser.add_argument("--train-rows", type=int, help="default: all")
    parser.add_argument("--score-rows", type=int, default=500, help="rows of validation and of test; default: 500")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds; default: 3")
    parser.add_argument("--tokens", type=int, default=16, help="source and output tokens of a timed row; default: 16")
    parser.add_argument("--seconds", type=float, default=90.0, help="longest time of a comparison; default: 90")
    parser.add_argument("--work", type=Path, default=Path("outputs/ffn_choice"), help="folder of the students")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the result; default: benchmarks/results"
    )
    compare(parser.parse_args())


if __name__ == "__main__":
    main()
