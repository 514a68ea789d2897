"""The speed-ups of the paper's Tables 6 and 7: the real BART-large and Pegasus-large shapes, random weights, batch 32.

Source and output lengths are fixed at the corpus's means (the paper's words in tokens), beams are the teacher's own,
and the engine is the one that serves. Time depends on shapes and not on the weights' values.

    python -m benchmarks.speedups                      # all shapes on two CPU threads: about an hour
    python -m benchmarks.speedups --tables bart-xsum

Each shape's time is kept under outputs/ as it is made: the same command goes on where a killed one was.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

from benchmarks.common import describe_machine, write_result
from benchmarks.random_models import large
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

TOKENS_PER_WORD = 1.15  # of English in BART's vocabulary


class Case(NamedTuple):
    """A teacher on a data set: the paper's names, mean source and target words, the teacher's beams."""

    form: str
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
POSITIONS = {("pegasus", "XSUM"): 512}


def sizes_of(case: Case) -> list[str]:
    """The sizes of the paper's table, the teacher's own first."""
    listed = [size for teacher, size, data in TABLES_6_7 if (teacher, data) == (case.teacher, case.data)]
    return sorted(listed, key=lambda size: -TABLES_6_7[case.teacher, size, case.data].latency_ms)


def lengths(case: Case) -> tuple[int, int]:
    """Source tokens, cut as the teacher's preset cuts them, and output tokens."""
    limit = POSITIONS.get((case.form, case.data), 1024)
    return min(limit, round(case.source_words * TOKENS_PER_WORD)), round(case.target_words * TOKENS_PER_WORD)


def time_size(
    teacher: PreTrainedModel, tokenizer: Any, case: Case, size: str, asked: argparse.Namespace
) -> latency.Timing:
    """A size's timing: from the table of measurements, else measured and put there."""
    layers = plan_layers(families.num_layers(teacher.config), Student(size=size))
    source, output = lengths(case)
    workload = Workload(source_tokens=source, output_tokens=output, batch=asked.batch, beams=case.beams)
    facts = latency.measurement_key(
        latency.hardware(asked.device, asked.threads),
        families.architecture_key(families.with_num_layers(teacher.config, *layers.size)),
        asked.engine,
        asked.precision,
        workload,
    )
    table = raydistill_home() / "speedups.json"
    if found := latency.lookup(table, facts):
        return found
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        save_checkpoint(shrink(teacher, layers), tokenizer, place / "model")
        engine = open_engine(
            place / "model",
            asked.engine,
            EngineOptions(
                device=asked.device,
                threads=asked.threads,
                precision=asked.precision,
                cache_dir=place / "engine",
                allow_fallback=False,
            ),
        )
        timing = latency.measure(engine, workload, latency.Repetition(asked.repeats, min_seconds=0.0))
    latency.record(table, facts, timing)
    return timing


def rows_of(case: Case, asked: argparse.Namespace) -> list[list[str]]:
    """A row per size, with the paper's time and speed-up beside."""
    config, tokenizer = large(case.form)
    with torch.device(asked.device):  # random weights of this size take a CPU many seconds
        teacher: PreTrainedModel = AutoModelForSeq2SeqLM.from_config(config).eval()
    rows = []
    base = None
    for size in sizes_of(case):
        timing = time_size(teacher, tokenizer, case, size, asked)
        base = base or timing.median_ms
        theirs = TABLES_6_7[case.teacher, size, case.data]
        speedup = base / timing.median_ms
        print_progress(f"{case.teacher} {case.data} {size}: {timing.median_ms:.0f} ms, {speedup:.2f}x")
        paper = "" if theirs.speedup is None else f"{theirs.speedup:.2f}"
        row = [f"{timing.median_ms:.0f}", f"{timing.low_ms:.0f} to {timing.high_ms:.0f}", f"{speedup:.2f}"]
        rows.append([case.teacher, case.data, size, *row, str(theirs.latency_ms), paper])
    return rows


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engine", choices=["ctranslate2", "transformers"], default="ctranslate2")
    parser.add_argument("--precision", choices=["fp32", "bf16", "int8"], default="fp32")
    asked = parser.parse_args()
    machine = describe_machine(asked.device)
    rows = [row for name in asked.tables for row in rows_of(CASES[name], asked)]
    header = ["teacher", "data", "size", "ms", "lowest to highest", "speed-up", "ms (paper)", "speed-up (paper)"]
    what = f"{asked.engine} {asked.precision}, {asked.threads} threads, batch {asked.batch}, median of {asked.repeats}"
    used = {f"{CASES[n].teacher} {CASES[n].data}": (*lengths(CASES[n]), CASES[n].beams) for n in asked.tables}
    text = f"{what}. Source tokens, output tokens and beams: {used}.\n\n{markdown_table(header, rows)}"
    print(text)
    data = [dict(zip(header, row, strict=True)) for row in rows]
    write_result("speedups", "Speed-ups of the shapes of Tables 6 and 7", text, data, machine, device=asked.device)


if __name__ == "__main__":
    main()
