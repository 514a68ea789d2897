"""Rows per second of this package's engines and of plain `generate`, on the same rows and two cores.

Plain `generate` reads batches of 32 rows in input order: in one process of two threads (the obvious alternative) and,
if there are enough rows, in two processes of one thread, which is faster. The latter also reads the rows by length, so
that batches have little padding. The table gives the ratios to the first and to the fastest plain side. The
engines read planned batches of rows with similar lengths in two processes of one thread, as the label job's actors do.
On a GPU every side is one process in bf16, and a further plain side has the batches of the engines' size. Sides take
turns; figures are medians.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.common import BenchmarkResult, describe_machine, device_suffix
from benchmarks.random_models import save_bart, save_rows
from benchmarks.sides import GenerationResult, GenerationTask, Side, generate_batches, make_task
from raydistill.config.run import Dataset, Decoding
from raydistill.core.console import print_progress
from raydistill.data.streaming import scan_split, usable_rows
from raydistill.jobs.pseudolabel import CHARS_PER_TOKEN, GPU_BATCH_CHARS, GPU_BATCH_SIZE, LabelJob
from raydistill.label_sets.batch_plan import BATCH_CHARS, make_plan
from raydistill.results.tables import markdown_table

PLAIN_BATCH_SIZE = 32
PLAIN_SIDES = (
    Side("plain generate, 1 x 2 threads", "generate", processes=1, threads=2),
    Side("plain generate, 2 x 1 thread", "generate", processes=2, threads=1),
    Side("plain generate, 2 x 1 thread, sorted", "generate", processes=2, threads=1, sorted_rows=True),
)
ENGINE_SIDES = (
    Side("transformers", "transformers"),
    Side("ctranslate2 fp32", "ctranslate2"),
    Side("ctranslate2 int8", "ctranslate2", "int8"),
)
GPU_SIDES = (
    Side("plain generate", "generate", "bf16", "cuda", processes=1),
    Side("plain generate, sorted", "generate", "bf16", "cuda", processes=1, sorted_rows=True),
    Side(
        f"plain generate, sorted, batch {GPU_BATCH_SIZE}",
        "generate",
        "bf16",
        "cuda",
        processes=1,
        batch_size=GPU_BATCH_SIZE,
        sorted_rows=True,
    ),
    Side("transformers", "transformers", "bf16", "cuda", processes=1),
    Side("ctranslate2 bf16", "ctranslate2", "bf16", "cuda", processes=1),
)
CASES = ("multi30k", "mscmdlets", "bart-base", "bart-large")
# Enough planned batches for two workers to finish together: a batch holds about 450 rows of multi30k, 70 of mscmdlets
# and 16 of the BART cases.
ROWS = {"multi30k": 4000, "mscmdlets": 2000, "bart-base": 64, "bart-large": 32}
REPEATS = {"multi30k": 2, "mscmdlets": 2, "bart-base": 1, "bart-large": 1}
RANDOM_SOURCE_TOKENS = (100, 500)
RANDOM_OUTPUT_TOKENS = 40


@dataclass(frozen=True)
class SideRun:
    """One side's run over all rows.

    Attributes:
        texts: the texts in the order of the data.
        seconds: from the first batch to the end of the last one.
        startup: seconds until all processes were warm.
    """

    texts: list[str]
    seconds: float
    startup: float


def main() -> None:
    """Run the command line."""
    options = _parse_arguments()
    machine = describe_machine(options.device)
    with tempfile.TemporaryDirectory() as scratch:
        records = {case: measure_case(case, options, Path(scratch)) for case in options.case}
    sections = [f"## {case}\n\n{record['what']}\n\n{_table(record)}" for case, record in records.items()]
    markdown = "\n\n".join(sections)
    print(markdown)
    title = "Engines and plain generate"
    suffix = device_suffix(options.device)
    print(BenchmarkResult("pseudolabel_engines", title, markdown, records, machine, suffix).write())


def measure_case(case: str, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Run all sides of a case in turn, as often as asked for; return a description and each side's figures."""
    job, description = _make_job(case, options, scratch)
    task = make_task(job, scratch / f"{case}-engines")
    rows = list(usable_rows(job.dataset, job.split, scan_split(job.dataset, job.split)))
    max_source_chars = CHARS_PER_TOKEN * task.max_source_tokens
    plan = make_plan(
        iter(rows), scratch / f"{case}-plan", batch_chars=options.batch_chars, max_source_chars=max_source_chars
    )
    planned_batches = [plan.read_batch(n) for n in range(len(plan))]
    sides = _select_sides(options, len(rows))
    # The first start converts the model and validates the conversion; later starts reuse both.
    first_startup = {s.name: generate_batches(s, task, []).startup for s in sides if s.engine == "ctranslate2"}
    runs: dict[str, list[SideRun]] = {side.name: [] for side in sides}
    repeats = options.repeats or REPEATS[case]
    sources = [row.source for row in rows]
    for repeat in range(repeats):
        for side in sides:
            batch_size = side.batch_size if side.engine == "generate" else options.rows_at_once
            run = _run_side(replace(side, batch_size=batch_size), task, sources, planned_batches)
            runs[side.name].append(run)
            print_progress(f"{case} {repeat + 1}/{repeats} {side.name}: {len(rows) / run.seconds:.2f} rows/s")
    description += f" {len(rows)} rows in {len(plan)} planned batches; {_describe_decoding(task)}; median of {repeats}."
    figures = [_side_figures(side, runs[side.name], first_startup.get(side.name)) for side in sides]
    return {"what": description, "rows": len(rows), "sides": _add_ratios(figures, runs)}


def _select_sides(options: argparse.Namespace, num_rows: int) -> list[Side]:
    """The sides of the device whose names match `--side`; plain sides need a batch for each process."""
    candidates = (*PLAIN_SIDES, *ENGINE_SIDES) if options.device == "cpu" else GPU_SIDES
    return [
        side
        for side in candidates
        if (not options.side or any(word in side.name for word in options.side))
        and (side.engine != "generate" or num_rows >= _plain_batch_size(side) * side.processes)
    ]


def _run_side(
    side: Side, task: GenerationTask, sources: list[str], planned_batches: list[dict[str, list[Any]]]
) -> SideRun:
    """Run one side over all rows: plain `generate` in the order of the data or by length, engines in the plan."""
    if side.engine == "generate":
        row_numbers = list(range(len(sources)))
        if side.sorted_rows:
            row_numbers.sort(key=lambda row: -len(sources[row]))
        ordered = [sources[row] for row in row_numbers]
        size = _plain_batch_size(side)
        batches = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    else:
        batches = [batch["sources"] for batch in planned_batches]
        # The data fit into one window of the plan, so that positions in the window are row numbers.
        row_numbers = [position for batch in planned_batches for position in batch["positions"]]
    result = generate_batches(side, task, batches)
    return SideRun(_in_data_order(result, row_numbers), result.seconds, result.startup)


def _plain_batch_size(side: Side) -> int:
    return side.batch_size or PLAIN_BATCH_SIZE


def _in_data_order(result: GenerationResult, row_numbers: list[int]) -> list[str]:
    texts = [text for batch in result.texts for text in batch]
    return [text for _, text in sorted(zip(row_numbers, texts, strict=True))]


def _side_figures(side: Side, runs: Sequence[SideRun], first_startup: float | None) -> dict[str, Any]:
    rates = sorted(len(run.texts) / run.seconds for run in runs)
    return {
        "side": side.name,
        "plain": side.engine == "generate",
        "rows_per_s": statistics.median(rates),
        "lowest": rates[0],
        "highest": rates[-1],
        "startup_s": statistics.median(run.startup for run in runs),
        "first_start_s": first_startup,
    }


def _add_ratios(figures: list[dict[str, Any]], runs: dict[str, list[SideRun]]) -> list[dict[str, Any]]:
    """Add each side's ratios to the first and to the faster plain side, and its share of texts equal to the latter."""
    plain = [record for record in figures if record["plain"]]
    if not plain:
        return figures
    fastest = max(plain, key=lambda record: record["rows_per_s"])
    plain_texts = runs[fastest["side"]][0].texts
    for record in figures:
        texts = runs[record["side"]][0].texts
        record["times_obvious"] = record["rows_per_s"] / plain[0]["rows_per_s"]
        record["times"] = record["rows_per_s"] / fastest["rows_per_s"]
        record["identical"] = sum(a == b for a, b in zip(texts, plain_texts, strict=True)) / len(plain_texts)
    return figures


def _table(record: dict[str, Any]) -> str:
    header = [
        *("side", "rows/s", "lowest to highest", "times the first plain side", "times the fastest plain side"),
        *("identical texts", "start-up s", "first start-up s"),
    ]
    rows = [
        [
            side["side"],
            f"{side['rows_per_s']:.2f}",
            f"{side['lowest']:.2f} to {side['highest']:.2f}",
            f"{side['times_obvious']:.2f}" if "times_obvious" in side else "-",
            f"{side['times']:.2f}" if "times" in side else "-",
            f"{side['identical']:.1%}" if "identical" in side else "-",
            f"{side['startup_s']:.1f}",
            f"{side['first_start_s']:.1f}" if side["first_start_s"] else "-",
        ]
        for side in record["sides"]
    ]
    return markdown_table(header, rows)


def _make_job(case: str, options: argparse.Namespace, scratch: Path) -> tuple[LabelJob, str]:
    """The label job of a case, and its description."""
    rows = options.rows or ROWS[case]
    if case == "multi30k":
        data = Dataset(name=str(options.data / "multi30k_en_de"), train_rows=rows)
        description = "Trained 6-6 teacher of the Marian family, width 128, training split."
        return LabelJob(str(options.multi30k_teacher), data, decoding=Decoding(beams=4)), description
    if case == "mscmdlets":
        data = Dataset(name=str(options.data / "mscmdlets"), train_rows=rows, max_source_tokens=96)
        description = "Trained 2-4 teacher of the BART family, width 128, training split."
        return LabelJob(str(options.mscmdlets_teacher), data, decoding=Decoding(beams=4)), description
    rows = min(rows, ROWS[case]) if options.device == "cpu" else rows
    size = case.removeprefix("bart-")
    teacher = save_bart(size, scratch / case)
    file = save_rows(scratch / f"{case}.jsonl", rows, *RANDOM_SOURCE_TOKENS)
    # `generate` counts the start token, and the last token is forced to be the end token.
    decoding = Decoding(beams=4, min_length=RANDOM_OUTPUT_TOKENS, max_length=RANDOM_OUTPUT_TOKENS + 1)
    shortest, longest = RANDOM_SOURCE_TOKENS
    description = f"BART-{size} with random weights, {shortest} to {longest} source tokens, uniformly distributed."
    return LabelJob(str(teacher), Dataset(name=str(file)), decoding=decoding), description


def _describe_decoding(task: GenerationTask) -> str:
    beam = task.beam
    return f"{beam.beams} beams, lengths {beam.min_length} to {beam.max_length}, length penalty {beam.length_penalty:g}"


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path("../shared")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    parser.add_argument("--side", nargs="+", default=[], help="only sides whose name contains one of these words")
    parser.add_argument("--rows", type=int, help=f"default: {ROWS}; an upper limit for BART cases on a CPU")
    parser.add_argument("--repeats", type=int, help=f"default: {REPEATS}")
    parser.add_argument("--rows-at-once", type=int, help="rows per call of an engine; default: as in the label job")
    parser.add_argument("--batch-chars", type=int, help="characters per planned batch; default: as in the label job")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--data", type=Path, default=shared / "data", help="folder of the data sets")
    parser.add_argument("--multi30k-teacher", type=Path, default=shared / "teachers" / "multi30k-marian-6-6")
    parser.add_argument("--mscmdlets-teacher", type=Path, default=Path("outputs/runs/mscmdlets-teacher/best"))
    options = parser.parse_args()
    options.batch_chars = options.batch_chars or (BATCH_CHARS if options.device == "cpu" else GPU_BATCH_CHARS)
    teachers = {"multi30k": options.multi30k_teacher, "mscmdlets": options.mscmdlets_teacher}
    for case, folder in teachers.items():
        if case in options.case and not folder.is_dir():
            parser.error(f"--{case}-teacher: {folder}: no such folder")
    return options


if __name__ == "__main__":
    main()
