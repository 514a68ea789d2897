"""Agreement of this package's engines with plain `generate`: all test rows, greedy and with beams, fp32 and int8.

If two texts differ, `transformers` scores both with teacher forcing, as beam search does. The two are a tie, or the
engine has found a better text than plain `generate`, or a worse one. Rows are recorded by id, without their texts.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import BenchmarkResult, describe_machine
from benchmarks.sides import GenerationTask, Side, generate_batches, make_task
from raydistill.config.run import Dataset, Decoding
from raydistill.core.console import print_progress
from raydistill.data.corpus import Corpus, read_corpus
from raydistill.evaluation.metrics import paired_bootstrap, score
from raydistill.jobs.pseudolabel import LabelJob
from raydistill.results.tables import markdown_table

PLAIN_BATCH_SIZE = 32
ENGINES = (
    Side("transformers", "transformers"),
    Side("ctranslate2 fp32", "ctranslate2"),
    Side("ctranslate2 int8", "ctranslate2", "int8"),
)
TIE_TOLERANCE = 0.001  # log-probability per token; the order of additions in fp32 changes scores by as much
MAX_EXAMPLES = 10


def main() -> None:
    """Run the command line."""
    options = _parse_arguments()
    machine = describe_machine()
    records = []
    with tempfile.TemporaryDirectory() as cache:
        for case in options.case:
            data, teacher, metric = _resolve_case(case, options)
            for beams in options.beams:
                job = LabelJob(str(teacher), data, "test", Decoding(beams=beams))
                rows = compare_engines(job, metric, Path(cache))
                records += [{"case": case, "beams": beams, "metric": metric, **row} for row in rows]
    markdown = _as_markdown(records)
    print(markdown)
    print(BenchmarkResult("engine_parity", "Engines and plain generate", markdown, records, machine).write())


def compare_engines(job: LabelJob, metric: str, cache: Path) -> list[dict[str, Any]]:
    """Compare each engine's texts of the split with plain `generate`: share of equal texts, scores, differences."""
    corpus = read_corpus(job.dataset, job.split)
    task = make_task(job, cache)
    sources = corpus.sources
    plain_batches = [sources[i : i + PLAIN_BATCH_SIZE] for i in range(0, len(sources), PLAIN_BATCH_SIZE)]
    batches = generate_batches(Side("plain generate", "generate"), task, plain_batches).texts
    plain_texts = [text for batch in batches for text in batch]
    plain_scores = score(metric, plain_texts, corpus.targets)
    records = []
    for side in ENGINES:
        # One call per process for all rows, so that the batches differ from the plain loop's.
        halves = [sources[0::2], sources[1::2]]
        texts = [""] * len(sources)
        texts[0::2], texts[1::2] = generate_batches(side, task, halves).texts
        scores = score(metric, texts, corpus.targets)
        difference = paired_bootstrap(metric, scores.row_stats, plain_scores.row_stats)
        different = _find_differences(task, corpus, plain_texts, texts)
        records.append(
            {
                "engine": side.name,
                "rows": len(texts),
                "identical": 1 - len(different) / len(texts),
                "plain_score": plain_scores.metrics[metric],
                "score": scores.metrics[metric],
                "interval": [difference.low, difference.high],
                "different": different,
            }
        )
        print_progress(
            f"{job.dataset.name}: {task.beam.beams} beams, {side.name}: {records[-1]['identical']:.1%} identical"
        )
    return records


def _find_differences(
    task: GenerationTask, corpus: Corpus, plain_texts: list[str], engine_texts: list[str]
) -> list[dict[str, Any]]:
    """The rows whose texts differ: id, the scores that `transformers` gives to both texts, and the better text."""
    indices = [i for i, pair in enumerate(zip(plain_texts, engine_texts, strict=True)) if pair[0] != pair[1]]
    if not indices:
        return []
    sources = [corpus.sources[i] for i in indices]
    plain_scores = text_scores(task, sources, [plain_texts[i] for i in indices])
    engine_scores = text_scores(task, sources, [engine_texts[i] for i in indices])
    return [
        {"id": corpus.ids[i], "plain": plain, "ours": ours, "verdict": _better_text(plain, ours)}
        for i, plain, ours in zip(indices, plain_scores, engine_scores, strict=True)
    ]


def text_scores(task: GenerationTask, sources: list[str], targets: list[str]) -> list[float]:
    """The scores of texts in `transformers`: log-probability / (tokens with the end token) ** length penalty."""
    import torch

    from raydistill.models import loading, tokenization

    model = loading.load_model(task.checkpoint)
    tokenizer = tokenization.load_tokenizer(task.checkpoint)
    labels = tokenization.tokenize_targets(tokenizer, targets, task.beam.max_length)
    inputs = tokenization.tokenize_sources(tokenizer, sources, task.max_source_tokens)
    scores = []
    for source, label in zip(inputs, labels, strict=True):
        label_ids = torch.tensor([label])
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([source]), labels=label_ids).logits
        log_probs = logits.float().log_softmax(-1).gather(-1, label_ids[..., None])
        scores.append(float(log_probs.sum()) / len(label) ** task.beam.length_penalty)
    return scores


def _better_text(plain: float, ours: float) -> str:
    if abs(ours - plain) <= TIE_TOLERANCE:
        return "tie"
    return "ours" if ours > plain else "plain"


def _as_markdown(records: list[dict[str, Any]]) -> str:
    header = [
        *("case", "beams", "engine", "rows", "identical texts", "plain", "ours", "difference [95 %]"),
        *("tie", "ours better", "plain better"),
    ]
    rows = []
    for record in records:
        verdicts = [row["verdict"] for row in record["different"]]
        low, high = record["interval"]
        rows.append(
            [
                f"{record['case']}, {record['metric']}",
                str(record["beams"]),
                record["engine"],
                str(record["rows"]),
                f"{record['identical']:.1%}",
                f"{record['plain_score']:.2f}",
                f"{record['score']:.2f}",
                f"{record['score'] - record['plain_score']:+.2f} [{low:+.2f}, {high:+.2f}]",
                *(str(verdicts.count(name)) for name in ("tie", "ours", "plain")),
            ]
        )
    note = (
        "The last three columns count the texts that differ: texts to which `transformers` gives equal scores (within "
        f"{TIE_TOLERANCE} per token), the engine's text a higher score, or plain `generate`'s text a higher score."
    )
    return "\n\n".join([markdown_table(header, rows), note, *_examples(records)])


def _examples(records: list[dict[str, Any]]) -> list[str]:
    """One line per engine with a few rows whose texts differ."""
    lines = []
    for record in records:
        shown = [f"{row['id']} ({row['plain']:.4f}, {row['ours']:.4f})" for row in record["different"][:MAX_EXAMPLES]]
        if shown:
            name = f"{record['case']}, {record['beams']} beams, {record['engine']}"
            lines.append(f"{name}: id (plain, ours): {'; '.join(shown)}")
    return lines


def _resolve_case(case: str, options: argparse.Namespace) -> tuple[Dataset, Path, str]:
    """Data set, teacher and metric of a case."""
    if case == "multi30k":
        data = Dataset(name=str(options.data / "multi30k_en_de"), test_rows=options.rows)
        return data, options.multi30k_teacher, "bleu"
    data = Dataset(name=str(options.data / "mscmdlets"), test_rows=options.rows, max_source_tokens=96)
    return data, options.mscmdlets_teacher, "rouge2"


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path("../shared")
    cases = ("multi30k", "mscmdlets")
    parser.add_argument("--case", nargs="+", choices=cases, default=list(cases), help="default: all")
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 4], help="1 is greedy; default: 1 4")
    parser.add_argument("--rows", type=int, help="use only the first rows; default: all test rows")
    parser.add_argument("--data", type=Path, default=shared / "data", help="folder of the data sets")
    parser.add_argument("--multi30k-teacher", type=Path, default=shared / "teachers" / "multi30k-marian-6-6")
    parser.add_argument("--mscmdlets-teacher", type=Path, default=Path("outputs/runs/mscmdlets-teacher/best"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
