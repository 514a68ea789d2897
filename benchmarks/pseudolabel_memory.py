"""Does the pseudo-label job's memory depend on the size of the data? The product over 10,000 to 300,000 rows.

10,000 rows are half a window of the plan; from 20,000 rows on a whole one is held at a time. The teacher is tiny, so
that it is the job and not the model that fills the memory. Resident memory of the driver, of the actors and of Ray's
own processes is sampled all the while; each size runs in a driver process of its own.
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

from benchmarks.common import describe_machine, write_result
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
# Memory is called flat where many times the rows take at most this much more.
FLAT_SHARE, FLAT_MB = 0.10, 50


def main() -> None:
    """Run each size, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help=f"default: {ROWS}")
    asked = parser.parse_args()
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as scratch:
        found = [in_a_process(memory, rows, Path(scratch)) for rows in asked.rows]
    markdown = report(found)
    print(markdown)
    print(write_result("pseudolabel_memory", "Memory of the pseudo-label job", markdown, found, machine))


def memory(rows: int, place: Path) -> dict[str, Any]:
    """Label `rows` rows with a tiny teacher; peaks of resident memory in MB and their growth with the rows."""
    from tests.factories.models import save_tiny, sentences

    teacher = save_tiny("marian", place / "tiny")
    file = place / f"tiny-{rows}.jsonl"
    texts = cycle(sentences(1000))
    write_jsonl(file, islice(((f"{text} {i % 97}", text) for i, text in enumerate(texts)), rows))
    job = LabelJob(str(teacher), Dataset(name=str(file)), decoding=Decoding(beams=1, max_length=8), metric="bleu")
    stamps = place / f"tiny-stamps-{rows}"
    with ray_cluster(2):
        began = time.time()
        with sampled() as samples:
            opener = partial(open_recording_engine, stamps, open_engine)
            folder = pseudolabel(job, place / f"tiny-labels-{rows}", verbose=False, engine_factory=opener)
        seconds = time.time() - began
    assert read_manifest(folder).rows == rows
    ends = read_ends(stamps)
    first, last = min(end.at for end in ends), max(end.at for end in ends)
    at = np.array([when for when, _ in samples])
    found: dict[str, Any] = {"rows": rows, "seconds": seconds, "labelling_s": last - first, "samples": len(samples)}
    for who in ("driver", "actor", "ray"):
        used = np.array([mb[who] for _, mb in samples])
        # The first quarter of the labelling warms caches; growth that is due to the rows goes on after it.
        settled = (at > first + (last - first) / 4) & (at < last)
        slope = np.polyfit(at[settled], used[settled], 1)[0] if settled.sum() > 2 else 0.0
        phases = {"before": at < first, "labelling": (at >= first) & (at <= last), "after": at > last}
        found[who] = {
            "peak_mb": float(used.max()),
            "peak_by_phase": {name: float(used[among].max(initial=0.0)) for name, among in phases.items()},
            "mb_per_100k_rows": float(slope) * (last - first) / rows * 100_000,
        }
    peaks = ", ".join(f"{who} {found[who]['peak_mb']:.0f} MB" for who in ("driver", "actor"))
    print_progress(f"memory: {rows} rows in {seconds:.0f} s, {peaks}")
    return found


@contextmanager
def sampled() -> Iterator[list[tuple[float, dict[str, float]]]]:
    """Resident MB now and then while the block runs: of this process, of the largest actor, of Ray's own processes."""
    samples: list[tuple[float, dict[str, float]]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(SAMPLE_SECONDS):
            samples.append((time.time(), _resident()))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield samples
    finally:
        over.set()
        watcher.join()


def _resident() -> dict[str, float]:
    me = psutil.Process()
    found = {"driver": me.memory_info().rss / 1e6, "actor": 0.0, "ray": 0.0}
    for child in me.children(recursive=True):
        try:
            used = child.memory_info().rss / 1e6
            actor = "MapWorker" in " ".join(child.cmdline())
        except psutil.Error:  # it has just ended
            continue
        if actor:
            found["actor"] = max(found["actor"], used)
        else:
            found["ray"] += used
    return found


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """A call in a fresh process, so that what earlier parts left in memory is not counted."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def report(found: list[dict[str, Any]]) -> str:
    """A table of the sizes, and whether the largest needs more than the smallest."""
    header = ["rows", "seconds", "driver peak MB: planning", "labelling", "writing", "actor peak MB", "Ray's own MB"]
    header += ["driver MB per 100k rows", "actor"]
    rows = [
        [
            f"{f['rows']}",
            f"{f['seconds']:.0f}",
            *(f"{mb:.0f}" for mb in f["driver"]["peak_by_phase"].values()),
            *(f"{f[who]['peak_mb']:.0f}" for who in ("actor", "ray")),
            *(f"{f[who]['mb_per_100k_rows']:+.1f}" for who in ("driver", "actor")),
        ]
        for f in found
    ]
    pairs = [(found[i], found[-1], who) for i in range(len(found) - 1) for who in ("driver", "actor")]
    verdicts = [
        f"From {a['rows']} to {b['rows']} rows, {who}: {_verdict(a[who]['peak_mb'], b[who]['peak_mb'])}."
        for a, b, who in pairs
    ]
    return (
        f"{markdown_table(header, rows)}\n\nPeaks of resident memory, shared pages counted too; the actor is the "
        "larger one; planning lasts until the first batch is done. Growth is fitted over the last three quarters of "
        f"the labelling. {' '.join(verdicts)}"
    )


def _verdict(small: float, large: float) -> str:
    flat = large - small <= max(FLAT_MB, FLAT_SHARE * small)
    return f"{large - small:+.0f} MB, {'flat' if flat else 'NOT flat'}"


if __name__ == "__main__":
    main()
