"""Whether a sweep's serving step chooses the same students again while another process comes and goes.

The finalists of a finished sweep are served afresh in copies of its folder: first pass, scores, session and choice.
Another process keeps one core busy for 40 % of the time, in periods of 8 seconds on average.

    python -m benchmarks.serving_choice SWEEP_FOLDER --runs 10
"""

import argparse
import contextlib
import multiprocessing
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import BenchmarkResult, describe_machine
from raydistill.cluster.start import cluster_device, ray_cluster
from raydistill.config.loader import read_yaml
from raydistill.config.space import Space
from raydistill.core.console import print_progress
from raydistill.results.selection import load_selection
from raydistill.results.served_students import SERVED_FILE
from raydistill.results.serving_latency import FIRST_PASS_FILE, LATENCY_FILE, read_session
from raydistill.results.sweep_record import read_sweep
from raydistill.results.tables import markdown_table
from raydistill.search.finalists import serve_finalists

BUSY_SECONDS = 8.0
BUSY_SHARE = 0.4


def come_and_go(seed: int) -> None:
    """Keep one core busy for `BUSY_SHARE` of the time, in periods of exponential length."""
    rng = random.Random(seed)
    while True:
        end = time.monotonic() + rng.expovariate(1 / BUSY_SECONDS)
        while time.monotonic() < end:
            sum(range(10_000))
        time.sleep(rng.expovariate(BUSY_SHARE / ((1 - BUSY_SHARE) * BUSY_SECONDS)))


@contextlib.contextmanager
def background_process(seed: int) -> Iterator[None]:
    """Context in which another process comes and goes."""
    process = multiprocessing.get_context("spawn").Process(target=come_and_go, args=(seed,), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def copy_unserved(sweep: Path, folder: Path) -> None:
    """Copy a sweep's folder without scores and timings of serving, without exports and pictures."""
    names = (SERVED_FILE, FIRST_PASS_FILE, LATENCY_FILE, "rows-*.npz", "exports", ".*", "*.png", "*.html")
    shutil.copytree(sweep, folder, ignore=shutil.ignore_patterns(*names))


def serve_once(sweep: Path, folder: Path, device: str, seed: int) -> dict[str, Any]:
    """Serve a copy of the sweep; the choices by budget, the seconds, and how the comparisons ended."""
    copy_unserved(sweep, folder)
    space = Space.model_validate(read_yaml(folder / "space.yaml")[0])
    started = time.monotonic()
    with background_process(seed):
        serve_finalists(space, folder, read_sweep(folder).teacher, device)
    session = read_session(folder)
    assert session is not None
    selection = load_selection(folder)
    return {
        "chosen": selection.chosen_keys,
        "latency_ms": {
            budget: selection.student(key).metrics["latency_ms"]
            for budget, key in selection.chosen_keys.items()
            if key is not None
        },
        "seconds": time.monotonic() - started,
        "comparisons": len(session.servings),
        "stop_reasons": dict(Counter(serving.timing.stop_reason for serving in session.servings)),
    }


def summarize(records: list[dict[str, Any]]) -> str:
    """A table with the most frequent choice of each budget, and how often it was made."""
    rows = []
    for budget in records[0]["chosen"]:
        counts = Counter(record["chosen"][budget] for record in records)
        [(key, count)] = counts.most_common(1)
        others = ", ".join(f"{other} ({n})" for other, n in counts.items() if other != key)
        rows.append([budget, str(key), f"{count} of {len(records)}", others or "-"])
    seconds = sorted(record["seconds"] for record in records)
    table = markdown_table(["budget", "most frequent choice", "runs", "other choices"], rows)
    return f"{table}\n\nA serving step took {seconds[0]:.0f} to {seconds[-1]:.0f} seconds."


def main() -> None:
    """Serve the copies one after the other and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="the folder of a finished sweep")
    parser.add_argument("--runs", type=int, default=10)
    options = parser.parse_args()
    machine = describe_machine()
    records = []
    with ray_cluster(), tempfile.TemporaryDirectory(prefix="raydistill-choice-") as scratch:
        for number in range(options.runs):
            folder = Path(scratch) / str(number) / options.sweep.name
            record = serve_once(options.sweep.absolute(), folder, cluster_device(), seed=number)
            print_progress(f"run {number}: {record}")
            records.append(record)
            shutil.rmtree(folder)
    result = BenchmarkResult("serving_choice", "Choices of repeated serving", summarize(records), records, machine)
    print(result.write().read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
