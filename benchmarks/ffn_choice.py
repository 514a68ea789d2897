"""The choice of feed-forward units, by activation and at random: scores after equal training, with several seeds.

    python -m benchmarks.ffn_choice --teacher ../shared/teachers/multi30k-marian-6-6 \
        --data ../shared/data/multi30k_en_de --sizes 6-6 6-3 --share 0.25 --seeds 3
    python -m benchmarks.ffn_choice --teacher demo --data demo --sizes 4-4 --share 0.25 --steps 40

The demo teacher is trained by `raydistill train demo`. Both choices take the same steps on the same batches; a student
with all units takes them too, as the upper bound. The loss before training shows what the choice alone does.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, BenchmarkResult, describe_machine
from raydistill.config.run import Run
from raydistill.results.tables import markdown_table
from raydistill.training.inputs import RunInputs
from raydistill.training.run import train

CHOICES = ("activation", "random", "all")


def make_run(options: argparse.Namespace, size: str, choice: str, seed: int) -> Run:
    """A run that trains a student of this size whose units are chosen by `choice`, or all kept."""
    student: dict[str, Any] = {"size": size}
    if choice != "all":
        student |= {"encoder_ffn": options.share, "decoder_ffn": options.share, "ffn_choice": choice}
    rows = {"train_rows": options.train_rows, "validation_rows": options.score_rows, "test_rows": options.score_rows}
    return Run.model_validate(
        {
            "name": f"{size}-{choice}-{seed}",
            "teacher": _path(options.teacher),
            "dataset": {"name": _path(options.data), **rows, "max_source_tokens": 64, "max_target_tokens": 64},
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
                "freeze_encoder": False,  # in all students: a pruned encoder is trained
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
    untrained = run.training.model_copy(update={"max_steps": 1, "learning_rate": 1e-12, "warmup_steps": 0})
    before = train(run.model_copy(update={"training": untrained}), scratch / f"{run.name}-before", _ignore, inputs)
    result = train(run, scratch / run.name, _ignore, inputs)
    assert before is not None
    assert result is not None
    assert result.test is not None
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


def _ignore(_metrics: dict[str, Any], _folder: Path | None) -> None:
    """A report callback that never stops the run."""


def compare(options: argparse.Namespace) -> None:
    """Train every student, and write benchmarks/results/ffn_choice.md."""
    torch.set_num_threads(os.cpu_count() or 1)
    machine = describe_machine()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.work) as scratch:
        for size, seed, choice in itertools.product(options.sizes, range(options.seeds), CHOICES):
            rows.append(train_student(make_run(options, size, choice, seed), choice, Path(scratch)))
            print(json.dumps(rows[-1]), file=sys.stderr)
    title = "Feed-forward units chosen by activation and at random"
    print(BenchmarkResult("ffn_choice", title, as_markdown(rows, options.share), rows, machine).write(options.results))


def as_markdown(rows: list[dict[str, Any]], share: float) -> str:
    """A table of means over seeds, and the paired differences of activation and random."""
    lines = [f"Share of units kept on both sides: {share:g}.", ""]
    header = ["size", "units", "M params", "untrained loss", "validation loss", "test BLEU", "seeds"]
    lines.append(markdown_table(header, list(_table_rows(rows))))
    for size in dict.fromkeys(row["size"] for row in rows):
        by_choice = {choice: _select(rows, size, choice) for choice in ("activation", "random")}
        pairs = zip(*by_choice.values(), strict=True)
        gaps = [first["bleu"] - second["bleu"] for first, second in pairs]
        lines += [
            "",
            f"{size}: BLEU, activation minus random: {statistics.mean(gaps):+.2f} on average over {len(gaps)} seeds "
            f"({', '.join(f'{gap:+.2f}' for gap in gaps)}).",
        ]
    return "\n".join(lines)


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
    parser.add_argument("--steps", type=int, default=681, help="optimiser steps of each student; default: 681")
    parser.add_argument("--train-rows", type=int, help="default: all")
    parser.add_argument("--score-rows", type=int, default=500, help="rows of validation and of test; default: 500")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds; default: 3")
    parser.add_argument("--work", help="folder for temporary files; default: the system's")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the result; default: benchmarks/results"
    )
    compare(parser.parse_args())


if __name__ == "__main__":
    main()
