"""Do our engines write what plain `generate` writes? Every test row, greedy and with beams, in fp32 and int8.

Where two texts differ, `transformers` is asked, teacher-forced, how probable it finds either (as beam search scores
them): a tie, a better text that plain `generate` missed, or a worse one. Rows are told by id; no text is kept.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import describe_machine, write_result
from benchmarks.sides import GenerationTask, Side, generate_batches, make_task
from raydistill.config.run import Dataset, Decoding
from raydistill.core.console import print_progress
from raydistill.data.corpus import Corpus, read_corpus
from raydistill.evaluation.metrics import paired_bootstrap, score
from raydistill.jobs.pseudolabel import LabelJob
from raydistill.results.tables import markdown_table

BATCH = 32
ENGINES = (
    Side("transformers", "transformers"),
    Side("ctranslate2 fp32", "ctranslate2"),
    Side("ctranslate2 int8", "ctranslate2", "int8"),
)
TIE = 0.001  # of the score, a log-probability per token: what two orders of adding in fp32 may differ by
SHOWN = 10


def main() -> None:
    """Run the cases, print and write the result."""
    asked = _arguments()
    machine = describe_machine()
    found = []
    with tempfile.TemporaryDirectory() as cache:
        for case in asked.case:
            data, teacher, metric = _case(case, asked)
            for beams in asked.beams:
                job = LabelJob(str(teacher), data, "test", Decoding(beams=beams))
                rows = measure(job, metric, Path(cache))
                found += [{"case": case, "beams": beams, "metric": metric, **row} for row in rows]
    markdown = _markdown(found)
    print(markdown)
    print(write_result("engine_parity", "Engines write what plain generate writes", markdown, found, machine))


def measure(job: LabelJob, metric: str, cache: Path) -> list[dict[str, Any]]:
    """Each engine's texts of the split against plain `generate`'s: the same, the scores, and where they differ."""
    corpus = read_corpus(job.dataset, job.split)
    work = make_task(job, cache)
    sources = corpus.sources
    plain_batches = [sources[i : i + BATCH] for i in range(0, len(sources), BATCH)]
    plain = _flat(generate_batches(Side("plain generate", "generate"), work, plain_batches).texts)
    wanted = score(metric, plain, corpus.targets)
    rows = []
    for side in ENGINES:
        # All rows in one call per process, so that what shares a batch is not what shares one in the plain loop.
        halves = [sources[0::2], sources[1::2]]
        texts = [""] * len(sources)
        texts[0::2], texts[1::2] = generate_batches(side, work, halves).texts
        scored = score(metric, texts, corpus.targets)
        apart = paired_bootstrap(metric, scored.row_stats, wanted.row_stats)
        different = _different(work, corpus, plain, texts)
        rows.append(
            {
                "engine": side.name,
                "rows": len(texts),
                "identical": 1 - len(different) / len(texts),
                "plain_score": wanted.metrics[metric],
                "score": scored.metrics[metric],
                "interval": [apart.low, apart.high],
                "different": different,
            }
        )
        print_progress(
            f"{job.dataset.name}: {work.beam.beams} beams, {side.name}: {rows[-1]['identical']:.1%} the same"
        )
    return rows


def _different(work: GenerationTask, corpus: Corpus, plain: list[str], ours: list[str]) -> list[dict[str, Any]]:
    """The rows whose texts differ: id, and the score that `transformers` gives to either text."""
    places = [i for i, pair in enumerate(zip(plain, ours, strict=True)) if pair[0] != pair[1]]
    if not places:
        return []
    sources = [corpus.sources[i] for i in places]
    theirs = text_scores(work, sources, [plain[i] for i in places])
    own = text_scores(work, sources, [ours[i] for i in places])
    return [
        {"id": corpus.ids[i], "plain": a, "ours": b, "verdict": _verdict(a, b)}
        for i, a, b in zip(places, theirs, own, strict=True)
    ]


def text_scores(work: GenerationTask, sources: list[str], targets: list[str]) -> list[float]:
    """What `transformers` thinks of given texts: log-probability by (tokens, the end included) ** length penalty."""
    import torch

    from raydistill.models import loading, tokenization

    model = loading.load_model(work.checkpoint)
    tokenizer = tokenization.load_tokenizer(work.checkpoint)
    labels = tokenization.tokenize_targets(tokenizer, targets, work.beam.max_length)
    inputs = tokenization.tokenize_sources(tokenizer, sources, work.max_source_tokens)
    scores = []
    for source, label in zip(inputs, labels, strict=True):
        wanted = torch.tensor([label])
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([source]), labels=wanted).logits
        each = logits.float().log_softmax(-1).gather(-1, wanted[..., None])
        scores.append(float(each.sum()) / len(label) ** work.beam.length_penalty)
    return scores


def _verdict(plain: float, ours: float) -> str:
    if abs(ours - plain) <= TIE:
        return "tie"
    return "ours" if ours > plain else "plain"


def _markdown(found: list[dict[str, Any]]) -> str:
    header = [
        "case",
        "beams",
        "engine",
        "rows",
        "same text",
        "plain",
        "ours",
        "difference [95 %]",
        "tie",
        "ours",
        "plain",
    ]
    rows = []
    for f in found:
        verdicts = [d["verdict"] for d in f["different"]]
        low, high = f["interval"]
        rows.append(
            [
                f"{f['case']}, {f['metric']}",
                str(f["beams"]),
                f["engine"],
                str(f["rows"]),
                f"{f['identical']:.1%}",
                f"{f['plain_score']:.2f}",
                f"{f['score']:.2f}",
                f"{f['score'] - f['plain_score']:+.2f} [{low:+.2f}, {high:+.2f}]",
                *(str(verdicts.count(name)) for name in ("tie", "ours", "plain")),
            ]
        )
    note = (
        "The last three columns: of the texts that differ, how many `transformers` finds equally probable (within "
        f"{TIE} per token), how many of ours and how many of the plain ones more probable."
    )
    return "\n\n".join([markdown_table(header, rows), note, *_examples(found)])


def _examples(found: list[dict[str, Any]]) -> list[str]:
    """A few differing rows of each engine, as a line."""
    lines = []
    for f in found:
        shown = [f"{d['id']} ({d['plain']:.4f}, {d['ours']:.4f})" for d in f["different"][:SHOWN]]
        if shown:
            lines.append(f"{f['case']}, {f['beams']} beams, {f['engine']}: id (plain, ours): {'; '.join(shown)}")
    return lines


def _flat(batches: list[list[str]]) -> list[str]:
    return [text for batch in batches for text in batch]


def _case(case: str, asked: argparse.Namespace) -> tuple[Dataset, Path, str]:
    if case == "multi30k":
        return Dataset(name=str(asked.data / "multi30k_en_de"), test_rows=asked.rows), asked.multi30k_teacher, "bleu"
    data = Dataset(name=str(asked.data / "mscmdlets"), test_rows=asked.rows, max_source_tokens=96)
    return data, asked.mscmdlets_teacher, "rouge2"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path("../shared")
    parser.add_argument("--case", nargs="+", choices=("multi30k", "mscmdlets"), default=["multi30k", "mscmdlets"])
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 4], help="1 is greedy")
    parser.add_argument("--rows", type=int, help="only the first rows; default: all test rows")
    parser.add_argument("--data", type=Path, default=shared / "data")
    parser.add_argument("--multi30k-teacher", type=Path, default=shared / "teachers" / "multi30k-marian-6-6")
    parser.add_argument("--mscmdlets-teacher", type=Path, default=Path("outputs/runs/mscmdlets-teacher/best"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
