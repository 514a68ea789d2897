"""How the pseudo-label job and the search scale over nodes, and what they cost the head: a simulation on one machine.

Several Ray nodes run on this machine, and the job and the search run on them as always, but GPU work is replaced by
sleeping (benchmarks/simulated.py). So there may be more nodes than cores; all that is not GPU work is measured.

labels   the whole job on 1, 2, 4 and 8 nodes of one GPU each, as many batches for each node: rows/s against so many
         times one node's, the wall time and the head's CPU before, while and after batches are labelled
batches  batches of no work through the job's pool: how many a second the driver can hand out at most
trials   a search by Tune's reused actors (short CPU trials) on the same nodes, as many trials for each
train    the same by Ray Train (GPU trials), whose start alone needs seconds of this machine's cores: few trials
many     a search of very short trials on the most nodes: whether a trial costs the head more where many were before it

All of it takes about half an hour, on a machine that does nothing else. A quick look:

    python -m benchmarks.scaling --part labels --nodes 1 2 --batches 5
"""

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, describe_machine, write_result
from benchmarks.simulated import simulated_engine, simulated_run
from benchmarks.simulated_nodes import Meter, cluster_nodes
from benchmarks.timestamps import BatchEnd, open_recording_engine, rate, read_ends, write_jsonl
from raydistill.cluster.actor_pool import BatchFunction, BatchStats, run_batches
from raydistill.config.run import Dataset, Decoding
from raydistill.config.space import Space
from raydistill.core.console import print_progress
from raydistill.core.files import SCHEMA_VERSION, write_json_atomic
from raydistill.data.demo import demo_rows
from raydistill.jobs.pseudolabel import GPU_BATCH_CHARS, LabelJob, pseudolabel
from raydistill.label_sets.label_set import read_manifest
from raydistill.results.tables import markdown_table
from raydistill.search.early_stopping import peer_curves
from raydistill.search.prepare import PreparedSweep
from raydistill.search.progress import ProgressCallback
from raydistill.search.trial import TrialContext
from raydistill.search.tune_search import run_search

PARTS = ("labels", "batches", "trials", "train", "many")
COUNTS = (1, 2, 4, 8)
SECONDS_PER_STEP = 0.1
FEWER_FOR_TRAIN = 2  # trials of Ray Train for each node
SIZES = ("12-6", "12-3", "12-1")


@dataclass(frozen=True)
class TrialSleep:
    """A trial's sleep: when the trial began and ended by the clock, and how long it slept."""

    began: float
    ended: float
    seconds: float


def main() -> None:
    """Run the parts, and write the result after each."""
    asked = _arguments()
    machine = describe_machine()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="raydistill-scaling-") as scratch:
        for part in (name for name in PARTS if name in asked.part):
            found[part] = run_part(part, Path(scratch), asked)
            markdown = report(found)
            written = write_result("scaling", "Scaling over nodes, simulated", markdown, found, machine, asked.results)
    print(markdown)
    print(written)


def run_part(part: str, place: Path, asked: argparse.Namespace) -> Any:
    """What one of `PARTS` found: of most parts, for each number of nodes."""
    most = max(asked.nodes)
    if part == "labels":
        return [labels(place, n, asked.batches, asked.batch_seconds) for n in asked.nodes]
    if part == "batches":
        return batches(most, asked.empty_batches)
    if part == "trials":
        return [trials(place, n, asked.trials * n, asked.trial_seconds, "tune") for n in asked.nodes]
    if part == "train":
        return [trials(place, n, FEWER_FOR_TRAIN * n, 3 * asked.trial_seconds, "train") for n in asked.nodes]
    return trials(place, most, asked.many, 1.0, "tune")


def labels(place: Path, count: int, batches_each: int, batch_seconds: float) -> dict[str, Any]:
    """The whole job on `count` nodes of a GPU each; a full batch takes a teacher `batch_seconds`."""
    from tests.factories.models import save_tiny  # the job wants a teacher's folder; this one is never loaded

    teacher, data, stamps = place / "teacher", place / f"rows-{count}.jsonl", place / f"stamps-{count}"
    if not teacher.is_dir():
        save_tiny("bart", teacher, max_positions=1024)
    pairs = [(row["source"], row["target"]) for row in demo_rows("train")]
    chars = sum(len(source) for source, _ in pairs) / len(pairs)
    rows = round(count * batches_each * GPU_BATCH_CHARS / chars)
    write_jsonl(data, islice(cycle(pairs), rows))
    job = LabelJob(str(teacher), Dataset(name=str(data)), decoding=Decoding(beams=4, max_length=64), metric="rouge2")
    opener = partial(simulated_engine, seconds_per_char=batch_seconds / GPU_BATCH_CHARS)
    with cluster_nodes(count, cpus=1, gpus=1) as meter:
        began = time.time()
        folder = pseudolabel(
            job,
            place / f"labels-{count}",
            "cuda",
            verbose=False,
            engine_factory=partial(open_recording_engine, stamps, opener),
        )
        ended = time.time()
    assert read_manifest(folder).rows == rows
    ends = read_ends(stamps)
    first, last = min(end.at for end in ends), max(end.at for end in ends)
    phases = {"before": (began, first), "labelling": (first, last), "after": (last, ended)}
    took = {name: {"seconds": end - begin, **meter.between(begin, end)} for name, (begin, end) in phases.items()}
    per_second = rate(ends)
    ideal = count * GPU_BATCH_CHARS / chars / batch_seconds
    print_progress(f"labels: {count} nodes, {rows} rows: {per_second:.0f} rows/s of {ideal:.0f}")
    return {
        **{"nodes": count, "rows": rows, "batches": len(ends), "chars": chars, "batch_seconds": batch_seconds},
        **{"rows_per_second": per_second, "ideal": ideal, "workers": len({end.worker for end in ends})},
        **{"phases": took, "peak_gib": max(meter.gib)},
    }


def batches(count: int, number: int) -> dict[str, Any]:
    """Batches of no work through the label job's pool on `count` nodes; counted from the second tenth of them."""
    done: list[float] = []
    with cluster_nodes(count, cpus=1, gpus=1) as meter:
        run_batches(range(number), _no_work, device="cuda", on_done=lambda _: done.append(time.time()))
    begin, end = done[number // 10], done[-1]
    counted = number - number // 10 - 1
    print_progress(f"batches: {counted / (end - begin):.0f} a second over {count} nodes")
    used = {name: seconds / counted for name, seconds in meter.between(begin, end).items()}
    return {"nodes": count, "batches": number, "per_second": counted / (end - begin), "cpu_per_batch": used}


def _no_work() -> BatchFunction:
    def work(number: int) -> BatchStats:
        return {"rows": 1.0}

    return work


def trials(place: Path, count: int, number: int, seconds: float, launcher: str) -> dict[str, Any]:
    """A search of `number` trials of `seconds` of work each, as many at a time as there are nodes."""
    space = endless_space(number, count, seconds, launcher)
    sweep = Path(tempfile.mkdtemp(dir=place))
    prepared = synthetic_sweep()
    record = {"schema": SCHEMA_VERSION, "teacher": prepared.teacher, "metric": "rouge2", "teacher_gpu_hours": 0.0}
    write_json_atomic(sweep / "sweep.json", record)
    work = partial(simulated_run, seconds_per_step=SECONDS_PER_STEP)
    # Under Ray Train the trial's own function takes a tenth of a CPU beside its worker.
    with cluster_nodes(count, cpus=1 if launcher == "tune" else 2) as meter:
        began = time.time()
        run_search(TrialContext(space, sweep, prepared, "cpu", work), [ProgressCallback(sweep, space.search, "rouge2")])
        ended = time.time()
    slept = sorted((read_sleep(path) for path in sweep.glob("trials/*/stamps.jsonl")), key=lambda one: one.began)
    assert len(slept) == number
    begin = time.perf_counter()
    peer_curves(sweep, next((sweep / "trials").glob("*/result.json")).parent.name)
    reading = time.perf_counter() - begin
    busy = rate(assign_slots(slept, count)) / count
    print_progress(f"{launcher}: {number} trials on {count} nodes: {busy:.0%} of the time at work")
    half = sorted(one.ended for one in slept)[number // 2]
    first, last = min(one.ended for one in slept), max(one.ended for one in slept)
    return {
        **{"launcher": launcher, "nodes": count, "trials": number, "trial_seconds": seconds, "busy": busy},
        **{"seconds": ended - began, "start": min(one.began for one in slept) - began, "reading": reading},
        **{"cpu_per_trial": _per_trial(meter, slept, first, last), "peak_gib": max(meter.gib)},
        **{"first_half": _per_trial(meter, slept, first, half), "second_half": _per_trial(meter, slept, half, last)},
        "slept": [asdict(one) for one in slept],
    }


def assign_slots(slept: list[TrialSleep], count: int) -> list[BatchEnd]:
    """Each trial's end and sleep, with the slot that it ran in: of `count`, the one that had been free for longest."""
    free = [0.0] * count
    ends = []
    for one in sorted(slept, key=lambda one: one.began):
        slot = free.index(min(free))
        free[slot] = one.ended
        ends.append(BatchEnd(slot, one.ended, one.seconds))
    return ends


def synthetic_sweep() -> PreparedSweep:
    """What a search without a teacher is handed: the costs of `SPLIT_SIZES`, made up."""
    shapes = {size: {"latency_ms": 100.0 * (i + 1), "params_m": 100.0} for i, size in enumerate(SIZES)}
    teacher = {"metric": "rouge2", "size": SIZES[0], "costs": shapes[SIZES[0]], "teacher_gpu_hours": 0.0}
    return PreparedSweep(teacher, shapes, shapes)


def endless_space(number: int, count: int | None, seconds: float, launcher: str, **search: Any) -> Space:
    """A search of endless_space combinations, whose trials ask whether to stop as always but are equally long."""
    run = {
        "teacher": "none",
        "dataset": "none",
        "method": {"choice": ["sft", "kd"]},
        "student": {"size": {"choice": list(SIZES)}},
        "training": {
            "learning_rate": {"log_uniform": [1e-5, 1e-2]},
            "max_steps": round(seconds / SECONDS_PER_STEP),
            "launcher": launcher,
        },
    }
    settings = {"trials": number, "concurrent": count, "stopping": "per_shape", "grace": 0.99, **search}
    return Space.model_validate({"name": "scaling", "run": run, "search": settings})


def read_sleep(path: Path) -> TrialSleep:
    _, began, ended, seconds = json.loads(path.read_text(encoding="utf-8"))
    return TrialSleep(began, ended, seconds)


def _per_trial(meter: Meter, slept: list[TrialSleep], begin: float, end: float) -> dict[str, float]:
    """CPU seconds of the head's processes for each trial that ended between two moments."""
    over = sum(begin < one.ended <= end for one in slept)
    return {name: seconds / max(1, over) for name, seconds in meter.between(begin, end).items()}


def report(found: dict[str, Any]) -> str:
    """Tables of the parts that were run."""
    texts = []
    if "labels" in found:
        texts.append(f"## The pseudo-label job\n\n{_labels_text(found['labels'])}")
    if "batches" in found:
        texts.append(f"## Batches without work\n\n{_batches_text(found['batches'])}")
    if "trials" in found:
        texts.append(f"## A search by Tune's reused actors\n\n{_trials_text(found['trials'])}")
    if "train" in found:
        texts.append(f"## A search by Ray Train\n\n{_trials_text(found['train'])}")
    if "many" in found:
        texts.append(f"## Many short trials\n\n{_many_text(found['many'])}")
    return "\n\n".join(texts)


def _labels_text(found: list[dict[str, Any]]) -> str:
    header = ["nodes", "rows", "batches", "rows/s", "of one node's, times", "efficiency", "s before", "labelling"]
    header += ["after", "driver CPU ms/row before", "after", "driver CPU ms/batch labelling", "GCS", "rest", "peak GiB"]
    one = found[0]["rows_per_second"] / found[0]["nodes"]
    rows = []
    for f in found:
        phases, times = f["phases"], f["rows_per_second"] / one
        per_row = [1000 * phases[name]["driver"] / f["rows"] for name in ("before", "after")]
        per_batch = [1000 * phases["labelling"][who] / f["batches"] for who in ("driver", "gcs", "rest of the head")]
        rows.append(
            [
                *(str(f["nodes"]), str(f["rows"]), str(f["batches"]), f"{f['rows_per_second']:.0f}", f"{times:.2f}"),
                f"{times / f['nodes']:.1%}",
                *(f"{phases[name]['seconds']:.1f}" for name in ("before", "labelling", "after")),
                *(f"{ms:.2f}" for ms in per_row),
                *(f"{ms:.1f}" for ms in per_batch),
                f"{f['peak_gib']:.1f}",
            ]
        )
    last = found[-1]
    return (
        f"A full batch ({GPU_BATCH_CHARS} characters, about {GPU_BATCH_CHARS / last['chars']:.0f} rows of "
        f"{last['chars']:.0f}) "
        f"takes a teacher {last['batch_seconds']:g} s. Rates are each teacher's after its first batch; on "
        f"{last['nodes']} nodes the sleeps alone would make {last['ideal']:.0f} rows/s. Before: reading, checking, "
        f"planning, the actors' start; after: scoring (ROUGE) and writing.\n\n{markdown_table(header, rows)}"
    )


def _batches_text(found: dict[str, Any]) -> str:
    used = ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in found["cpu_per_batch"].items())
    return (
        f"{found['batches']} batches over {found['nodes']} nodes: {found['per_second']:.0f} a second. "
        f"CPU milliseconds per batch: {used}."
    )


def _trials_text(found: list[dict[str, Any]]) -> str:
    header = ["nodes", "trials", "s of work each", "at work", "efficiency", "s in all", "s to the first trial"]
    header += ["driver CPU s/trial", "GCS", "rest", "peak GiB"]
    one = found[0]["busy"]
    rows = [
        [
            *(
                str(f["nodes"]),
                str(f["trials"]),
                f"{f['trial_seconds']:g}",
                f"{f['busy']:.1%}",
                f"{f['busy'] / one:.1%}",
            ),
            *(f"{f['seconds']:.0f}", f"{f['start']:.1f}"),
            *(f"{seconds:.2f}" for seconds in f["cpu_per_trial"].values()),
            f"{f['peak_gib']:.1f}",
        ]
        for f in found
    ]
    return (
        "At work: the share of the slots' time, after each one's first trial, that is a trial's own work. Efficiency: "
        f"that, against the first row's.\n\n{markdown_table(header, rows)}"
    )


def _many_text(found: dict[str, Any]) -> str:
    halves = [found[name]["driver"] for name in ("first_half", "second_half")]
    return (
        f"{found['trials']} trials of {found['trial_seconds']:g} s on {found['nodes']} nodes: {found['busy']:.1%} at "
        f"work. Driver CPU per trial: {halves[0]:.3f} s in the first half, {halves[1]:.3f} s in the second. A trial's "
        f"question whether to stop read the others' folders in {1000 * found['reading']:.0f} ms at the end."
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--nodes", nargs="+", type=int, default=list(COUNTS), help="default: 1 2 4 8")
    parser.add_argument("--batches", type=int, default=20, help="batches to label for each node; default: 20")
    parser.add_argument("--batch-seconds", type=float, default=2.0, help="a teacher takes for a full batch; default: 2")
    parser.add_argument("--empty-batches", type=int, default=2000, help="of the part batches; default: 2000")
    parser.add_argument("--trials", type=int, default=5, help="trials for each node; default: 5")
    parser.add_argument("--trial-seconds", type=float, default=10.0, help="of work (train: three times); default: 10")
    parser.add_argument("--many", type=int, default=200, help="trials of the part many; default: 200")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result; default: as all others")
    return parser.parse_args()


if __name__ == "__main__":
    main()
