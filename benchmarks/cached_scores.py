"""Students from the cache and students with a live teacher: the same scores, but for noise; three seeds on Multi30k.

    python -m benchmarks.cached_scores --teacher ../shared/teachers/multi30k-marian-6-6 \
        --data ../shared/data/multi30k_en_de --train-rows 4000
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import describe_machine, write_result
from raydistill.config.run import Run
from raydistill.training.inputs import Inputs
from raydistill.training.run import train


def run_of(options: argparse.Namespace, seed: int, cache: str) -> Run:
    """A KD student of 6-2."""
    return Run.model_validate(
        {
            "name": f"seed-{seed}-{cache}",
            "teacher": str(Path(options.teacher).absolute()),
            "dataset": {
                "name": str(Path(options.data).absolute()),
                "train_rows": options.train_rows,
                "validation_rows": options.score_rows,
                "test_rows": options.score_rows,
                "max_source_tokens": 64,
                "max_target_tokens": 64,
            },
            "method": "kd",
            "student": {"size": "6-2"},
            "loss": {"normalize_hidden": True},
            "training": {
                "learning_rate": 5e-4,
                "batch_size": 64,
                "epochs": options.epochs,
                "warmup_steps": 20,
                "checks_per_epoch": 1,
                "patience": 99,
                "dropout": 0.1,
                "seed": seed,
                "threads": os.cpu_count(),
                "teacher_cache": cache,
            },
            "evaluation": {"metric": "bleu"},
        }
    )


def compare(options: argparse.Namespace) -> None:
    """Train both for each seed; writes benchmarks/results/cached_scores.md."""
    torch.set_num_threads(os.cpu_count() or 1)
    machine = describe_machine()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.work) as place:
        for seed in range(options.seeds):
            for cache in ("full", "off"):
                started = time.monotonic()
                run = run_of(options, seed, cache)
                result = train(run, Path(place) / run.name, lambda m, f: None, Inputs(cache=Path(place) / "cache"))
                seconds = time.monotonic() - started
                metrics = result["metrics"]
                found = {"val_loss": metrics["val_loss"], "bleu": result["test"]["bleu"]}
                rows.append({"seed": seed, "cache": cache, "seconds": seconds, **found})
                print(json.dumps(rows[-1]), file=sys.stderr)
    write_result("cached_scores", "Cached and uncached students", as_markdown(rows), rows, machine)


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """Scores by seed, and the mean difference beside the spread between seeds."""
    by = {cache: [row for row in rows if row["cache"] == cache] for cache in ("full", "off")}
    lines = [
        "| seed | cached: BLEU | validation loss | live: BLEU | validation loss |",
        "|---|---|---|---|---|",
    ]
    for a, b in zip(by["full"], by["off"], strict=True):
        lines.append(f"| {a['seed']} | {a['bleu']:.2f} | {a['val_loss']:.4f} | {b['bleu']:.2f} | {b['val_loss']:.4f} |")
    for what in ("bleu", "val_loss"):
        gaps = [a[what] - b[what] for a, b in zip(by["full"], by["off"], strict=True)]
        spread = statistics.stdev([row[what] for row in by["off"]]) if len(gaps) > 1 else float("nan")
        lines += [
            "",
            f"{what}: cached less live {statistics.mean(gaps):+.4f} on average ({min(gaps):+.4f} to {max(gaps):+.4f}); "
            f"standard deviation between seeds, live: {spread:.4f}.",
        ]
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--train-rows", type=int, default=4000)
    parser.add_argument("--score-rows", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", help="a folder for what is made; default: the system's for temporary files")
    compare(parser.parse_args())


if __name__ == "__main__":
    main()
