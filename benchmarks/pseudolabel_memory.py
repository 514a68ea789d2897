"""Memory of the label job as a function of the data's size: the product over 10,000 to 300,000 rows.

10,000 rows are half a window of the batch plan; from 20,000 rows on, one whole window is in memory at a time. The
teacher is tiny, so that the memory is the job's and not the model's. Resident memory of the driver, of the actors and
of Ray's own processes is sampled throughout. Each size runs in its own driver process.
"""

import argparse
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.common import BenchmarkResult, describe_machine
from benchmarks.timestamps import open_recording_engine, read_ends, write_jsonl
from raydistill.cluster.start import ray_cluster
from raydistill.config.run import Dataset, Decoding
from raydistill.core.console import print_progress
from raydistill.inference.engines import open_engine
from raydistill.jobs.pseudolabel import LabelJob, pseudolabel
from raydistill.label_sets.label_set import read_manifest
from raydistill.results.tables import markdown_table

ROWS = (10_000, 20_000, 300_000)
SAMPLE_SECONDS = 0.5
# Memory counts as constant if it grows by no more than the larger of a share and an amount.
MAX_GROWTH_SHARE, MAX_GROWTH_MB = 0.10, 50

Samples = list[tuple[float, dict[str, float]]]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help=f"default: {ROWS}")
    options = parser.parse_args()
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as scratch:
        records = [run_in_process(measure_memory, rows, Path(scratch)) for rows in options.rows]
    markdown = as_markdown(records)
    print(markdown)
    print(BenchmarkResult("pseudolabel_memory", "Memory of the label job", markdown, records, machine).write())


def measure_memory(rows: int, scratch: Path) -> dict[str, Any]:
    """Label `rows` rows with a tiny teacher; return peaks of resident memory in MB, and the growth per row."""
    recorded = scratch / f"batch-ends-{rows}"
    factory = partial(open_recording_engine, recorded, open_engine)
    with ray_cluster(2):
        start = time.time()
        with sampled_memory() as samples:
            folder = pseudolabel(
                _make_job(rows, scratch), scratch / f"labels-{rows}", verbose=False, engine_factory=factory
            )
        seconds = time.time() - start
    assert read_manifest(folder).rows == rows
    ends = read_ends(recorded)
    first, last = min(batch.time for batch in ends), max(batch.time for batch in ends)
    record: dict[str, Any] = {
        "rows": rows,
        "seconds": seconds,
        "labelling_s": last - first,
        "samples": len(samples),
        **{process: _memory_figures(samples, process, first, last, rows) for process in ("driver", "actor", "ray")},
    }
    peaks = ", ".join(f"{process} {record[process]['peak_mb']:.0f} MB" for process in ("driver", "actor"))
    print_progress(f"memory: {rows} rows in {seconds:.0f} s, {peaks}")
    return record


def _make_job(rows: int, scratch: Path) -> LabelJob:
    from tests.factories.models import save_tiny, sentences

    teacher = save_tiny("marian", scratch / "teacher")
    file = scratch / f"rows-{rows}.jsonl"
    texts = cycle(sentences(1000))
    write_jsonl(file, islice(((f"{text} {i % 97}", text) for i, text in enumerate(texts)), rows))
    return LabelJob(str(teacher), Dataset(name=str(file)), decoding=Decoding(beams=1, max_length=8), metric="bleu")


def _memory_figures(samples: Samples, process: str, first: float, last: float, rows: int) -> dict[str, Any]:
    """Peaks of a process, in total and by phase, and its growth; labelling lasts from `first` to `last`."""
    times = np.array([when for when, _ in samples])
    used = np.array([mb[process] for _, mb in samples])
    # Caches warm up in the first quarter of the labelling; growth that depends on the rows continues after it.
    steady = (times > first + (last - first) / 4) & (times < last)
    slope = np.polyfit(times[steady], used[steady], 1)[0] if steady.sum() > 2 else 0.0
    phases = {"before": times < first, "labelling": (times >= first) & (times <= last), "after": times > last}
    return {
        "peak_mb": float(used.max()),
        "peak_by_phase": {name: float(used[mask].max(initial=0.0)) for name, mask in phases.items()},
        "mb_per_100k_rows": float(slope) * (last - first) / rows * 100_000,
    }


@contextmanager
def sampled_memory() -> Iterator[Samples]:
    """Context that samples resident MB: of this process, of the largest actor, and of Ray's own processes."""
    samples: Samples = []
    stop = threading.Event()

    def sample_until_stopped() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            samples.append((time.time(), _resident_mb()))

    thread = threading.Thread(target=sample_until_stopped, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def _resident_mb() -> dict[str, float]:
    driver = psutil.Process()
    resident = {"driver": driver.memory_info().rss / 1e6, "actor": 0.0, "ray": 0.0}
    for child in driver.children(recursive=True):
        try:
            used = child.memory_info().rss / 1e6
            is_actor = "MapWorker" in " ".join(child.cmdline())
        except psutil.Error:  # the process has just ended
            continue
        if is_actor:
            resident["actor"] = max(resident["actor"], used)
        else:
            resident["ray"] += used
    return resident


def run_in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a new process, so that memory of earlier sizes is not counted."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def as_markdown(records: list[dict[str, Any]]) -> str:
    """A table of the sizes, and whether the largest size needs more memory than the others."""
    header = [
        *("rows", "seconds", "driver peak MB: planning", "labelling", "writing", "actor peak MB", "Ray's own MB"),
        *("driver MB per 100k rows", "actor"),
    ]
    rows = [
        [
            f"{record['rows']}",
            f"{record['seconds']:.0f}",
            *(f"{mb:.0f}" for mb in record["driver"]["peak_by_phase"].values()),
            *(f"{record[process]['peak_mb']:.0f}" for process in ("actor", "ray")),
            *(f"{record[process]['mb_per_100k_rows']:+.1f}" for process in ("driver", "actor")),
        ]
        for record in records
    ]
    largest = records[-1]
    verdicts = [
        f"From {smaller['rows']} to {largest['rows']} rows, {process}: "
        f"{_describe_growth(smaller[process]['peak_mb'], largest[process]['peak_mb'])}."
        for smaller in records[:-1]
        for process in ("driver", "actor")
    ]
    return (
        f"{markdown_table(header, rows)}\n\nPeaks of resident memory, including shared pages; of the actors, the "
        f"larger one. Planning lasts until the first batch is finished. Growth is fitted over the last three quarters "
        f"of the labelling. {' '.join(verdicts)}"
    )


def _describe_growth(small_mb: float, large_mb: float) -> str:
    constant = large_mb - small_mb <= max(MAX_GROWTH_MB, MAX_GROWTH_SHARE * small_mb)
    return f"{large_mb - small_mb:+.0f} MB, {'constant' if constant else 'NOT constant'}"


if __name__ == "__main__":
    main()
