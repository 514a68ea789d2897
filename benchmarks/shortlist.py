"""Shortlists and int8 in CTranslate2: BLEU, speed and coverage of trained models, and the speed of an mBART-like shape.

    python -m benchmarks.shortlist models --model 6-6=TEACHER --model 6-1=STUDENT --data MULTI30K --labels PL_DATA
    python -m benchmarks.shortlist large    # width 1024, 12-1 layers, 250,000 words, random weights
    python -m benchmarks.shortlist maps --data MULTI30K    # time to build the maps

Variants take turns batch by batch, and a speed-up is the median over the batches of (time without a shortlist in fp32)
/ (time of the variant). The time is the processor time of the process, which other work on the machine disturbs less
than the elapsed time; all engines have one thread.
"""

import argparse
import itertools
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import MBartConfig, MBartForConditionalGeneration

from benchmarks.common import BenchmarkResult, describe_machine
from benchmarks.random_models import SPECIAL_TOKENS, word_tokenizer
from raydistill.config.run import Dataset, Decoding
from raydistill.core.console import print_progress
from raydistill.data.corpus import Corpus, read_corpus
from raydistill.evaluation.metrics import score
from raydistill.inference import shortlist
from raydistill.inference.ctranslate2_conversion import convert_to_ctranslate2, open_translator
from raydistill.inference.ctranslate2_engine import COMPUTE_TYPES, CTranslate2Engine
from raydistill.inference.decoding import BeamSearchParams, EngineOptions, resolve_decoding
from raydistill.inference.engines import open_engine
from raydistill.inference.shortlist import Shortlist
from raydistill.inference.word_alignment import translation_probabilities
from raydistill.models import loading, tokenization
from raydistill.results.tables import markdown_table

MAX_TOKENS = 64
SINGLE_ROWS = 60  # of which one is decoded at a time
FIXED_SIZES = (1000, 2000, 4000)
CANDIDATES = (5, 10, 20, 50)
MOST_USED = (100, 500, 1000)
SHORT_GRID = ("none", "fixed 2000", "fixed 4000", "source 10 + 100", "source 20 + 500", "source 50 + 1000")
LARGE_VOCABULARY = 250_000
LARGE_WIDTH = 1024


@dataclass
class Variant:
    """An engine with a precision and a shortlist, and what was measured.

    Attributes:
        precision: fp32 or int8.
        name: the name of the shortlist.
        generate: decodes source texts.
        seconds: processor seconds of each call, by batch size.
        texts: the outputs of all test rows.
    """

    precision: str
    name: str
    generate: Callable[[list[str]], list[str]]
    seconds: dict[int, list[float]] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)


def take_turns(variants: Sequence[Variant], batches: Sequence[list[str]], batch_size: int, keep_texts: bool) -> None:
    """Decode every batch with every variant, in a rotating order, after a batch that is not timed."""
    for variant in variants:
        variant.generate(batches[0])
    for number, batch in enumerate(batches):
        for i in range(len(variants)):
            variant = variants[(number + i) % len(variants)]
            started = time.process_time()
            texts = variant.generate(batch)
            variant.seconds.setdefault(batch_size, []).append(time.process_time() - started)
            if keep_texts:
                variant.texts += texts


def speed_up(baseline: Variant, variant: Variant, batch_size: int) -> float:
    """The median over the batches of the baseline's time divided by the variant's."""
    pairs = zip(baseline.seconds[batch_size], variant.seconds[batch_size], strict=True)
    return statistics.median(a / b for a, b in pairs)


# Trained models


def make_shortlists(data: Sequence[Path], checkpoint: Path) -> dict[str, Shortlist]:
    """All shortlists by name, from the training rows of the data sets (originals and pseudo-labels)."""
    tokenizer, config = tokenization.load_tokenizer(checkpoint), loading.load_config(checkpoint)
    sources, targets = [], []
    for folder in data:
        corpus = _read(folder, "train")
        sources += tokenization.tokenize_sources(tokenizer, list(corpus.sources), MAX_TOKENS)
        targets += tokenization.tokenize_targets(tokenizer, list(corpus.targets), MAX_TOKENS)
    kept = shortlist.kept_tokens(tokenizer, config)
    lists = {f"fixed {size}": shortlist.fixed_shortlist(targets, size, kept) for size in FIXED_SIZES}
    translations = translation_probabilities(sources, targets)
    for size, most_used in itertools.product(CANDIDATES, MOST_USED):
        candidates = shortlist.source_shortlist(sources, targets, translations, size, most_used, kept)
        lists[f"source {size} + {most_used}"] = candidates
    return lists


def measure_model(checkpoint: Path, lists: dict[str, Shortlist], test: Corpus, beams: int, scratch: Path) -> Any:
    """BLEU, speed-ups and coverage of all variants of a model, as rows of a table."""
    tokenizer = tokenization.load_tokenizer(checkpoint)
    tokens = tokenization.tokens_by_id(tokenizer)
    variants = []
    for precision in ("fp32", "int8"):
        for name in ("none", *lists):
            path = None
            if name != "none":
                path = scratch / f"{name.replace(' ', '')}.txt"
                shortlist.write_map(path, lists[name], tokens)
            options = EngineOptions(
                cache_dir=scratch / "cache", allow_fallback=False, precision=precision, shortlist=path
            )
            engine = open_engine(checkpoint, "ctranslate2", options)
            beam = resolve_decoding(Decoding(beams=beams), engine.generation_config, None, MAX_TOKENS)
            variants.append(Variant(precision, name, _generate_with(engine, beam)))
    rows = list(test.sources)
    take_turns(variants, [rows[i : i + 32] for i in range(0, len(rows), 32)], 32, keep_texts=True)
    take_turns(variants, [[row] for row in rows[:SINGLE_ROWS]], 1, keep_texts=False)
    coverage = _coverages(lists, tokenizer, test)
    baseline = variants[0]
    return [
        {
            "precision": v.precision,
            "shortlist": v.name,
            "bleu": score("bleu", v.texts, list(test.targets)).metrics["bleu"],
            "identical": sum(a == b for a, b in zip(v.texts, baseline.texts, strict=True)) / len(v.texts),
            "ms_32": 1000 * statistics.median(v.seconds[32]),
            "speed_up_32": speed_up(baseline, v, 32),
            "ms_1": 1000 * statistics.median(v.seconds[1]),
            "speed_up_1": speed_up(baseline, v, 1),
            **coverage.get(v.name, {}),
        }
        for v in variants
    ]


def logprob_difference(checkpoint: Path, test: Corpus, scratch: Path) -> dict[str, float]:
    """Differences per token between int8 and fp32, for the log-probabilities of the references of the test rows."""
    columns = {}
    for precision in ("fp32", "int8"):
        options = EngineOptions(cache_dir=scratch / "cache", allow_fallback=False, precision=precision)
        engine = open_engine(checkpoint, "ctranslate2", options)
        assert isinstance(engine, CTranslate2Engine)
        tokens = engine.converted.tokens
        encode = (tokenization.tokenize_sources, tokenization.tokenize_targets)
        texts = (list(test.sources), list(test.targets))
        ids = [f(engine.tokenizer, t, MAX_TOKENS) for f, t in zip(encode, texts, strict=True)]
        source, target = ([[tokens[i] for i in row] for row in rows] for rows in ids)
        results = engine.converted.translator.score_batch(source, [row[:-1] for row in target], max_batch_size=32)
        columns[precision] = np.concatenate([result.log_probs for result in results])
    difference = columns["int8"] - columns["fp32"]
    return {
        "mean": float(difference.mean()),
        "mean_absolute": float(np.abs(difference).mean()),
        "worst_percentile": float(np.quantile(np.abs(difference), 0.99)),
    }


def run_models(options: argparse.Namespace, scratch: Path) -> tuple[Any, str]:
    """Measure all models; return the figures and the Markdown."""
    test = _read(options.data, "test")
    records: dict[str, Any] = {}
    parts = []
    lists: dict[str, Shortlist] = {}
    for argument in options.model:
        name, _, path = argument.partition("=")
        checkpoint = Path(path)
        lists = lists or make_shortlists([options.data, *options.labels], checkpoint)
        selected = lists if not records or options.full else {k: v for k, v in lists.items() if k in SHORT_GRID}
        difference = logprob_difference(checkpoint, test, scratch)
        parts.append(
            f"{name}: the log-probabilities of the references in int8 differ from fp32's by "
            f"{difference['mean_absolute']:.3f} per token on average, 99 % by at most "
            f"{difference['worst_percentile']:.3f}; their mean changes by {difference['mean']:+.4f}."
        )
        records[name] = {"logprob_difference": difference}
        for beams in options.beams:
            rows = measure_model(checkpoint, selected, test, beams, scratch)
            records[name][f"beams {beams}"] = rows
            parts.append(f"{name}, {beams} beams:\n\n{_table(rows)}")
            print_progress(parts[-1])
    return records, "\n\n".join([_DESCRIPTION, *parts])


_DESCRIPTION = """\
The test split in batches of 32 rows, and 60 rows one at a time; all texts in the references' order. Shortlists from the
training targets and the teacher's pseudo-labels. "identical": outputs equal to fp32 without a shortlist. "allowed": the
mean number of tokens that the decoder may write in a batch of 32 (for a row alone). "tokens outside": the share of
tokens of the test references that the list excludes in a batch of 32 (alone). "rows outside": the share of references
with an excluded token, alone."""


def _table(rows: list[dict[str, Any]]) -> str:
    header = [
        *("precision", "shortlist", "BLEU", "identical", "ms, 32 rows", "speed-up", "ms, 1 row", "speed-up"),
        *("allowed", "tokens outside", "rows outside"),
    ]
    cells = [
        [
            *(row["precision"], row["shortlist"], f"{row['bleu']:.2f}", f"{row['identical']:.1%}"),
            *(f"{row['ms_32']:.1f}", f"{row['speed_up_32']:.2f}x", f"{row['ms_1']:.1f}", f"{row['speed_up_1']:.2f}x"),
            *(
                [
                    f"{row['allowed_32']:.0f} ({row['allowed_1']:.0f})",
                    f"{row['tokens_32']:.2%} ({row['tokens']:.2%})",
                    f"{row['rows']:.1%}",
                ]
                if "tokens" in row
                else ["all", "0", "0"]
            ),
        ]
        for row in rows
    ]
    return markdown_table(header, cells)


def _coverages(lists: dict[str, Shortlist], tokenizer: Any, test: Corpus) -> dict[str, dict[str, Any]]:
    sources = tokenization.tokenize_sources(tokenizer, list(test.sources), MAX_TOKENS)
    targets = tokenization.tokenize_targets(tokenizer, list(test.targets), MAX_TOKENS)
    tokens = tokenization.tokens_by_id(tokenizer)
    result = {}
    for name, candidates in lists.items():
        alone = shortlist.measure_coverage(candidates, sources, targets)
        batch = shortlist.measure_coverage(candidates, sources, targets, batch_size=32)
        result[name] = {
            "allowed_32": batch.mean_allowed,
            "allowed_1": alone.mean_allowed,
            "tokens": alone.share_of_tokens_outside,
            "rows": alone.share_of_rows_outside,
            "tokens_32": batch.share_of_tokens_outside,
            "outside": [[tokens[i], count] for i, count in alone.outside[:20]],
        }
    return result


def _generate_with(engine: Any, beam: BeamSearchParams) -> Callable[[list[str]], list[str]]:
    def generate(texts: list[str]) -> list[str]:
        results = engine.generate(texts, beam, max_source_tokens=MAX_TOKENS, batch_size=len(texts))
        return [hypotheses[0].text for hypotheses in results]

    return generate


def _read(folder: Path, split: str) -> Corpus:
    return read_corpus(Dataset(name=str(folder)), split)


# A large vocabulary


def run_large(options: argparse.Namespace, scratch: Path) -> tuple[Any, str]:
    """Time an mBART-like shape with random weights and outputs of fixed length."""
    languages = ["en_XX", "ro_RO"]
    tokenizer = word_tokenizer(LARGE_VOCABULARY, [*SPECIAL_TOKENS, *languages])
    config = MBartConfig(
        vocab_size=LARGE_VOCABULARY,
        d_model=LARGE_WIDTH,
        encoder_layers=12,
        decoder_layers=1,
        encoder_attention_heads=16,
        decoder_attention_heads=16,
        encoder_ffn_dim=4096,
        decoder_ffn_dim=4096,
        scale_embedding=True,
        decoder_start_token_id=5,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model_folder = scratch / "large"
    model = MBartForConditionalGeneration(config).eval()
    model.generation_config.max_length = None
    convert_to_ctranslate2(model, tokenizer, model_folder)
    del model
    tokens = tokenization.tokens_by_id(tokenizer)
    rng = np.random.default_rng(0)
    always = np.arange(6)
    words = np.arange(6, LARGE_VOCABULARY - 1)
    sources = [rng.choice(words, 25) for _ in range(8 * options.rounds)]
    lists = {
        f"fixed {size}": Shortlist(np.union1d(always, rng.choice(words, size, replace=False)))
        for size in (4000, 30_000)
    }
    used = sorted({int(i) for row in sources for i in row})
    most_used = np.union1d(always, rng.choice(words, 1000, replace=False))
    lists["source 20 + 1000"] = Shortlist(most_used, {i: np.unique(rng.choice(words, 20)) for i in used})
    rows = [" ".join([*(tokens[i] for i in row), "</s>", "en_XX"]) for row in sources]
    records: list[list[Any]] = []
    for precision in ("fp32", "int8"):
        variants = [
            Variant(precision, name, _fixed_length_with(model_folder, lists.get(name), precision, tokens, scratch))
            for name in ("none", *lists)
        ]
        for batch in (1, 8):
            take_turns(variants, [rows[i * batch : (i + 1) * batch] for i in range(options.rounds)], batch, False)
            for variant in variants:
                ms = 1000 * statistics.median(variant.seconds[batch])
                records.append([precision, variant.name, batch, ms, speed_up(variants[0], variant, batch)])
                print_progress(str(records[-1]))
        del variants
    header = ["precision", "shortlist", "rows", "ms", "speed-up over the same precision without a shortlist"]
    cells = [[p, name, str(batch), f"{ms:.0f}", f"{ratio:.2f}x"] for p, name, batch, ms, ratio in records]
    text = (
        "Width 1024, 12 encoder layers, 1 decoder layer, 250,000 tokens, random weights; 27 source and 20 output "
        "tokens, 4 beams. The lists are random: their sizes matter, not their members. Real rows of a batch share "
        "source tokens, so that their `source` list is shorter than here (20 x 25 x rows + 1,000)."
    )
    return records, f"{text}\n\n{markdown_table(header, cells)}"


def _fixed_length_with(
    model: Path, candidates: Shortlist | None, precision: str, tokens: list[str], scratch: Path
) -> Callable[[list[str]], list[str]]:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        if candidates is not None:
            shortlist.write_map(Path(folder) / "map.txt", candidates, tokens)
            model = shortlist.link_model(model, Path(folder) / "map.txt", Path(folder) / "model")
        translator = open_translator(model, "cpu", 1, COMPUTE_TYPES[precision])

    def generate(texts: list[str]) -> list[str]:
        translator.translate_batch(
            [text.split() for text in texts],
            [["ro_RO"]] * len(texts),
            beam_size=4,
            min_decoding_length=20,
            max_decoding_length=20,
            use_vmap=candidates is not None,
        )
        return texts

    return generate


# Building the maps


def run_maps(options: argparse.Namespace, scratch: Path) -> tuple[Any, str]:
    """Time the alignment of Multi30k, and of rows as long as XSUM's with tokens of a Zipf distribution."""
    tokenizer = tokenization.load_tokenizer(options.model[0].partition("=")[2])
    corpus = _read(options.data, "train")
    multi30k = (
        tokenization.tokenize_sources(tokenizer, list(corpus.sources), MAX_TOKENS),
        tokenization.tokenize_targets(tokenizer, list(corpus.targets), MAX_TOKENS),
    )
    rng = np.random.default_rng(0)
    shares = 1 / np.arange(1, 50_001)
    shares /= shares.sum()
    xsum = tuple(rng.choice(50_000, (options.rows, length), p=shares).astype(np.int32) for length in (400, 25))
    records: list[list[Any]] = []
    long_rows = f"{options.rows:,} rows, 400 to 25 tokens"
    cases: list[tuple[str, Any, int]] = [
        ("Multi30k", multi30k, 100_000_000),
        (long_rows, xsum, 30_000_000),
        (long_rows, xsum, 100_000_000),
    ]
    for name, (sources, targets), max_pairs in cases:
        started, cpu = time.perf_counter(), time.process_time()
        translations = translation_probabilities(sources, targets, max_pairs=max_pairs)
        result = shortlist.source_shortlist(sources, targets, translations, 20, 500, {0})
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        seconds = (time.process_time() - cpu, time.perf_counter() - started)
        records.append([name, max_pairs, *seconds, peak, len(result.by_source)])
        print_progress(str(records[-1]))
    header = ["data", "limit of pairs", "processor s", "elapsed s (next to other work)", "peak GB", "source tokens"]
    cells = [[n, f"{m:,}", f"{c:.0f}", f"{e:.0f}", f"{p:.1f}", str(k)] for n, m, c, e, p, k in records]
    return records, markdown_table(header, cells)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["models", "large", "maps"])
    parser.add_argument("--model", action="append", default=[], metavar="NAME=CHECKPOINT")
    parser.add_argument("--data", type=Path, help="the Multi30k folder")
    parser.add_argument("--labels", type=Path, action="append", default=[], help="the same data set with pseudo-labels")
    parser.add_argument("--beams", type=int, nargs="+", default=[4, 1], help="default: 4 1")
    parser.add_argument("--full", action="store_true", help="all shortlists for all models, not for the first only")
    parser.add_argument("--suffix", default="", help="of the result's name, for `models`")
    parser.add_argument("--rounds", type=int, default=7, help="of the large shape; default: 7")
    parser.add_argument("--rows", type=int, default=200_000, help="long rows of `maps`; default: 200000")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe_machine()
    run = {"models": run_models, "large": run_large, "maps": run_maps}[options.part]
    with tempfile.TemporaryDirectory() as scratch:
        data, text = run(options, Path(scratch))
    suffix = options.suffix if options.part == "models" else options.part
    title = {"models": "of trained models", "large": "of a large vocabulary", "maps": "are built"}[options.part]
    BenchmarkResult("shortlist", f"Shortlists {title}", text, data, machine, suffix).write()


if __name__ == "__main__":
    main()
