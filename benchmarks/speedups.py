"""Speed-ups of Tables 6 and 7 of the paper: BART-large and Pegasus-large shapes with random weights, batch 32.

Source and output lengths are the means of the corpus (the paper's word counts, in tokens). Beams are the teacher's, and
the engine is the one that serves students. The time depends on the shape, not on the values of the weights.

    python -m benchmarks.speedups                      # all shapes on two CPU threads: about an hour
    python -m benchmarks.speedups --tables bart-xsum

Each time is saved at once in RAYDISTILL_HOME; the same command resumes an interrupted benchmark.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedModel

from benchmarks import latency_table
from benchmarks.common import BenchmarkResult, architecture_key, describe_machine, device_suffix
from benchmarks.random_models import large_config
from raydistill.config.run import Student
from raydistill.core.console import print_progress
from raydistill.core.paths import raydistill_home
from raydistill.evaluation import latency
from raydistill.inference.decoding import EngineOptions, Workload
from raydistill.inference.engines import open_engine
from raydistill.models import families
from raydistill.models.saving import save_checkpoint
from raydistill.models.shrinking import plan_layers, shrink
from raydistill.paper.published import TABLES_6_7
from raydistill.results.tables import markdown_table

TOKENS_PER_WORD = 1.15  # English in BART's vocabulary


class Case(NamedTuple):
    """A teacher on a data set: names in the paper, mean words of source and target, beams of the teacher."""

    family: str
    teacher: str
    data: str
    source_words: int
    target_words: int
    beams: int


CASES = {
    "bart-xsum": Case("bart", "BART", "XSUM", 358, 21, 6),
    "pegasus-xsum": Case("pegasus", "Pegasus", "XSUM", 358, 21, 8),
    "bart-cnn": Case("bart", "BART", "CNN", 756, 56, 4),
    "pegasus-cnn": Case("pegasus", "Pegasus", "CNN", 756, 56, 8),
}
MAX_SOURCE_TOKENS = {("pegasus", "XSUM"): 512}  # of the teacher's preset, by default 1024


def published_sizes(case: Case) -> list[str]:
    """The sizes in the paper's table, the slowest (the teacher's) first."""
    sizes = [size for teacher, size, data in TABLES_6_7 if (teacher, data) == (case.teacher, case.data)]
    return sorted(sizes, key=lambda size: -TABLES_6_7[case.teacher, size, case.data].latency_ms)


def case_lengths(case: Case) -> tuple[int, int]:
    """Source tokens, truncated as in the teacher's preset, and output tokens."""
    limit = MAX_SOURCE_TOKENS.get((case.family, case.data), 1024)
    return min(limit, round(case.source_words * TOKENS_PER_WORD)), round(case.target_words * TOKENS_PER_WORD)


def time_size(
    teacher: PreTrainedModel, tokenizer: Any, case: Case, size: str, options: argparse.Namespace
) -> latency.Timing:
    """The timing of a size, from the table of earlier measurements or by a new measurement."""
    layers = plan_layers(families.num_layers(teacher.config), Student(size=size))
    source_tokens, output_tokens = case_lengths(case)
    workload = Workload(source_tokens=source_tokens, output_tokens=output_tokens, batch=options.batch, beams=case.beams)
    key = latency_table.measurement_key(
        latency.hardware(options.device, options.threads),
        architecture_key(families.with_num_layers(teacher.config, *layers.size)),
        options.engine,
        options.precision,
        workload,
    )
    table = raydistill_home() / "speedups.json"
    if recorded := latency_table.lookup(table, key):
        return recorded
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save_checkpoint(shrink(teacher, layers), tokenizer, folder)
        engine = open_engine(
            folder,
            options.engine,
            EngineOptions(
                device=options.device,
                threads=options.threads,
                precision=options.precision,
                cache_dir=Path(scratch) / "engine",
                allow_fallback=False,
            ),
        )
        timing = latency.measure(engine, workload, latency.Repetition(options.repeats, min_seconds=0.0))
    latency_table.record(table, key, timing)
    return timing


def time_sizes(
    case: Case, sizes: list[str], config: PretrainedConfig, tokenizer: Any, options: argparse.Namespace
) -> dict[str, latency.Timing]:
    """The timings of students of a teacher with random weights, by size."""
    with torch.device(options.device):  # random weights of this size take a CPU many seconds
        teacher: PreTrainedModel = AutoModelForSeq2SeqLM.from_config(config).eval()
    timings = {}
    for size in sizes:
        timings[size] = time_size(teacher, tokenizer, case, size, options)
        print_progress(f"{case.teacher} {case.data} {size}: {timings[size].median_ms:.0f} ms")
    return timings


def table_rows(case: Case, timings: dict[str, latency.Timing]) -> list[list[str]]:
    """A row per size: measured time and speed-up over the first size (the teacher's), and the paper's values."""
    rows = []
    teacher_ms = next(iter(timings.values())).median_ms
    for size, timing in timings.items():
        published = TABLES_6_7[case.teacher, size, case.data]
        rows.append(
            [
                *(case.teacher, case.data, size),
                *(f"{timing.median_ms:.0f}", f"{timing.low_ms:.0f} to {timing.high_ms:.0f}"),
                *(f"{teacher_ms / timing.median_ms:.2f}", str(published.latency_ms)),
                "" if published.speedup is None else f"{published.speedup:.2f}",
            ]
        )
    return rows


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=list(CASES), default=list(CASES), help="default: all")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default: cpu")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--batch", type=int, default=32, help="rows per batch; default: 32")
    parser.add_argument("--repeats", type=int, default=3, help="calls per size; default: 3")
    parser.add_argument("--engine", choices=["ctranslate2", "transformers"], default="ctranslate2")
    parser.add_argument("--precision", choices=["fp32", "bf16", "int8"], default="fp32")
    options = parser.parse_args()
    machine = describe_machine(options.device)
    cases = [CASES[name] for name in options.tables]
    rows = []
    for case in cases:
        timings = time_sizes(case, published_sizes(case), *large_config(case.family), options)
        rows += table_rows(case, timings)
    header = ["teacher", "data", "size", "ms", "lowest to highest", "speed-up", "ms (paper)", "speed-up (paper)"]
    setting = (
        f"{options.engine} {options.precision}, {options.threads} threads, batch {options.batch}, "
        f"median of {options.repeats}"
    )
    lengths = {f"{case.teacher} {case.data}": (*case_lengths(case), case.beams) for case in cases}
    text = f"{setting}. Source tokens, output tokens and beams: {lengths}.\n\n{markdown_table(header, rows)}"
    print(text)
    data = [dict(zip(header, row, strict=True)) for row in rows]
    title = "Speed-ups of the shapes of Tables 6 and 7"
    BenchmarkResult("speedups", title, text, data, machine, device_suffix(options.device)).write()


if __name__ == "__main__":
    main()
