"""Which dimension of a BART costs time: one forward pass of many random shapes, and a linear regression (section 6.4).

The paper timed 12,000 shapes on a GPU in half precision and found a decoder layer to add 8 % and an encoder layer 4 %,
and width and feed-forward size next to nothing. Shapes are drawn evenly; the paper does not say from where.

    python -m benchmarks.inference_time --configs 500           # two CPU threads: about 40 minutes
    python -m benchmarks.inference_time --configs 12000 --device cuda

Every timing is kept as it is made, so that the same command goes on where a killed one was.
"""

import argparse
import json
import os
import random
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from transformers import BartConfig, BartForConditionalGeneration

from benchmarks.common import describe_machine, write_result
from raydistill.core.console import ProgressBar
from raydistill.core.paths import raydistill_home
from raydistill.evaluation.latency import Repetition, time_calls
from raydistill.paper.published import LAYER_COST_PERCENT
from raydistill.results.tables import markdown_table

LAYERS = range(1, 13)
WIDTHS = (256, 512, 768, 1024)
FFNS = (1024, 2048, 3072, 4096)
HEAD_WIDTH = 64
# What one step of each regressor is, in the regression and in words.
UNITS = {"encoder": "a layer", "decoder": "a layer", "ffn": "1,000 wider", "width": "100 wider"}
SCALES = {"encoder": 1.0, "decoder": 1.0, "ffn": 1000.0, "width": 100.0}


@dataclass(frozen=True)
class Shape:
    """A BART's dimensions: layers of encoder and decoder, feed-forward size, width."""

    encoder: int
    decoder: int
    ffn: int
    width: int


@dataclass(frozen=True)
class Coefficient:
    """What one step of a dimension adds to the time, in per cent of the mean time, with its 95 % interval."""

    percent: float
    low: float
    high: float


def draw(seed: int, number: int) -> Shape:
    """The shape of a number: the same whenever it is asked, so that a run that goes on draws the rest."""
    rng = random.Random(f"{seed}:{number}")
    return Shape(rng.choice(LAYERS), rng.choice(LAYERS), rng.choice(FFNS), rng.choice(WIDTHS))


def time_shape(shape: Shape, asked: argparse.Namespace) -> float:
    """Milliseconds of a forward pass of a randomly initialised BART, the median."""
    config = BartConfig(
        d_model=shape.width,
        encoder_layers=shape.encoder,
        decoder_layers=shape.decoder,
        encoder_ffn_dim=shape.ffn,
        decoder_ffn_dim=shape.ffn,
        encoder_attention_heads=shape.width // HEAD_WIDTH,
        decoder_attention_heads=shape.width // HEAD_WIDTH,
    )
    dtype = torch.float16 if asked.device == "cuda" else torch.float32
    with torch.device(asked.device):
        model = torch.nn.Module.to(BartForConditionalGeneration(config), dtype).eval()
        source = torch.randint(4, config.vocab_size, (asked.batch, asked.source))
        target = torch.randint(4, config.vocab_size, (asked.batch, asked.target))

    def call() -> None:
        with torch.inference_mode():
            model(input_ids=source, decoder_input_ids=target, use_cache=False)
        if asked.device == "cuda":
            torch.cuda.synchronize()

    return time_calls(call, Repetition(asked.repeats, min_seconds=0.0)).median_ms


def regress(shapes: list[Shape], times: np.ndarray) -> tuple[dict[str, Coefficient], float]:
    """Least squares of the time on all dimensions and a constant; coefficients by dimension, and R squared.

    Intervals are of Student's t with standard errors that allow for larger spread at larger shapes (HC1: White 1980
    with MacKinnon and White's (1985) correction for degrees of freedom). ValueError for fewer shapes than unknowns.
    """
    columns = [np.array([getattr(s, name) for s in shapes]) / SCALES[name] for name in SCALES]
    design = np.column_stack([np.ones(len(shapes)), *columns])
    free = len(shapes) - design.shape[1]
    if free < 1 or np.linalg.matrix_rank(design) < design.shape[1]:
        raise ValueError(f"{len(shapes)} shapes are too few, or too much alike, to tell the dimensions apart")
    inverse = np.linalg.inv(design.T @ design)
    found = inverse @ design.T @ times
    residuals = times - design @ found
    covariance = inverse @ (design.T * residuals**2 @ design) @ inverse * len(shapes) / free
    spread = stats.t.ppf(0.975, free) * np.sqrt(np.diag(covariance))
    scale = 100 / times.mean()
    coefficients = {
        name: Coefficient(scale * value, scale * (value - wide), scale * (value + wide))
        for name, value, wide in zip(SCALES, found[1:], spread[1:], strict=True)
    }
    return coefficients, 1 - float(residuals @ residuals) / float(((times - times.mean()) ** 2).sum())


def read_timings(path: Path) -> dict[int, float]:
    """Milliseconds by the shape's number; a torn last line, as a kill leaves it, is passed over."""
    found: dict[int, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
            found[int(row["number"])] = float(row["ms"])
        except (ValueError, KeyError):
            continue
    return found


def time_missing(path: Path, asked: argparse.Namespace) -> dict[int, float]:
    """Time the shapes that the file lacks, each kept at once; returns all that were asked for."""
    found = read_timings(path)
    missing = [n for n in range(asked.configs) if n not in found]
    path.parent.mkdir(parents=True, exist_ok=True)
    bar = ProgressBar("shapes", asked.configs, asked.configs - len(missing))
    with path.open("a", encoding="utf-8") as file:
        file.write("\n")  # so that a torn line stays alone
        for number in missing:
            shape = draw(asked.seed, number)
            found[number] = time_shape(shape, asked)
            file.write(json.dumps({"number": number, **asdict(shape), "ms": found[number]}) + "\n")
            file.flush()
            os.fsync(file.fileno())
            bar.advance(1, f"{found[number]:.0f} ms")
    bar.close()
    return {n: found[n] for n in range(asked.configs)}


def markdown(coefficients: dict[str, Coefficient], fit: float, times: np.ndarray, asked: argparse.Namespace) -> str:
    """The table of coefficients and what it is of."""
    rows = [
        [
            f"{name}: {UNITS[name]}",
            f"{c.percent:+.2f} % [{c.low:+.2f}, {c.high:+.2f}]",
            f"+{LAYER_COST_PERCENT[name]:.0f} %" if name in LAYER_COST_PERCENT else "negligible",
        ]
        for name, c in coefficients.items()
    ]
    about = (
        f"{asked.configs} shapes (1 to 12 layers a side, widths {WIDTHS}, feed-forward {FFNS}), {asked.source} source "
        f"and {asked.target} target tokens, batch {asked.batch}, one forward pass, median of {asked.repeats}. Mean "
        f"{times.mean():.0f} ms, median {statistics.median(times):.0f} ms. Linear regression, R squared {fit:.3f}; "
        f"coefficients in per cent of the mean time with 95 % intervals. The paper's are on a GPU in half precision."
    )
    return f"{about}\n\n{markdown_table(['dimension', 'ours', 'the paper'], rows)}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=int, default=500)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--source", type=int, default=128, help="source tokens")
    parser.add_argument("--target", type=int, default=32, help="target tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(asked.seed)
    machine = describe_machine(asked.device)
    about = (
        f"{asked.device}-{asked.threads}-b{asked.batch}-{asked.source}-{asked.target}-r{asked.repeats}-s{asked.seed}"
    )
    path = raydistill_home() / "inference_time" / f"{about}.jsonl"
    started = time.monotonic()
    times = time_missing(path, asked)
    values = np.array([times[n] for n in range(asked.configs)])
    coefficients, fit = regress([draw(asked.seed, n) for n in range(asked.configs)], values)
    text = markdown(coefficients, fit, values, asked)
    print(text)
    data: dict[str, Any] = {
        "coefficients": {name: asdict(c) for name, c in coefficients.items()},
        "r_squared": fit,
        "seconds": time.monotonic() - started,
        "timings": [{**asdict(draw(asked.seed, n)), "ms": ms} for n, ms in times.items()],
    }
    write_result("inference_time", "Inference time by a BART's dimensions", text, data, machine, device=asked.device)


if __name__ == "__main__":
    main()
