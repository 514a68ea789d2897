"""Trimmed vocabularies without training: equal texts and BLEU of a trained model, and the speed of an mBART-like shape.

    python -m benchmarks.vocabulary trained --model TEACHER --data MULTI30K    # tokens that the training data uses
    python -m benchmarks.vocabulary trained --model TEACHER --data MULTI30K --sizes used 6000 4000 --no-timing
    python -m benchmarks.vocabulary large    # width 1024, 12-1 layers, 250,000 tokens trimmed to 30,000, random weights

Latencies are compared in pairs (`raydistill.evaluation.paired_latency`): the model with all tokens, then the trimmed
one, each with one thread of CTranslate2. With --no-timing, the figures do not depend on the load of the machine.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import MBartForConditionalGeneration, PreTrainedModel

from benchmarks.common import BenchmarkResult, describe_machine
from benchmarks.random_models import SPECIAL_TOKENS, mbart_config, word_tokenizer
from raydistill.config.run import Dataset, Decoding
from raydistill.core.console import print_progress
from raydistill.data.corpus import Corpus, read_corpus
from raydistill.evaluation.latency import used_memory_mb
from raydistill.evaluation.metrics import score
from raydistill.evaluation.paired_latency import PairedTiming, StoppingRule, time_pairs
from raydistill.inference.ctranslate2_conversion import convert_to_ctranslate2, open_translator
from raydistill.inference.ctranslate2_engine import COMPUTE_TYPES
from raydistill.inference.decoding import Engine, EngineOptions, resolve_decoding
from raydistill.inference.engines import open_engine
from raydistill.models import tokenization
from raydistill.models.loading import load_model
from raydistill.models.saving import save_checkpoint
from raydistill.models.vocabulary import count_tokens, select_tokens, trim_model, trim_tokenizer
from raydistill.results.tables import markdown_table

MAX_TOKENS = 256
LANGUAGES = ["en_XX", "ro_RO"]
LARGE_WIDTH = 1024
SOURCE_WORDS, OUTPUT_TOKENS = 25, 20


def run_trained(options: argparse.Namespace, scratch: Path) -> tuple[Any, str]:
    """Texts, BLEU and latency of a trained model with trimmed vocabularies; the figures and the Markdown."""
    train, test = (read_corpus(Dataset(name=str(options.data)), split) for split in ("train", "test"))
    model, tokenizer = load_model(options.model), tokenization.load_tokenizer(options.model)
    counts = count_tokens(tokenization.tokenize_sources(tokenizer, list(train.sources), 2**30))
    counts += count_tokens(tokenization.tokenize_targets(tokenizer, list(train.targets), 2**30))
    baseline = _open(options.model, scratch)
    texts = {beams: _generate(baseline, test, beams, options.rows) for beams in options.beams}
    sources = tokenization.tokenize_sources(tokenizer, list(test.sources[: options.rows]), MAX_TOKENS)
    records = []
    for size in options.sizes:
        token_ids = select_tokens(tokenizer, model.config, counts, size)
        folder = scratch / f"vocabulary-{size}"
        save_checkpoint(trim_model(model, token_ids), trim_tokenizer(tokenizer, token_ids), folder)
        trimmed = _open(folder, scratch)
        for beams in options.beams:
            own = _generate(trimmed, test, beams, options.rows)
            targets = tokenization.tokenize_targets(tokenizer, texts[beams], MAX_TOKENS)
            kept = [set(s) | set(t) <= set(token_ids) for s, t in zip(sources, targets, strict=True)]
            equal = [a == b for a, b in zip(own, texts[beams], strict=True)]
            record = {
                "size": size,
                "tokens": len(token_ids),
                "beams": beams,
                "rows": len(own),
                "rows_kept": sum(kept),
                "equal": float(np.mean(equal)),
                "equal_of_kept": float(np.mean([e for e, k in zip(equal, kept, strict=True) if k])),
                **{f"bleu{name}": _bleu(t, test) for name, t in (("", own), ("_full", texts[beams]))},
                **{f"bleu_kept{name}": _bleu(t, test, kept) for name, t in (("", own), ("_full", texts[beams]))},
            }
            if options.timing:
                calls = _decode_call(baseline, test, beams), _decode_call(trimmed, test, beams)
                record |= _ratio(time_pairs(*calls, rule=StoppingRule(max_seconds=options.seconds)))
            records.append(record)
            print_progress(str(record))
    return records, _DESCRIPTION + "\n\n" + _trained_table(records)


_DESCRIPTION = """\
The test split, decoded by CTranslate2 in fp32, without any training. "equal": outputs equal to those of the model with
all tokens. "all tokens kept": rows whose source and whose output of the full model have kept tokens only. "latency":
share of the full model's latency on 32 rows, with its 95 % interval."""


def _trained_table(records: list[dict[str, Any]]) -> str:
    header = [
        *("tokens", "beams", "equal", "BLEU", "BLEU, full", "rows with all tokens kept", "equal of these"),
        *("BLEU of these", "BLEU of these, full", "latency"),
    ]
    cells = [
        [
            *(f"{r['tokens']} ({r['size']})", str(r["beams"]), f"{r['equal']:.1%}"),
            *(f"{r['bleu']:.2f}", f"{r['bleu_full']:.2f}", f"{r['rows_kept']} of {r['rows']}"),
            *(f"{r['equal_of_kept']:.1%}", f"{r['bleu_kept']:.2f}", f"{r['bleu_kept_full']:.2f}", _format_ratio(r)),
        ]
        for r in records
    ]
    return markdown_table(header, cells)


def run_large(options: argparse.Namespace, scratch: Path) -> tuple[Any, str]:
    """Latency and memory of an mBART-like shape with random weights, with all of its tokens and trimmed."""
    full, kept = options.large_tokens
    encoder, decoder = options.layers
    torch.manual_seed(0)
    model = MBartForConditionalGeneration(mbart_config(full, encoder, decoder, LARGE_WIDTH)).eval()
    model.generation_config.max_length = None
    trimmed = trim_model(model, range(kept))
    parameters = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (model, trimmed)]
    folders = [_convert(m, size, scratch / str(size)) for m, size in ((model, full), (trimmed, kept))]
    del model, trimmed
    records = []
    for precision in options.precisions:
        calls, memory = [], []
        for folder in folders:
            before = used_memory_mb("cpu") or 0.0
            calls.append(_large_call(folder, kept, precision, options.batch))
            calls[-1]()
            memory.append((used_memory_mb("cpu") or 0.0) - before)
        timing = time_pairs(calls[0], calls[1], rule=StoppingRule(max_seconds=options.seconds))
        records.append({"precision": precision, "params_m": parameters, "memory_mb": memory, **_ratio(timing)})
        print_progress(str(records[-1]))
    header = ["precision", "M parameters", "MB of memory, full", "trimmed", "share", "latency", "times faster"]
    cells = [
        [
            *(r["precision"], f"{r['params_m'][0]:.0f} and {r['params_m'][1]:.0f}"),
            *(f"{r['memory_mb'][0]:.0f}", f"{r['memory_mb'][1]:.0f}", f"{r['memory_mb'][1] / r['memory_mb'][0]:.2f}"),
            *(_format_ratio(r), f"{1 / r['ratio']:.2f}" if r["ratio"] else "not known"),
        ]
        for r in records
    ]
    text = (
        f"Width {LARGE_WIDTH}, {encoder}-{decoder} layers, {full:,} tokens trimmed to {kept:,}, random weights; "
        f"{options.batch} rows of {SOURCE_WORDS + 2} source and {OUTPUT_TOKENS} output tokens, 4 beams. Memory: of the "
        f"process, after the model was opened and has decoded once, less that before."
    )
    return records, f"{text}\n\n{markdown_table(header, cells)}"


def _convert(model: PreTrainedModel, tokens: int, folder: Path) -> Path:
    convert_to_ctranslate2(model, word_tokenizer(tokens, [*SPECIAL_TOKENS, *LANGUAGES]), folder)
    return folder


def _large_call(folder: Path, num_words: int, precision: str, batch: int) -> Callable[[], object]:
    """A function that decodes rows of words that both vocabularies have, to outputs of fixed length."""
    translator = open_translator(folder, "cpu", 1, COMPUTE_TYPES[precision])
    first_word = len(SPECIAL_TOKENS) + len(LANGUAGES)
    tokens = tokenization.tokens_by_id(word_tokenizer(num_words, [*SPECIAL_TOKENS, *LANGUAGES]))
    picks = np.random.default_rng(0).integers(first_word, num_words, (batch, SOURCE_WORDS))
    rows = [[*(tokens[i] for i in row), "</s>", LANGUAGES[0]] for row in picks]

    def call() -> object:
        return translator.translate_batch(
            rows,
            [[LANGUAGES[1]]] * batch,
            beam_size=4,
            min_decoding_length=OUTPUT_TOKENS,
            max_decoding_length=OUTPUT_TOKENS,
        )

    return call


def _open(checkpoint: Path, scratch: Path) -> Engine:
    options = EngineOptions(cache_dir=scratch / "cache", allow_fallback=False, precision="fp32")
    return open_engine(checkpoint, "ctranslate2", options)


def _generate(engine: Engine, corpus: Corpus, beams: int, rows: int | None, batch_size: int = 32) -> list[str]:
    beam = resolve_decoding(Decoding(beams=beams), engine.generation_config, None, MAX_TOKENS)
    texts = list(corpus.sources[:rows])
    outputs = engine.generate(texts, beam, max_source_tokens=MAX_TOKENS, batch_size=batch_size)
    return [hypotheses[0].text for hypotheses in outputs]


def _decode_call(engine: Engine, corpus: Corpus, beams: int) -> Callable[[], object]:
    return lambda: _generate(engine, corpus, beams, 32)


def _bleu(texts: list[str], corpus: Corpus, selected: list[bool] | None = None) -> float:
    """BLEU of the outputs for the first rows of the corpus, or for the selected rows among them."""
    rows = [i for i in range(len(texts)) if selected is None or selected[i]]
    return score("bleu", [texts[i] for i in rows], [corpus.targets[i] for i in rows]).metrics["bleu"]


def _ratio(timing: PairedTiming) -> dict[str, Any]:
    return {"ratio": timing.ratio, "interval": timing.interval, "stop_reason": timing.stop_reason}


def _format_ratio(record: dict[str, Any]) -> str:
    if record.get("interval") is None:
        return "not measured"
    low, high = record["interval"]
    return f"{record['ratio']:.3f} ({low:.3f} to {high:.3f})"


def _parse_size(text: str) -> str | int:
    return text if text == "used" else int(text)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["trained", "large"])
    parser.add_argument("--model", type=Path, help="the checkpoint to trim")
    parser.add_argument("--data", type=Path, help="the data set: train and test")
    parser.add_argument("--sizes", type=_parse_size, nargs="+", default=["used"], help="used, or numbers of tokens")
    parser.add_argument("--beams", type=int, nargs="+", default=[4, 1], help="default: 4 1")
    parser.add_argument("--rows", type=int, help="test rows; default: all")
    parser.add_argument("--no-timing", dest="timing", action="store_false", help="texts and BLEU only, for `trained`")
    parser.add_argument("--seconds", type=float, default=120.0, help="limit of a comparison of latencies; default: 120")
    parser.add_argument("--large-tokens", type=int, nargs=2, default=[250_000, 30_000], help="default: 250000 30000")
    parser.add_argument("--layers", type=int, nargs=2, default=[12, 1], help="of the large shape; default: 12 1")
    parser.add_argument("--batch", type=int, default=1, help="rows of the large shape; default: 1")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "int8"], help="default: fp32 int8")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe_machine()
    run = {"trained": run_trained, "large": run_large}[options.part]
    with tempfile.TemporaryDirectory() as scratch:
        data, text = run(options, Path(scratch))
    title = {"trained": "of a trained model", "large": "of a large model"}[options.part]
    BenchmarkResult("vocabulary", f"Trimmed vocabularies {title}", text, data, machine, options.part).write()


if __name__ == "__main__":
    main()
