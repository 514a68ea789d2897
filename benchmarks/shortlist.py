"""Shortlists and int8 in CTranslate2: BLEU and speed of trained models, coverage, and the speed of an mBART-like shape.

    python -m benchmarks.shortlist models --model 6-3=STUDENT --model 6-1=STUDENT --data MULTI30K --labels LABEL_SET
    python -m benchmarks.shortlist coverage --model 6-3=STUDENT --data MULTI30K --labels LABEL_SET
    python -m benchmarks.shortlist large    # width 1024, 12-1 layers, 250,000 words, random weights

Each variant is timed in pairs with the same model in fp32 (`large`: in the same precision) without a shortlist, see
`raydistill.evaluation.paired_latency`: the machine should do nothing else.
"""

import argparse
import itertools
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import MBartForConditionalGeneration

from benchmarks.common import BenchmarkResult, describe_machine
from benchmarks.random_models import SPECIAL_TOKENS, mbart_config, word_tokenizer
from benchmarks.search_efficiency import hypervolume
from raydistill.config.run import Dataset, Decoding
from raydistill.core.console import print_progress
from raydistill.data.corpus import Corpus, read_corpus
from raydistill.evaluation.metrics import score
from raydistill.evaluation.paired_latency import PairedTiming, StoppingRule, time_pairs
from raydistill.inference import shortlist
from raydistill.inference.ctranslate2_conversion import convert_to_ctranslate2, open_translator
from raydistill.inference.ctranslate2_engine import COMPUTE_TYPES
from raydistill.inference.decoding import EngineOptions, resolve_decoding
from raydistill.inference.engines import open_engine
from raydistill.inference.shortlist import Shortlist
from raydistill.inference.word_alignment import translation_probabilities
from raydistill.models import tokenization
from raydistill.results.tables import markdown_table
from raydistill.search.shortlists import ShortlistInputs

MAX_TOKENS = 64
FIXED_SIZES = (1000, 2000, 4000)
SOURCE_SIZES = ((10, 100), (5, 500), (20, 500), (20, 1000), (50, 1000))  # candidates, most used tokens
TIMED_LISTS = ("fixed 2000", "fixed 4000", "source 20 + 500", "source 20 + 1000")  # the last is the product's
BATCH_ROWS = {32: 128, 1: 16}  # rows of a timed call by batch size
MAX_LOSS = 0.3  # BLEU below the same model in fp32 without a shortlist
RARE = 5  # occurrences in the training targets, at most
LARGE_VOCABULARY = 250_000

Decode = Callable[[list[str]], list[str]]  # of any number of texts as one batch


@dataclass(frozen=True)
class Speedup:
    """How many times faster than the baseline a variant is.

    Attributes:
        ms: median milliseconds of a call of the variant.
        baseline_ms: median milliseconds of a call of the baseline.
        factor: baseline over variant; None if all pairs are noisy.
        interval: the interval of the factor, 95 %.
        stop_reason: why the comparison ended.
        dropped_pairs: pairs that are noisy because of other processes.
    """

    ms: float
    baseline_ms: float
    factor: float | None
    interval: tuple[float, float] | None
    stop_reason: str
    dropped_pairs: int

    @classmethod
    def of(cls, timing: PairedTiming) -> "Speedup":
        """The speed-up of a comparison of the variant with the baseline."""
        return cls(
            ms=float(np.median([ms for pair in timing.pairs for ms in pair.student_ms])),
            baseline_ms=float(np.median([ms for pair in timing.pairs for ms in pair.baseline_ms])),
            factor=1 / timing.ratio if timing.ratio else None,
            interval=(1 / timing.interval[1], 1 / timing.interval[0]) if timing.interval else None,
            stop_reason=timing.stop_reason,
            dropped_pairs=timing.dropped_pairs,
        )

    @property
    def label(self) -> str:
        """The factor with its interval."""
        if self.factor is None:
            return self.stop_reason
        interval = f" ({self.interval[0]:.2f} to {self.interval[1]:.2f})" if self.interval else " (too few pairs)"
        return f"{self.factor:.2f}x{interval}"


def compare_speed(baseline: Decode, variant: Decode, batches: Sequence[list[str]], seconds: float) -> Speedup:
    """Time calls that decode all batches, one after the other."""
    rule = StoppingRule(max_seconds=seconds)
    return Speedup.of(time_pairs(lambda: list(map(baseline, batches)), lambda: list(map(variant, batches)), rule=rule))


# Trained models


def make_shortlists(data: Path, label_sets: Sequence[Path], checkpoint: Path) -> dict[str, Shortlist]:
    """All shortlists by name, from the training rows and the label sets, as a sweep makes them."""
    dataset = Dataset(name=str(data))
    inputs = ShortlistInputs(str(checkpoint), dataset, None, tuple(label_sets), None, MAX_TOKENS, MAX_TOKENS)
    sources, targets = inputs.training_rows
    lists = {f"fixed {size}": shortlist.fixed_shortlist(targets, size, inputs.kept) for size in FIXED_SIZES}
    started = time.process_time()
    translations = translation_probabilities(sources, targets)
    print_progress(f"alignment of {len(sources):,} rows: {time.process_time() - started:.0f} s of processor time")
    for size, most_used in SOURCE_SIZES:
        candidates = shortlist.source_shortlist(sources, targets, translations, size, most_used, inputs.kept)
        lists[f"source {size} + {most_used}"] = candidates
    return lists


def open_decode(
    checkpoint: Path, precision: str, candidates: Shortlist | None, options: argparse.Namespace, scratch: Path
) -> Callable[[int], Decode]:
    """Open an engine; the result takes a number of beams and returns a function that decodes texts."""
    path = None
    if candidates is not None:
        path = scratch / "map.txt"
        tokens = tokenization.tokens_by_id(tokenization.load_tokenizer(checkpoint))
        shortlist.write_map(path, candidates, tokens)
    engine_options = EngineOptions(
        threads=options.threads,
        cache_dir=scratch / "cache",
        allow_fallback=False,
        precision=precision,
        shortlist=path,
    )
    engine = open_engine(checkpoint, "ctranslate2", engine_options)

    def with_beams(beams: int) -> Decode:
        beam = resolve_decoding(Decoding(beams=beams), engine.generation_config, None, MAX_TOKENS)

        def decode(texts: list[str]) -> list[str]:
            results = engine.generate(texts, beam, max_source_tokens=MAX_TOKENS, batch_size=len(texts))
            return [hypotheses[0].text for hypotheses in results]

        return decode

    return with_beams


def run_models(options: argparse.Namespace, scratch: Path) -> tuple[Any, str]:
    """Measure all models; return the figures and the Markdown."""
    splits = {split: _read(options.data, split, options.rows) for split in ("validation", "test")}
    records: list[dict[str, Any]] = []
    for argument in options.model:
        name, _, path = argument.partition("=")
        every = make_shortlists(options.data, options.labels, Path(path))
        lists = {list_name: every[list_name] for list_name in TIMED_LISTS}
        engines = {
            (precision, list_name): open_decode(Path(path), precision, lists.get(list_name), options, scratch)
            for precision in ("fp32", "int8")
            for list_name in ("none", *lists)
        }
        for beams in options.beams:
            decodes = {variant: with_beams(beams) for variant, with_beams in engines.items()}
            rows = measure_variants(decodes, splits, options.seconds)
            records += [{"model": name, "beams": beams, **row} for row in rows]
            print_progress(_models_table(records[-len(rows) :]))
    best = [_best(list(rows)) for _, rows in itertools.groupby(records, lambda row: (row["model"], row["beams"]))]
    text = (
        f"{options.threads} thread(s). Speed-ups over the same model and beams in fp32 without a list, in pairs, with "
        f"95 % intervals: calls of {BATCH_ROWS[32]} test rows in batches of 32, and of {BATCH_ROWS[1]} rows one at a "
        f"time. Variants whose validation BLEU is more than {MAX_LOSS} lower are not timed. First the fastest of each "
        "model, then all."
    )
    return records, "\n\n".join([text, _models_table(best), front_text(records), _models_table(records)])


def measure_variants(
    decodes: dict[tuple[str, str], Decode], splits: dict[str, Corpus], seconds: float
) -> list[dict[str, Any]]:
    """BLEU of all variants and speed-ups of those that lose little; the first variant is the baseline."""
    baseline, *_ = decodes.values()
    rows: list[dict[str, Any]] = []
    for (precision, list_name), decode in decodes.items():
        row: dict[str, Any] = {"precision": precision, "list": list_name}
        for split, corpus in splits.items():
            texts = [text for batch in _batches(list(corpus.sources), 32) for text in decode(batch)]
            row[split] = score("bleu", texts, list(corpus.targets)).metrics["bleu"]
        rows.append(row)
        if decode is baseline or row["validation"] < rows[0]["validation"] - MAX_LOSS:
            continue
        for size, count in BATCH_ROWS.items():
            batches = _batches(list(splits["test"].sources)[:count], size)
            row[f"speedup_{size}"] = asdict(compare_speed(baseline, decode, batches, seconds))
    return rows


@dataclass(frozen=True)
class ServedModel:
    """A model with one way to serve it: milliseconds of the timed batches, and BLEU on test."""

    label: str
    ms: float
    bleu: float


def served_models(records: list[dict[str, Any]]) -> tuple[list[ServedModel], list[ServedModel]]:
    """Version 1's way to serve the models, and all ways that were timed.

    Version 1 serves in fp32 with the model's own beams, the most of the records, and without a shortlist. The
    milliseconds of this way are the median over all comparisons of the model; the milliseconds of the other ways are
    this median divided by the factor of their pairs, so that all figures of a model refer to one time.
    """
    first: list[ServedModel] = []
    every: list[ServedModel] = []
    most_beams = max(row["beams"] for row in records)
    for (model, beams), group in itertools.groupby(records, lambda row: (row["model"], row["beams"])):
        rows = list(group)
        baseline_ms = float(np.median([row["speedup_32"]["baseline_ms"] for row in rows if "speedup_32" in row]))
        factors = [1.0, *(row.get("speedup_32", {}).get("factor") for row in rows[1:])]
        timed = [
            ServedModel(f"{model}, {beams} beams, {row['precision']}, {row['list']}", baseline_ms / factor, row["test"])
            for row, factor in zip(rows, factors, strict=True)
            if factor
        ]
        every += timed
        first += timed[:1] if beams == most_beams else []
    return first, every


def front_text(records: list[dict[str, Any]]) -> str:
    """The best score within the latency of each model as version 1 serves it, and the area under both fronts."""
    first, every = served_models(records)
    front = [s for s in first if not any(o.ms < s.ms and o.bleu >= s.bleu for o in first)]
    rows = []
    for served in sorted(front, key=lambda served: served.ms):
        best = max((o for o in every if o.ms <= served.ms), key=lambda other: (other.bleu, -other.ms))
        rows.append([served.label, f"{served.ms:.0f}", f"{served.bleu:.2f}", best.label, f"{best.ms:.0f}"])
        rows[-1].append(f"{best.bleu:.2f}")
    longest = max(served.ms for served in first)
    areas = [hypervolume([(served.bleu, served.ms) for served in group], (0.0, longest)) for group in (first, every)]
    header = ["as version 1 serves it", "ms", "test BLEU", "best way within that time", "ms", "test BLEU"]
    return (
        f"{markdown_table(header, rows)}\n\nHypervolume of test BLEU over latency, up to {longest:.0f} ms: "
        f"{areas[0]:,.0f} as version 1 serves the models, {areas[1]:,.0f} with all ways ({areas[1] / areas[0]:.2f}x)."
    )


def _best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The variant with the highest speed-up for batches of 32; the baseline if none was timed."""
    return max(rows, key=lambda row: (row.get("speedup_32") or {}).get("factor") or 1.0)


def _models_table(rows: list[dict[str, Any]]) -> str:
    header = ["model", "beams", "precision", "list", "validation BLEU", "test BLEU", "batches of 32", "one row"]
    cells = [
        [
            *(row["model"], str(row["beams"]), row["precision"], row["list"]),
            *(f"{row[split]:.2f}" for split in ("validation", "test")),
            *(Speedup(**row[key]).label if key in row else "-" for key in ("speedup_32", "speedup_1")),
        ]
        for row in rows
    ]
    return markdown_table(header, cells)


# Coverage


def run_coverage(options: argparse.Namespace, scratch: Path) -> tuple[Any, str]:
    """What the lists exclude of the references of the test split, alone and in batches of 32."""
    checkpoint = Path(options.model[0].partition("=")[2])
    tokenizer = tokenization.load_tokenizer(checkpoint)
    test, train = _read(options.data, "test"), _read(options.data, "train")
    counts = Counter(word for text in train.targets for word in _words(text))
    sources = tokenization.tokenize_sources(tokenizer, list(test.sources), MAX_TOKENS)
    targets = tokenization.tokenize_targets(tokenizer, list(test.targets), MAX_TOKENS)
    records: list[dict[str, Any]] = []
    for name, candidates in make_shortlists(options.data, options.labels, checkpoint).items():
        alone = shortlist.measure_coverage(candidates, sources, targets)
        batch = shortlist.measure_coverage(candidates, sources, targets, batch_size=32)
        outside = [
            _words_outside(text, set(candidates.allowed([source]).tolist()), tokenizer)
            for text, source in zip(test.targets, sources, strict=True)
        ]
        records.append(
            {
                "list": name,
                "allowed_1": alone.mean_allowed,
                "allowed_32": batch.mean_allowed,
                "tokens": alone.share_of_tokens_outside,
                "rows": alone.share_of_rows_outside,
                "rows_32": batch.share_of_rows_outside,
                "rows_rare": _share(any(counts[w] <= RARE for w in words) for words in outside),
                "rows_number": _share(any(map(str.isdigit, words)) for words in outside),
                "words_rare": _share(counts[w] <= RARE for words in outside for w in words),
            }
        )
    header = ["list", "allowed, alone", "in a batch of 32", "tokens outside, alone", "rows outside, alone"]
    header += ["in a batch of 32", "rows, rare word", "rows, number", "rare, of the words outside"]
    cells = []
    for row in records:
        name, alone, batch, *shares = row.values()
        cells.append([name, f"{alone:,.0f}", f"{batch:,.0f}", *(f"{share:.1%}" for share in shares)])
    text = (
        f"References of {len(test):,} test rows. A row is outside if one of its tokens is not allowed. Rare: in the "
        f"training targets at most {RARE} times. Numbers: words of digits."
    )
    return records, f"{text}\n\n{markdown_table(header, cells)}"


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _words_outside(text: str, allowed: set[int], tokenizer: Any) -> list[str]:
    """The words with a token that is not allowed; each word is tokenized alone."""
    words = _words(text)
    rows = tokenization.tokenize_targets(tokenizer, words, MAX_TOKENS)
    return [word for word, ids in zip(words, rows, strict=True) if not allowed.issuperset(ids)]


def _share(values: Iterable[bool]) -> float:
    return float(np.mean([*values] or [False]))


# A large vocabulary


def run_large(options: argparse.Namespace, scratch: Path) -> tuple[Any, str]:
    """Time an mBART-like shape with random weights and outputs of fixed length."""
    tokenizer = word_tokenizer(LARGE_VOCABULARY, [*SPECIAL_TOKENS, "en_XX", "ro_RO"])
    _save_large(tokenizer, scratch / "large")
    tokens = tokenization.tokens_by_id(tokenizer)
    rng = np.random.default_rng(0)
    always, words = np.arange(6), np.arange(6, LARGE_VOCABULARY - 1)
    sources = [rng.choice(words, 25) for _ in range(8)]
    rows = [" ".join([*(tokens[i] for i in row), "</s>", "en_XX"]) for row in sources]
    lists = {
        f"fixed {size}": Shortlist(np.union1d(always, rng.choice(words, size, replace=False)))
        for size in (4000, 30_000)
    }
    used = sorted({int(i) for row in sources for i in row})
    most_used = np.union1d(always, rng.choice(words, 1000, replace=False))
    lists["source 20 + 1000"] = Shortlist(most_used, {i: np.unique(rng.choice(words, 20)) for i in used})
    records = []
    for precision in options.precision:
        full = _fixed_length_decode(scratch / "large", None, precision, tokens, options.threads)
        for name, candidates in lists.items():
            decode = _fixed_length_decode(scratch / "large", candidates, precision, tokens, options.threads)
            speedups = {batch: compare_speed(full, decode, [rows[:batch]], options.seconds) for batch in (1, 8)}
            records.append({"precision": precision, "list": name, **{str(k): asdict(v) for k, v in speedups.items()}})
            print_progress(f"{precision}, {name}: " + ", ".join(f"{k} rows {v.label}" for k, v in speedups.items()))
    text = (
        f"Width 1024, 12 encoder layers, 1 decoder layer, 250,000 tokens, random weights; 27 source and 20 output "
        f"tokens, 4 beams, {options.threads} thread(s). Speed-ups over the same precision without a list, in pairs, "
        f"with 95 % intervals. The lists are random: their sizes matter, not their members. Real rows of a batch share "
        f"source tokens, so that their `source` list is shorter than here (20 x 25 x rows + 1,000)."
    )
    cells = [[row["precision"], row["list"], *(Speedup(**row[batch]).label for batch in ("1", "8"))] for row in records]
    return records, f"{text}\n\n{markdown_table(['precision', 'list', '1 row', '8 rows'], cells)}"


def _save_large(tokenizer: Any, folder: Path) -> None:
    torch.manual_seed(0)
    model = MBartForConditionalGeneration(mbart_config(LARGE_VOCABULARY, 12, 1)).eval()
    model.generation_config.max_length = None
    convert_to_ctranslate2(model, tokenizer, folder)


def _fixed_length_decode(
    model: Path, candidates: Shortlist | None, precision: str, tokens: list[str], threads: int
) -> Decode:
    """A function that writes 20 tokens for each text, a list of tokens separated by spaces."""
    with tempfile.TemporaryDirectory() as folder:
        if candidates is not None:
            shortlist.write_map(Path(folder) / "map.txt", candidates, tokens)
            model = shortlist.link_model(model, Path(folder) / "map.txt", Path(folder) / "model")
        translator = open_translator(model, "cpu", threads, COMPUTE_TYPES[precision])

    def decode(texts: list[str]) -> list[str]:
        translator.translate_batch(
            [text.split() for text in texts],
            [["ro_RO"]] * len(texts),
            beam_size=4,
            min_decoding_length=20,
            max_decoding_length=20,
            use_vmap=candidates is not None,
        )
        return texts

    return decode


def _read(folder: Path, split: str, rows: int | None = None) -> Corpus:
    return read_corpus(Dataset(name=str(folder), validation_rows=rows, test_rows=rows), split)


def _batches(rows: list[str], size: int) -> list[list[str]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["models", "coverage", "large"])
    parser.add_argument("--model", action="append", default=[], metavar="NAME=CHECKPOINT")
    parser.add_argument("--data", type=Path, help="the Multi30k folder")
    parser.add_argument("--labels", type=Path, action="append", default=[], help="a label set of its training split")
    parser.add_argument("--beams", type=int, nargs="+", default=[4, 1], help="default: 4 1")
    parser.add_argument("--rows", type=int, help="validation and test rows that are scored; default: all")
    parser.add_argument("--threads", type=int, default=1, help="of the engine; default: 1")
    parser.add_argument("--seconds", type=float, default=120, help="limit of a comparison; default: 120")
    parser.add_argument("--precision", nargs="+", default=["fp32", "int8"], help="of `large`; default: fp32 int8")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = describe_machine()
    run = {"models": run_models, "coverage": run_coverage, "large": run_large}[options.part]
    with tempfile.TemporaryDirectory() as scratch:
        data, text = run(options, Path(scratch))
    titles = {"models": "of trained models", "coverage": "and what they exclude", "large": "of a large vocabulary"}
    result = BenchmarkResult("shortlist", f"Shortlists {titles[options.part]}", text, data, machine, options.part)
    print(result.write())


if __name__ == "__main__":
    main()
