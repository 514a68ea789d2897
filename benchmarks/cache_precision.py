"""What each precision of the teacher cache costs on disk, and what it changes in the teacher's distributions.

    python -m benchmarks.cache_precision ../shared/teachers/multi30k-marian-6-6 ../shared/data/multi30k_en_de --rows 200
    python -m benchmarks.cache_precision bart-large random --rows 8

A cache of encoder states and of the last decoder layer is built in every precision. The distributions over the next
token from the stored states are compared with those from float32 states: the mean KL divergence in nats a token, the
99th percentile, and the share of tokens whose most probable next token is the same. The decoder states of a rounded
cache were computed from rounded encoder states, as in training. `bart-large random` is a model of the shape of
BART-large with random weights and random rows: its states have no channels of unusually large values, which trained
models can have.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedModel

from benchmarks.common import BenchmarkResult, describe_machine
from raydistill.config.run import Dataset
from raydistill.core.console import print_progress
from raydistill.data.batching import Examples
from raydistill.models import families
from raydistill.models.teacher import open_teacher
from raydistill.models.tokenization import tokenize_sources, tokenize_targets
from raydistill.results.tables import markdown_table
from raydistill.teacher_cache.builder import build_cache
from raydistill.teacher_cache.layout import CacheDtypes, CacheLayout
from raydistill.teacher_cache.reader import open_decoder_states
from raydistill.teacher_cache.storage_dtypes import from_storage
from raydistill.teacher_cache.store import StorageDtype
from raydistill.training.tokenized_data import read_split

PRECISIONS: tuple[StorageDtype, ...] = ("fp32", "bf16", "int8")
RANDOM_TOKENS = (400, 25)  # source and target tokens of a random row
MAX_TOKENS = 512


@dataclass(frozen=True)
class Divergence:
    """What a precision changes, compared with float32: KL divergence in nats a token, and equal first choices."""

    precision: str
    bytes: int
    mean: float
    percentile_99: float
    same_argmax: float


def random_large(rows: int) -> tuple[PreTrainedModel, Examples]:
    """A model of the shape of BART-large with random weights, and random rows."""
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(dropout=0.0)).eval().requires_grad_(False)
    # Random weights give nearly uniform distributions; logits of trained models have a standard deviation of about 3.
    model.lm_head.weight.mul_(3 / (0.02 * model.config.d_model**0.5))
    source, target = (torch.randint(5, 50_000, (rows, length)).tolist() for length in RANDOM_TOKENS)
    return model, Examples(source, target, list(range(rows)))


def load(options: argparse.Namespace) -> tuple[PreTrainedModel, Examples]:
    """The teacher and the first training rows."""
    if options.data == "random":
        return random_large(options.rows)
    dataset = Dataset.model_validate({"name": str(Path(options.data).absolute()), "train_rows": options.rows})
    teacher = open_teacher(str(Path(options.teacher).absolute()), dataset)
    corpus = read_split(dataset, "train")
    assert corpus is not None
    sources = tokenize_sources(teacher.tokenizer, corpus.sources, MAX_TOKENS)
    targets = tokenize_targets(teacher.tokenizer, corpus.targets, MAX_TOKENS)
    return teacher.model, Examples(sources, targets, list(range(len(sources))))


def read_states(model: PreTrainedModel, examples: Examples, precision: StorageDtype) -> tuple[Tensor, int]:
    """The states of the last decoder layer [tokens, width] from a cache of the precision, and its bytes."""
    last = families.num_layers(model.config)[1] - 1
    with tempfile.TemporaryDirectory() as root:
        layout = CacheLayout(
            Path(root), "teacher", examples, model.config.d_model, True, [(examples, [last])], CacheDtypes(precision)
        )
        build_cache(layout, model)
        states = open_decoder_states(layout)[last].read_flat(range(len(examples)))
        return from_storage(states, torch.float32), sum(layout.array_sizes.values())


@torch.inference_mode()
def token_divergences(model: PreTrainedModel, exact: Tensor, read: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Per token: KL(exact || read) in nats, in float64, and whether the most probable next token is the same."""
    divergences, same = [], []
    for exact_chunk, read_chunk in zip(exact.split(256), read.split(256), strict=True):
        log_p, log_q = (
            torch.log_softmax(families.lm_head(model, chunk).double(), -1) for chunk in (exact_chunk, read_chunk)
        )
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1).numpy())
        same.append((log_p.argmax(-1) == log_q.argmax(-1)).numpy())
    return np.concatenate(divergences), np.concatenate(same)


def compare(options: argparse.Namespace) -> None:
    """Compare the precisions, and write benchmarks/results/cache_precision*.md."""
    machine = describe_machine()
    model, examples = load(options)
    exact, _ = read_states(model, examples, "fp32")
    results = []
    for precision in PRECISIONS:
        read, size = read_states(model, examples, precision)
        divergences, same = token_divergences(model, exact, read)
        results.append(
            Divergence(
                precision, size, float(divergences.mean()), float(np.quantile(divergences, 0.99)), float(same.mean())
            )
        )
        print_progress(str(results[-1]))
    title = f"Precisions of the teacher cache: {Path(options.teacher).name}, width {model.config.d_model}"
    data: list[dict[str, Any]] = [vars(result) for result in results]
    suffix = Path(options.teacher).name
    BenchmarkResult("cache_precision", title, as_markdown(results), data, machine, suffix).write()


def as_markdown(results: list[Divergence]) -> str:
    """A table of the precisions."""
    bytes_of_bf16 = next(result.bytes for result in results if result.precision == "bf16")
    rows = [
        [
            result.precision,
            f"{result.bytes / bytes_of_bf16:.3f}",
            f"{result.mean:.2g}",
            f"{result.percentile_99:.2g}",
            f"{100 * result.same_argmax:.2f} %",
        ]
        for result in results
    ]
    header = ["precision", "bytes / bf16", "KL, nats a token", "99th percentile", "same first choice"]
    return markdown_table(header, rows)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="the teacher's folder, or bart-large with `random`")
    parser.add_argument("data", help="the folder of the data set, or random")
    parser.add_argument("--rows", type=int, default=200, help="training rows; default: 200")
    compare(parser.parse_args())


if __name__ == "__main__":
    main()
