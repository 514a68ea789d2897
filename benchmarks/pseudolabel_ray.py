"""Overhead of Ray in the label job, and the speed-up of two actors over one.

overhead: the whole label job, `pseudolabel()` on a local Ray, compared with plain processes that run the same engine on
the same planned batches and write no files. scaling: two actors compared with one, and two plain processes compared
with one, which is the most that this machine can give.

Rates of all sides are computed in the same way from the ends of batches: each worker's rows after its first batch, by
the time since that batch. Start-up, conversion and the job's work before and after labelling are separate.
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

from benchmarks.common import BenchmarkResult, describe_machine
from benchmarks.sides import Side, generate_batches, make_task
from benchmarks.timestamps import BatchEnd, open_recording_engine, read_ends, steady_rate, write_jsonl
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
ESTIMATE_ROWS = 3000


def main() -> None:
    """Run the command line."""
    options = _parse_arguments()
    machine = describe_machine()
    results: dict[str, Any] = {}
    sections = []
    with tempfile.TemporaryDirectory() as scratch:
        labelling = Labelling(options.teacher, options.data, Path(scratch))
        rate = steady_rate(labelling.with_processes(ESTIMATE_ROWS, 2))  # also converts the model
        if "overhead" in options.part:
            results["overhead"] = measure_overhead(labelling, round(60 * options.minutes * rate))
            sections.append(f"## Overhead\n\n{_overhead_text(results['overhead'])}")
        if "scaling" in options.part:
            rows = round(60 * options.scaling_minutes * rate / 2)
            results["scaling"] = measure_scaling(labelling, rows, options.repeats)
            sections.append(f"## Two workers and one\n\n{_scaling_text(results['scaling'])}")
    markdown = "\n\n".join(sections)
    print(markdown)
    print(BenchmarkResult("pseudolabel_ray", "The label job on Ray", markdown, results, machine).write())


class Labelling:
    """A trained teacher and its data, repeated to any number of rows; labels with plain processes or the label job.

    Args:
        teacher: the teacher's folder.
        data: the folder of the data set.
        scratch: a folder for temporary files.
    """

    def __init__(self, teacher: Path, data: Path, scratch: Path) -> None:
        self.teacher, self.scratch = teacher, scratch
        self.corpus = read_corpus(Dataset(name=str(data)), "train")
        self.num_runs = 0

    def job(self, rows: int) -> LabelJob:
        """A label job over `rows` rows: the training split, repeated with new ids."""
        file = self.scratch / f"rows-{rows}.jsonl"
        if not file.is_file():
            pairs = islice(cycle(zip(self.corpus.sources, self.corpus.targets, strict=True)), rows)
            write_jsonl(file, pairs)
        return LabelJob(str(self.teacher), Dataset(name=str(file)), decoding=Decoding(beams=4), metric="bleu")

    def with_processes(self, rows: int, processes: int) -> list[BatchEnd]:
        """Label with plain processes of one thread, which receive the planned batches."""
        job = self.job(rows)
        plan = self._plan(job, rows)
        batches = [plan.read_batch(n)["sources"] for n in range(len(plan))]
        task = make_task(job, self.scratch / "engines")
        result = generate_batches(Side("plain", "ctranslate2", processes=processes), task, batches)
        return [BatchEnd(worker, at, len(batch)) for (worker, at), batch in zip(result.ends, batches, strict=True)]

    def with_job(self, rows: int, actors: int) -> tuple[list[BatchEnd], dict[str, float]]:
        """Run the label job on a new Ray; also return the seconds before, during and after labelling."""
        self.num_runs += 1
        recorded = self.scratch / f"batch-ends-{self.num_runs}"
        factory = partial(open_recording_engine, recorded, open_engine)
        with ray_cluster(actors):
            start = time.time()
            output = self.scratch / f"labels-{self.num_runs}"
            folder = pseudolabel(self.job(rows), output, verbose=False, engine_factory=factory)
            end = time.time()
        assert read_manifest(folder).rows == rows
        ends = read_ends(recorded)
        assert sum(batch.rows for batch in ends) == rows
        first, last = min(batch.time for batch in ends), max(batch.time for batch in ends)
        return ends, {"before_s": first - start, "labelling_s": last - first, "after_s": end - last}

    def _plan(self, job: LabelJob, rows: int) -> BatchPlan:
        scan_result = scan_split(job.dataset, job.split)
        return make_plan(usable_rows(job.dataset, job.split, scan_result), self.scratch / f"plan-{rows}")


def measure_overhead(labelling: Labelling, rows: int) -> dict[str, Any]:
    """Compare the label job with plain processes on the same planned batches, with two workers of one thread."""
    plain_rate = steady_rate(labelling.with_processes(rows, 2))
    print_progress(f"overhead: plain processes {plain_rate:.1f} rows/s on {rows} rows")
    ends, seconds = labelling.with_job(rows, 2)
    job_rate = steady_rate(ends)
    print_progress(f"overhead: label job {job_rate:.1f} rows/s")
    rates = {"plain": plain_rate, "product": job_rate, "share": 1 - job_rate / plain_rate}
    return {"rows": rows, "batches": len(ends), **rates, **seconds}


def measure_scaling(labelling: Labelling, rows: int, repeats: int) -> dict[str, Any]:
    """Rows per second with one and two workers of one thread, of plain processes and of the label job, in turn."""
    sides: dict[str, Callable[[], list[BatchEnd]]] = {
        "plain 1": lambda: labelling.with_processes(rows, 1),
        "product 1": lambda: labelling.with_job(rows, 1)[0],
        "plain 2": lambda: labelling.with_processes(rows, 2),
        "product 2": lambda: labelling.with_job(rows, 2)[0],
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            rates[name].append(steady_rate(run()))
            print_progress(f"scaling: {name}: {rates[name][-1]:.1f} rows/s on {rows} rows")
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "rows": rows,
        "rates": rates,
        "plain": medians["plain 2"] / medians["plain 1"],
        "product": medians["product 2"] / medians["product 1"],
        "median": medians,
    }


def _overhead_text(record: dict[str, Any]) -> str:
    rows = [
        ["plain processes, no files", f"{record['plain']:.1f}", "-"],
        ["label job on Ray", f"{record['product']:.1f}", f"{record['share']:.1%}"],
    ]
    return (
        f"{record['rows']} rows in {record['batches']} planned batches, two workers of one thread, "
        "CTranslate2 fp32, 4 beams.\n\n"
        f"{markdown_table(['', 'rows/s', 'overhead'], rows)}\n\n"
        f"The label job took {record['before_s']:.1f} s until the first batch was finished (reading, checking, "
        f"planning, start of the actors), {record['labelling_s']:.1f} s from then to the last batch, and "
        f"{record['after_s']:.1f} s to compute scores and write the label set."
    )


def _scaling_text(record: dict[str, Any]) -> str:
    medians = record["median"]
    rows = [
        [name, f"{medians[f'{key} 1']:.1f}", f"{medians[f'{key} 2']:.1f}", f"{record[key]:.2f}"]
        for key, name in (("plain", "plain processes"), ("product", "label job"))
    ]
    table = markdown_table(["", "one worker, rows/s", "two workers, rows/s", "ratio"], rows)
    return f"{record['rows']} rows, workers of one thread, median of {len(record['rates']['plain 1'])}.\n\n{table}"


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path("../shared")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--minutes", type=float, default=5, help="overhead: labelling of each side; default: 5")
    parser.add_argument("--scaling-minutes", type=float, default=2, help="scaling: labelling of one worker; default: 2")
    parser.add_argument("--repeats", type=int, default=1, help="scaling: default 1")
    parser.add_argument("--data", type=Path, default=shared / "data" / "multi30k_en_de")
    parser.add_argument("--teacher", type=Path, default=shared / "teachers" / "multi30k-marian-6-6")
    return parser.parse_args()


if __name__ == "__main__":
    main()
