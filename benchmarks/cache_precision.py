"""What each precision of the teacher cache costs on disk, and what it changes in the teacher's distributions.

    python -m benchmarks.cache_precision ../shared/teachers/multi30k-marian-6-6 ../shared/data/multi30k_en_de --rows 200
    python -m benchmarks.cache_precision bart-large random --rows 8
    python -m benchmarks.cache_precision bart-large-outliers random --rows 8

A cache of encoder states and of the last decoder layer is built in every precision. The distributions over the next
token from the stored states are compared with the distributions from float32 states, and in int8 also with the
distributions from bf16 states: the mean KL divergence in nats a token, the 99th percentile, and the share of tokens
whose most probable next token is the same. The decoder states of a rounded cache were computed from rounded encoder
states, as in training. `bart-large random` is a model of the shape of BART-large with random weights and random rows:
its states have no channels of unusually large values, which trained models can have. `bart-large-outliers random` has
four such channels in the stored states of encoder and decoder, of 20 to 100 times the size of the others. The weights
that read these channels are smaller by equal factors, so that the model computes the same function as without them.
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
# How many times as large as the others a channel of the stored states is, by channel; three of the eight blocks of
# int8 storage have such channels.
OUTLIERS = {100: 20.0, 300: 40.0, 310: 70.0, 900: 100.0}


@dataclass(frozen=True)
class Divergence:
    """What a precision changes, compared with a reference: KL divergence in nats a token, and equal first choices."""

    precision: str
    reference: str
    bytes: int
    mean: float
    percentile_99: float
    same_argmax: float


def enlarge_channels(model: Any, factors: dict[int, float]) -> None:
    """Multiply channels of the last states of a BART's encoder and decoder, and divide the weights that read them.

    The model computes the same function, in place. Its LM head is no longer tied to the embedding.
    """
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    decoder_layers = model.get_decoder().layers
    readers = [
        project for layer in decoder_layers for project in (layer.encoder_attn.k_proj, layer.encoder_attn.v_proj)
    ]
    norms = [model.get_encoder().layers[-1].final_layer_norm, decoder_layers[-1].final_layer_norm]
    for channel, factor in factors.items():
        for norm in norms:
            norm.weight.data[channel] *= factor
            norm.bias.data[channel] *= factor
        for reader in [*readers, model.lm_head]:
            reader.weight.data[:, channel] /= factor


def random_large(rows: int, outliers: dict[int, float]) -> tuple[PreTrainedModel, Examples]:
    """A model of the shape of BART-large with random weights and channels of large values, and random rows."""
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(dropout=0.0)).eval().requires_grad_(False)
    # Random weights give nearly uniform distributions; logits of trained models have a standard deviation of about 3.
    model.lm_head.weight.mul_(3 / (0.02 * model.config.d_model**0.5))
    enlarge_channels(model, outliers)
    source, target = (torch.randint(5, 50_000, (rows, length)).tolist() for length in RANDOM_TOKENS)
    return model, Examples(source, target, list(range(rows)))


def load(options: argparse.Namespace) -> tuple[PreTrainedModel, Examples]:
    """The teacher and the first training rows."""
    if options.data == "random":
        return random_large(options.rows, OUTLIERS if options.teacher.endswith("-outliers") else {})
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
    states: dict[str, Tensor] = {}
    results = []
    for precision in PRECISIONS:
        states[precision], size = read_states(model, examples, precision)
        for reference in ("fp32", "bf16") if precision == "int8" else ("fp32",):
            divergences, same = token_divergences(model, states[reference], states[precision])
            mean, percentile = float(divergences.mean()), float(np.quantile(divergences, 0.99))
            results.append(Divergence(precision, reference, size, mean, percentile, float(same.mean())))
            print_progress(str(results[-1]))
    name = Path(options.teacher).name
    title = f"Precisions of the teacher cache: {name}, width {model.config.d_model}"
    data: list[dict[str, Any]] = [vars(result) for result in results]
    BenchmarkResult("cache_precision", title, as_markdown(results), data, machine, name).write()


def as_markdown(results: list[Divergence]) -> str:
    """A table of the precisions."""
    bytes_of_bf16 = next(result.bytes for result in results if result.precision == "bf16")
    rows = [
        [
            *(result.precision, result.reference),
            f"{result.bytes / bytes_of_bf16:.3f}",
            f"{result.mean:.2g}",
            f"{result.percentile_99:.2g}",
            f"{100 * result.same_argmax:.2f} %",
        ]
        for result in results
    ]
    header = ["precision", "against", "bytes / bf16", "KL, nats a token", "99th percentile", "same first choice"]
    return markdown_table(header, rows)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="the teacher's folder; with `random`, bart-large[-outliers]")
    parser.add_argument("data", help="the folder of the data set, or random")
    parser.add_argument("--rows", type=int, default=200, help="training rows; default: 200")
    compare(parser.parse_args())


if __name__ == "__main__":
    main()
