"""What Ray costs the pseudo-label job, and how much faster two actors are than one.

overhead: the whole product, `pseudolabel()` on a Ray of this machine, against plain processes that run the same engine
over the same planned batches and write no files. scaling: two actors against one, and two plain processes against
one, which is as much as this machine has.

Rates are counted alike on all sides, from the moments at which batches end: each worker's rows after its first batch
by the time since that one. So start-up, the conversion and what the product does before and after are apart.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from benchmarks.common import describe_machine, write_result
from benchmarks.sides import GenerationTask, Side, generate_batches, make_task
from benchmarks.timestamps import BatchEnd, open_recording_engine, rate, read_ends, write_jsonl
from raydistill.cluster.start import ray_cluster
from raydistill.config.run import Dataset, Decoding
from raydistill.core.console import print_progress
from raydistill.data.corpus import read_corpus
from raydistill.data.streaming import scan_split, usable_rows
from raydistill.inference.engines import open_engine
from raydistill.jobs.pseudolabel import LabelJob, pseudolabel
from raydistill.label_sets.batch_plan import BatchPlan, make_plan
from raydistill.label_sets.label_set import read_manifest
from raydistill.results.tables import markdown_table

PARTS = ("overhead", "scaling")


def main() -> None:
    """Run the parts, print and write the result."""
    asked = _arguments()
    machine = describe_machine()
    found: dict[str, Any] = {}
    texts = []
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(asked.teacher, asked.data, Path(scratch))
        guess = bench.guess_rate()
        if "overhead" in asked.part:
            rows = round(60 * asked.minutes * guess)
            found["overhead"] = overhead(bench, rows)
            texts.append(f"## Overhead\n\n{_overhead_text(found['overhead'])}")
        if "scaling" in asked.part:
            rows = round(60 * asked.scaling_minutes * guess / 2)
            found["scaling"] = scaling(bench, rows, asked.repeats)
            texts.append(f"## Two against one\n\n{_scaling_text(found['scaling'])}")
    markdown = "\n\n".join(texts)
    print(markdown)
    print(write_result("pseudolabel_ray", "The pseudo-label job on Ray", markdown, found, machine))


class Bench:
    """The trained teacher, its data repeated to any number of rows, and the two ways to label them."""

    def __init__(self, teacher: Path, data: Path, place: Path) -> None:
        self.teacher, self.place = teacher, place
        self.corpus = read_corpus(Dataset(name=str(data)), "train")
        self.engines = place / "engines"
        self.runs = 0

    def job(self, rows: int) -> LabelJob:
        """A job over `rows` rows: the training split, again and again under new ids."""
        file = self.place / f"rows-{rows}.jsonl"
        if not file.is_file():
            pairs = islice(cycle(zip(self.corpus.sources, self.corpus.targets, strict=True)), rows)
            write_jsonl(file, pairs)
        return LabelJob(str(self.teacher), Dataset(name=str(file)), decoding=Decoding(beams=4), metric="bleu")

    def guess_rate(self) -> float:
        """Rows per second of two plain processes, roughly, to size the rest; it converts the model as well."""
        return rate(self.plain(3000, 2))

    def plain(self, rows: int, processes: int) -> list[BatchEnd]:
        """Label with plain processes of one thread that are handed the planned batches."""
        job = self.job(rows)
        plan = self._plan(job, rows)
        sources = [plan.read_batch(n)["sources"] for n in range(len(plan))]
        written = generate_batches(Side("bare", "ctranslate2", processes=processes), self._work(job), sources)
        ends = zip(written.ends, sources, strict=True)
        return [BatchEnd(worker, at, len(batch)) for (worker, at), batch in ends]

    def product(self, rows: int, actors: int) -> tuple[list[BatchEnd], dict[str, float]]:
        """Label with the product, from no Ray to the finished label set; seconds before, within and after labelling."""
        self.runs += 1
        root = self.place / f"labels-{self.runs}"
        stamps = self.place / f"stamps-{self.runs}"
        with ray_cluster(actors):
            began = time.time()
            opener = partial(open_recording_engine, stamps, open_engine)
            folder = pseudolabel(self.job(rows), root, verbose=False, engine_factory=opener)
            ended = time.time()
        assert read_manifest(folder).rows == rows
        ends = read_ends(stamps)
        assert sum(end.rows for end in ends) == rows
        first, last = min(end.at for end in ends), max(end.at for end in ends)
        return ends, {"before_s": first - began, "labelling_s": last - first, "after_s": ended - last}

    def _plan(self, job: LabelJob, rows: int) -> BatchPlan:
        found = scan_split(job.dataset, job.split)
        return make_plan(usable_rows(job.dataset, job.split, found), self.place / f"plan-{rows}")

    def _work(self, job: LabelJob) -> GenerationTask:
        return make_task(job, self.engines)


def overhead(bench: Bench, rows: int) -> dict[str, Any]:
    """The product against plain processes on the same planned batches, two workers of one thread each."""
    plain = rate(bench.plain(rows, 2))
    print_progress(f"overhead: plain processes {plain:.1f} rows/s on {rows} rows")
    ends, seconds = bench.product(rows, 2)
    ours = rate(ends)
    print_progress(f"overhead: the product {ours:.1f} rows/s")
    return {"rows": rows, "batches": len(ends), "plain": plain, "product": ours, "share": 1 - ours / plain, **seconds}


def scaling(bench: Bench, rows: int, repeats: int) -> dict[str, Any]:
    """Rows per second of one and two workers of one thread, plain and of the product, taking turns."""
    ways: dict[str, Callable[[], list[BatchEnd]]] = {
        "plain 1": lambda: bench.plain(rows, 1),
        "product 1": lambda: bench.product(rows, 1)[0],
        "plain 2": lambda: bench.plain(rows, 2),
        "product 2": lambda: bench.product(rows, 2)[0],
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            rates[name].append(rate(run()))
            print_progress(f"scaling: {name}: {rates[name][-1]:.1f} rows/s on {rows} rows")
    middle = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "rows": rows,
        "rates": rates,
        "plain": middle["plain 2"] / middle["plain 1"],
        "product": middle["product 2"] / middle["product 1"],
        "median": middle,
    }


def _overhead_text(found: dict[str, Any]) -> str:
    rows = [
        ["plain processes, no files", f"{found['plain']:.1f}", "-"],
        ["the product on Ray", f"{found['product']:.1f}", f"{found['share']:.1%}"],
    ]
    return (
        f"{found['rows']} rows in {found['batches']} planned batches, two workers of one thread, "
        "CTranslate2 fp32, 4 beams.\n\n"
        f"{markdown_table(['', 'rows/s', 'overhead'], rows)}\n\n"
        f"The product's job: {found['before_s']:.1f} s until the first batch was done (reading, checking, planning, "
        f"actors), {found['labelling_s']:.1f} s from there to the last one, {found['after_s']:.1f} s to score and to "
        "write the label set."
    )


def _scaling_text(found: dict[str, Any]) -> str:
    middle = found["median"]
    rows = [
        [who, f"{middle[f'{who} 1']:.1f}", f"{middle[f'{who} 2']:.1f}", f"{found[who]:.2f}"]
        for who in ("plain", "product")
    ]
    table = markdown_table(["", "one worker, rows/s", "two", "times"], rows)
    return f"{found['rows']} rows, workers of one thread, median of {len(found['rates']['plain 1'])}.\n\n{table}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path("../shared")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--minutes", type=float, default=5, help="of each side's labelling, for overhead")
    parser.add_argument("--scaling-minutes", type=float, default=2, help="of one worker's labelling, for scaling")
    parser.add_argument("--repeats", type=int, default=1, help="of scaling")
    parser.add_argument("--data", type=Path, default=shared / "data" / "multi30k_en_de")
    parser.add_argument("--teacher", type=Path, default=shared / "teachers" / "multi30k-marian-6-6")
    return parser.parse_args()


if __name__ == "__main__":
    main()
