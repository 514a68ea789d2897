"""Scores of KD students trained from the teacher cache, in int8 and bf16, and with a live teacher, with several seeds.

    python -m benchmarks.cached_scores --teacher ../shared/teachers/multi30k-marian-6-6 \
        --data ../shared/data/multi30k_en_de --train-rows 6000

The result is written after every seed, so that a later failure does not lose the earlier seeds.
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

from benchmarks.common import BenchmarkResult, describe_machine
from raydistill.config.run import Run
from raydistill.training.inputs import RunInputs
from raydistill.training.run import train

SIDES = ("int8", "bf16", "live")  # precision of the cache, or a teacher that runs with every step


def make_run(options: argparse.Namespace, seed: int, cache: str) -> Run:
    """A run that trains a 6-2 student by KD."""
    cache_settings = (
        {"teacher_cache": "off"} if cache == "live" else {"teacher_cache": "full", "cache_precision": cache}
    )
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
                **cache_settings,
            },
            "evaluation": {"metric": "bleu"},
        }
    )


def compare(options: argparse.Namespace) -> None:
    """Train with each cache and without a cache for each seed; write benchmarks/results/cached_scores.md each time."""
    torch.set_num_threads(os.cpu_count() or 1)
    machine = describe_machine()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.work) as scratch:
        inputs = RunInputs(cache_root=Path(scratch) / "cache")
        for seed in range(options.seeds):
            for cache in SIDES:
                start = time.monotonic()
                run = make_run(options, seed, cache)
                result = train(run, Path(scratch) / run.name, lambda metrics, folder: None, inputs)
                assert result is not None
                assert result.test is not None
                rows.append(
                    {
                        "seed": seed,
                        "cache": cache,
                        "seconds": time.monotonic() - start,
                        "val_loss": result.metrics["val_loss"],
                        "bleu": result.test.metrics["bleu"],
                    }
                )
                print(json.dumps(rows[-1]), file=sys.stderr)
            title = "Students trained from the cache and with a live teacher"
            BenchmarkResult("cached_scores", title, as_markdown(rows), rows, machine).write()


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """A table of scores by seed, and the mean differences with the standard deviation between seeds."""
    by_side = {side: [row for row in rows if row["cache"] == side] for side in SIDES}
    lines = [
        f"| seed | {' | '.join(f'{side}: BLEU | validation loss' for side in SIDES)} |",
        "|---|" + "---|---|" * len(SIDES),
    ]
    for of_seed in zip(*by_side.values(), strict=True):
        cells = (f"{row['bleu']:.2f} | {row['val_loss']:.4f}" for row in of_seed)
        lines.append(f"| {of_seed[0]['seed']} | {' | '.join(cells)} |")
    for measure in ("bleu", "val_loss"):
        live = [row[measure] for row in by_side["live"]]
        spread = statistics.stdev(live) if len(live) > 1 else float("nan")
        for a, b in (("int8", "bf16"), ("int8", "live"), ("bf16", "live")):
            gaps = [x[measure] - y[measure] for x, y in zip(by_side[a], by_side[b], strict=True)]
            lines += [
                "",
                f"{measure}: {a} minus {b} {statistics.mean(gaps):+.4f} on average ({min(gaps):+.4f} to "
                f"{max(gaps):+.4f}); standard deviation between seeds with a live teacher: {spread:.4f}.",
            ]
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="the teacher's folder")
    parser.add_argument("--data", required=True, help="the folder of the data set")
    parser.add_argument("--train-rows", type=int, default=4000, help="default: 4000")
    parser.add_argument("--score-rows", type=int, default=500, help="rows of validation and of test; default: 500")
    parser.add_argument("--epochs", type=int, default=2, help="default: 2")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds; default: 3")
    parser.add_argument("--work", help="folder for temporary files; default: the system's")
    compare(parser.parse_args())


if __name__ == "__main__":
    main()
