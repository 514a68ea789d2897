"""Cost of each dimension of a BART: forward passes of many random shapes, and a linear regression (section 6.4).

The paper timed 12,000 shapes on a GPU in half precision: a decoder layer adds 8 %, an encoder layer 4 %, width and
feed-forward size next to nothing. Shapes are drawn uniformly here; the paper does not give their distribution.

    python -m benchmarks.inference_time --configs 500           # two CPU threads: about 40 minutes
    python -m benchmarks.inference_time --configs 12000 --device cuda

Each timing is saved at once; the same command resumes an interrupted benchmark.
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

from benchmarks.common import BenchmarkResult, describe_machine, device_suffix
from raydistill.core.console import ProgressBar
from raydistill.core.paths import raydistill_home
from raydistill.evaluation.latency import Repetition, time_calls
from raydistill.results.tables import markdown_table

LAYERS = range(1, 13)
WIDTHS = (256, 512, 768, 1024)
FFNS = (1024, 2048, 3072, 4096)
HEAD_WIDTH = 64
# The step of each regressor, as a description and as a number.
UNITS = {"encoder": "a layer", "decoder": "a layer", "ffn": "1,000 wider", "width": "100 wider"}
SCALES = {"encoder": 1.0, "decoder": 1.0, "ffn": 1000.0, "width": 100.0}
# The paper, section 6.4: increase of latency per additional layer in per cent, over 12,000 BART shapes on a GPU in half
# precision.
LAYER_COST_PERCENT = {"decoder": 8.0, "encoder": 4.0}


@dataclass(frozen=True)
class Shape:
    """Dimensions of a BART: encoder layers, decoder layers, feed-forward size and width."""

    encoder: int
    decoder: int
    ffn: int
    width: int


@dataclass(frozen=True)
class Coefficient:
    """Increase of the time by one step of a dimension, in percent of the mean time, with the 95 % interval."""

    percent: float
    low: float
    high: float


def draw_shape(seed: int, number: int) -> Shape:
    """The random shape with a number; it depends on nothing else, so that a resumed benchmark draws the same shapes."""
    rng = random.Random(f"{seed}:{number}")
    return Shape(rng.choice(LAYERS), rng.choice(LAYERS), rng.choice(FFNS), rng.choice(WIDTHS))


def time_shape(shape: Shape, options: argparse.Namespace) -> float:
    """Median milliseconds of a forward pass of a randomly initialised BART."""
    config = BartConfig(
        d_model=shape.width,
        encoder_layers=shape.encoder,
        decoder_layers=shape.decoder,
        encoder_ffn_dim=shape.ffn,
        decoder_ffn_dim=shape.ffn,
        encoder_attention_heads=shape.width // HEAD_WIDTH,
        decoder_attention_heads=shape.width // HEAD_WIDTH,
    )
    dtype = torch.float16 if options.device == "cuda" else torch.float32
    with torch.device(options.device):
        model = torch.nn.Module.to(BartForConditionalGeneration(config), dtype).eval()
        source = torch.randint(4, config.vocab_size, (options.batch, options.source))
        target = torch.randint(4, config.vocab_size, (options.batch, options.target))

    def call() -> None:
        with torch.inference_mode():
            model(input_ids=source, decoder_input_ids=target, use_cache=False)
        if options.device == "cuda":
            torch.cuda.synchronize()

    return time_calls(call, Repetition(options.repeats, min_seconds=0.0)).median_ms


def regress(shapes: list[Shape], times: np.ndarray) -> tuple[dict[str, Coefficient], float]:
    """Least-squares regression of the time on all dimensions and a constant.

    Intervals use Student's t with heteroscedasticity-consistent standard errors (HC1: White 1980, with the correction
    for degrees of freedom of MacKinnon and White 1985), because larger shapes have a larger spread.

    Args:
        shapes: the shapes.
        times: their times in milliseconds, shape (len(shapes),).

    Returns:
        The coefficients by dimension, and R squared.

    Raises:
        ValueError: there are fewer distinct shapes than unknowns.
    """
    columns = [np.array([getattr(shape, name) for shape in shapes]) / SCALES[name] for name in SCALES]
    design = np.column_stack([np.ones(len(shapes)), *columns])
    degrees_of_freedom = len(shapes) - design.shape[1]
    if degrees_of_freedom < 1 or np.linalg.matrix_rank(design) < design.shape[1]:
        raise ValueError(f"{len(shapes)} shapes are too few, or too similar, to separate the dimensions")
    inverse = np.linalg.inv(design.T @ design)
    solution = inverse @ design.T @ times
    residuals = times - design @ solution
    covariance = inverse @ (design.T * residuals**2 @ design) @ inverse * len(shapes) / degrees_of_freedom
    half_widths = stats.t.ppf(0.975, degrees_of_freedom) * np.sqrt(np.diag(covariance))
    scale = 100 / times.mean()
    coefficients = {
        name: Coefficient(scale * value, scale * (value - half_width), scale * (value + half_width))
        for name, value, half_width in zip(SCALES, solution[1:], half_widths[1:], strict=True)
    }
    return coefficients, 1 - float(residuals @ residuals) / float(((times - times.mean()) ** 2).sum())


def read_timings(path: Path) -> dict[int, float]:
    """Milliseconds by the shape's number; an incomplete last line of a killed benchmark is skipped."""
    timings: dict[int, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
            timings[int(row["number"])] = float(row["ms"])
        except (ValueError, KeyError):
            continue
    return timings


def time_missing(path: Path, options: argparse.Namespace) -> dict[int, float]:
    """Time the shapes that are missing in the file and append them; return milliseconds by number for all shapes."""
    timings = read_timings(path)
    missing = [n for n in range(options.configs) if n not in timings]
    path.parent.mkdir(parents=True, exist_ok=True)
    bar = ProgressBar("shapes", options.configs, options.configs - len(missing))
    with path.open("a", encoding="utf-8") as file:
        file.write("\n")  # end an incomplete line
        for number in missing:
            shape = draw_shape(options.seed, number)
            timings[number] = time_shape(shape, options)
            file.write(json.dumps({"number": number, **asdict(shape), "ms": timings[number]}) + "\n")
            file.flush()
            os.fsync(file.fileno())
            bar.advance(1, f"{timings[number]:.0f} ms")
    bar.close()
    return {n: timings[n] for n in range(options.configs)}


def as_markdown(
    coefficients: dict[str, Coefficient], r_squared: float, times: np.ndarray, options: argparse.Namespace
) -> str:
    """The table of coefficients, with a description of the benchmark."""
    rows = [
        [
            f"{name}: {UNITS[name]}",
            f"{c.percent:+.2f} % [{c.low:+.2f}, {c.high:+.2f}]",
            f"+{LAYER_COST_PERCENT[name]:.0f} %" if name in LAYER_COST_PERCENT else "negligible",
        ]
        for name, c in coefficients.items()
    ]
    description = (
        f"{options.configs} shapes (1 to 12 layers on each side, widths {WIDTHS}, feed-forward {FFNS}), "
        f"{options.source} source and {options.target} target tokens, batch {options.batch}, one forward pass, median "
        f"of {options.repeats}. Mean {times.mean():.0f} ms, median {statistics.median(times):.0f} ms. Linear "
        f"regression, R squared {r_squared:.3f}; coefficients in percent of the mean time with 95 % intervals. The "
        f"paper's coefficients are from a GPU in half precision."
    )
    return f"{description}\n\n{markdown_table(['dimension', 'ours', 'the paper'], rows)}"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=int, default=500, help="number of shapes; default: 500")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--batch", type=int, default=1, help="rows per batch; default: 1")
    parser.add_argument("--source", type=int, default=128, help="source tokens; default: 128")
    parser.add_argument("--target", type=int, default=32, help="target tokens; default: 32")
    parser.add_argument("--repeats", type=int, default=5, help="calls per shape; default: 5")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    machine = describe_machine(options.device)
    setting = f"{options.device}-{options.threads}-b{options.batch}-{options.source}-{options.target}"
    path = raydistill_home() / "inference_time" / f"{setting}-r{options.repeats}-s{options.seed}.jsonl"
    start = time.monotonic()
    timings = time_missing(path, options)
    times = np.array([timings[n] for n in range(options.configs)])
    shapes = [draw_shape(options.seed, n) for n in range(options.configs)]
    coefficients, r_squared = regress(shapes, times)
    text = as_markdown(coefficients, r_squared, times, options)
    print(text)
    data: dict[str, Any] = {
        "coefficients": {name: asdict(c) for name, c in coefficients.items()},
        "r_squared": r_squared,
        "seconds": time.monotonic() - start,
        "timings": [{**asdict(shapes[n]), "ms": ms} for n, ms in timings.items()],
    }
    title = "Inference time by a BART's dimensions"
    BenchmarkResult("inference_time", title, text, data, machine, device_suffix(options.device)).write()


if __name__ == "__main__":
    main()
