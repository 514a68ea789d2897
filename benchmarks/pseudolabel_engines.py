"""Rows per second of our engines against plain `generate` in input order, on the same rows and the same two cores.

The plain loop takes batches of 32 rows as they come, in one process of two threads (what one gets who just calls it)
and, where there are rows enough for it, in two processes of one thread, which is faster; ratios are told to both. Ours
takes planned batches, neighbours in length, in two processes of one thread, as the product's actors do. On a GPU every
side is one process that computes in bf16. Sides take turns; a figure is the median.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.common import describe_machine, write_result
from benchmarks.random_models import save_bart, save_rows
from benchmarks.sides import GenerationResult, GenerationTask, Side, generate_batches, make_task
from raydistill.config.run import Dataset, Decoding
from raydistill.core.console import print_progress
from raydistill.data.streaming import scan_split, usable_rows
from raydistill.jobs.pseudolabel import CHARS_PER_TOKEN, GPU_BATCH_CHARS, LabelJob
from raydistill.label_sets.batch_plan import BATCH_CHARS, make_plan
from raydistill.results.tables import markdown_table

PLAIN_BATCH = 32
PLAIN = (
    Side("plain generate, 1 x 2 threads", "generate", processes=1, threads=2),
    Side("plain generate, 2 x 1 thread", "generate", processes=2, threads=1),
)
OURS = (
    Side("transformers", "transformers"),
    Side("ctranslate2 fp32", "ctranslate2"),
    Side("ctranslate2 int8", "ctranslate2", "int8"),
)
ON_GPU = (
    Side("plain generate", "generate", "bf16", "cuda", processes=1),
    Side("transformers", "transformers", "bf16", "cuda", processes=1),
    Side("ctranslate2 bf16", "ctranslate2", "bf16", "cuda", processes=1),
)
CASES = ("multi30k", "mscmdlets", "bart-base", "bart-large")
# Planned batches enough for two workers to end together: multi30k's hold some 450 rows, mscmdlets' 70, the shapes' 16.
ROWS = {"multi30k": 4000, "mscmdlets": 2000, "bart-base": 64, "bart-large": 32}
REPEATS = {"multi30k": 2, "mscmdlets": 2, "bart-base": 1, "bart-large": 1}
SHAPE_SOURCE = (100, 500)
SHAPE_OUTPUT = 40


@dataclass(frozen=True)
class Round:
    """One side's run over all rows: its texts in the order of the data."""

    texts: list[str]
    seconds: float
    startup: float


def main() -> None:
    """Run the cases, print and write the result."""
    asked = _arguments()
    machine = describe_machine(asked.device)
    with tempfile.TemporaryDirectory() as scratch:
        found = {case: measure_case(case, asked, Path(scratch)) for case in asked.case}
    markdown = "\n\n".join(f"## {case}\n\n{facts['what']}\n\n{_table(facts)}" for case, facts in found.items())
    print(markdown)
    title = "Engines against plain generate"
    print(write_result("pseudolabel_engines", title, markdown, found, machine, device=asked.device))


def measure_case(case: str, asked: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All sides of one case in turn, `repeats` times; what was run and each side's figures."""
    job, what = _job(case, asked, scratch)
    work = make_task(job, scratch / f"{case}-engines")
    found = scan_split(job.dataset, job.split)
    rows = list(usable_rows(job.dataset, job.split, found))
    read = CHARS_PER_TOKEN * work.max_source_tokens
    plan = make_plan(iter(rows), scratch / f"{case}-plan", batch_chars=asked.batch_chars, max_source_chars=read)
    planned = [plan.read_batch(n) for n in range(len(plan))]
    sides = [side for side in ((*PLAIN, *OURS) if asked.device == "cpu" else ON_GPU) if _wanted(side, asked.side)]
    sides = [side for side in sides if len(rows) >= PLAIN_BATCH * side.processes or side.engine != "generate"]
    # The first start converts the model and lets it prove itself; both are kept, and later starts find them.
    first = {s.name: generate_batches(s, work, []).startup for s in sides if s.engine == "ctranslate2"}
    rounds: dict[str, list[Round]] = {side.name: [] for side in sides}
    repeats = asked.repeats or REPEATS[case]
    for repeat in range(repeats):
        for side in sides:
            done = _run(replace(side, rows_at_once=asked.rows_at_once), work, [r.source for r in rows], planned)
            rounds[side.name].append(done)
            print_progress(f"{case} {repeat + 1}/{repeats} {side.name}: {len(rows) / done.seconds:.2f} rows/s")
    what += f" {len(rows)} rows in {len(plan)} planned batches; {_decoding(work)}; median of {repeats}."
    figures = [_figures(side, rounds[side.name], first.get(side.name)) for side in sides]
    return {"what": what, "rows": len(rows), "sides": _compared(figures, rounds)}


def _run(side: Side, work: GenerationTask, sources: list[str], planned: list[dict[str, list[Any]]]) -> Round:
    """One side over all rows: the plain loop in the order of the data, ours in planned batches."""
    if side.engine == "generate":
        batches = [sources[i : i + PLAIN_BATCH] for i in range(0, len(sources), PLAIN_BATCH)]
        places = list(range(len(sources)))
    else:
        batches = [batch["sources"] for batch in planned]
        places = [place for batch in planned for place in batch["places"]]  # one window: places are row numbers
    written = generate_batches(side, work, batches)
    return Round(_in_order(written, places), written.seconds, written.startup)


def _in_order(written: GenerationResult, places: list[int]) -> list[str]:
    texts = [text for batch in written.texts for text in batch]
    return [text for _, text in sorted(zip(places, texts, strict=True))]


def _figures(side: Side, rounds: Sequence[Round], first_start: float | None) -> dict[str, Any]:
    rates = sorted(len(done.texts) / done.seconds for done in rounds)
    return {
        "side": side.name,
        "plain": side.engine == "generate",
        "rows_per_s": statistics.median(rates),
        "lowest": rates[0],
        "highest": rates[-1],
        "startup_s": statistics.median(done.startup for done in rounds),
        "first_start_s": first_start,
    }


def _compared(figures: list[dict[str, Any]], rounds: dict[str, list[Round]]) -> list[dict[str, Any]]:
    """Each side's figures with its ratio to the first plain one and to the better, and how many texts are its."""
    plain = [f for f in figures if f["plain"]]
    if not plain:
        return figures
    obvious = plain[0]
    base = max(plain, key=lambda f: f["rows_per_s"])
    wanted = rounds[base["side"]][0].texts
    for facts in figures:
        texts = rounds[facts["side"]][0].texts
        facts["times_obvious"] = facts["rows_per_s"] / obvious["rows_per_s"]
        facts["times"] = facts["rows_per_s"] / base["rows_per_s"]
        facts["identical"] = sum(a == b for a, b in zip(texts, wanted, strict=True)) / len(wanted)
    return figures


def _table(facts: dict[str, Any]) -> str:
    header = [
        "side",
        "rows/s",
        "lowest to highest",
        "times the first",
        "times the better plain",
        "same text",
        "start-up s",
        "first start s",
    ]
    rows = [
        [
            s["side"],
            f"{s['rows_per_s']:.2f}",
            f"{s['lowest']:.2f} to {s['highest']:.2f}",
            f"{s['times_obvious']:.2f}" if "times_obvious" in s else "-",
            f"{s['times']:.2f}" if "times" in s else "-",
            f"{s['identical']:.1%}" if "identical" in s else "-",
            f"{s['startup_s']:.1f}",
            f"{s['first_start_s']:.1f}" if s["first_start_s"] else "-",
        ]
        for s in facts["sides"]
    ]
    return markdown_table(header, rows)


def _job(case: str, asked: argparse.Namespace, scratch: Path) -> tuple[LabelJob, str]:
    """The case as a job of the product, and what it is in words."""
    rows = asked.rows or ROWS[case]
    if case == "multi30k":
        data = Dataset(name=str(asked.data / "multi30k_en_de"), train_rows=rows)
        return _trained(asked.multi30k_teacher, data), "Trained Marian-form 6-6 teacher, d 128, training split."
    if case == "mscmdlets":
        data = Dataset(name=str(asked.data / "mscmdlets"), train_rows=rows, max_source_tokens=96)
        return _trained(asked.mscmdlets_teacher, data), "Trained BART-form 2-4 teacher, d 128, training split."
    rows = min(rows, ROWS[case]) if asked.device == "cpu" else rows
    size = case.removeprefix("bart-")
    teacher = save_bart(size, scratch / case)
    file = save_rows(scratch / f"{case}.jsonl", rows, *SHAPE_SOURCE)
    # `generate()` counts the start token; the last token is forced to be the end.
    decoding = Decoding(beams=4, min_length=SHAPE_OUTPUT, max_length=SHAPE_OUTPUT + 1)
    what = f"BART-{size}'s shape, random weights, {SHAPE_SOURCE[0]} to {SHAPE_SOURCE[1]} source tokens evenly spread."
    return LabelJob(str(teacher), Dataset(name=str(file)), decoding=decoding), what


def _trained(teacher: Path, data: Dataset) -> LabelJob:
    return LabelJob(str(teacher), data, decoding=Decoding(beams=4))


def _decoding(work: GenerationTask) -> str:
    beam = work.beam
    return f"{beam.beams} beams, lengths {beam.min_length} to {beam.max_length}, length penalty {beam.length_penalty:g}"


def _wanted(side: Side, names: list[str]) -> bool:
    return not names or any(name in side.name for name in names)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path("../shared")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    parser.add_argument("--side", nargs="+", default=[], help="only sides whose name holds one of these words")
    parser.add_argument("--rows", type=int, help=f"default: {ROWS}; of the shapes, on a CPU, no more")
    parser.add_argument("--repeats", type=int, help=f"default: {REPEATS}")
    parser.add_argument("--rows-at-once", type=int, help="ours; default: the product's")
    parser.add_argument("--batch-chars", type=int, help="ours; default: the product's")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--data", type=Path, default=shared / "data")
    parser.add_argument("--multi30k-teacher", type=Path, default=shared / "teachers" / "multi30k-marian-6-6")
    parser.add_argument("--mscmdlets-teacher", type=Path, default=Path("outputs/runs/mscmdlets-teacher/best"))
    asked = parser.parse_args()
    asked.batch_chars = asked.batch_chars or (BATCH_CHARS if asked.device == "cpu" else GPU_BATCH_CHARS)
    teachers = {"multi30k": asked.multi30k_teacher, "mscmdlets": asked.mscmdlets_teacher}
    for case, folder in teachers.items():
        if case in asked.case and not folder.is_dir():
            parser.error(f"--{case}-teacher: there is no folder {folder}")
    return asked


if __name__ == "__main__":
    main()
