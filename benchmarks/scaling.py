"""Scaling of the label job and the search over nodes, and their cost for the head: a simulation on one machine.

Several Ray nodes run on this machine. The jobs run on them unchanged, except that GPU work is replaced by sleeping
(benchmarks/simulated.py). There can therefore be more nodes than cores, and everything but GPU work is measured.

labels   the whole label job on 1, 2, 4 and 8 nodes of one GPU, with batches in proportion to the nodes: rows/s compared
         with one node, wall time and CPU time of the head before, during and after labelling
batches  empty batches through the label job's actor pool: the most batches per second that the driver can distribute
trials   a search with reused Tune actors (short CPU trials) on the same nodes, with trials in proportion to the nodes
train    the same with Ray Train (GPU trials), whose start alone takes seconds of this machine's cores: few trials
many     a search of very short trials on the most nodes: does a trial cost the head more after many others?
driver   without Ray: what a trial costs the driver, and a check for early stopping its trial, after many others

All parts take about half an hour on an idle machine. A quick check:

    python -m benchmarks.scaling --part labels --nodes 1 2 --batches 5
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from timeit import timeit
from types import SimpleNamespace
from typing import Any

from benchmarks.common import RESULTS, BenchmarkResult, describe_machine
from benchmarks.simulated import SLEEP_FILE, simulated_engine, simulated_run
from benchmarks.simulated_nodes import Meter, cluster_nodes
from benchmarks.timestamps import BatchEnd, open_recording_engine, read_ends, steady_rate, write_jsonl
from raydistill.cluster.actor_pool import BatchFunction, BatchStats, run_batches
from raydistill.config.run import Dataset, Decoding
from raydistill.config.space import Space
from raydistill.core.console import print_progress
from raydistill.data.demo import demo_rows
from raydistill.jobs.pseudolabel import GPU_BATCH_CHARS, LabelJob, pseudolabel
from raydistill.jobs.train import TrainJob
from raydistill.label_sets.label_set import read_manifest
from raydistill.results.sweep_record import ShapeTable, SweepTeacher, TeacherPasses
from raydistill.results.tables import markdown_table
from raydistill.search.early_stopping import peer_curves
from raydistill.search.prepare import PreparedSweep
from raydistill.search.progress import ProgressCallback
from raydistill.search.study import SweepStudy, final_report
from raydistill.search.sweep_folder import write_sweep_record
from raydistill.search.trial import TrialContext
from raydistill.search.tune_search import run_search

PARTS = ("labels", "batches", "trials", "train", "many", "driver")
NODE_COUNTS = (1, 2, 4, 8)
SECONDS_PER_STEP = 0.1
TRAIN_TRIALS_PER_NODE = 2
DRIVER_TRIALS = 20  # that are measured
SIZES = ("12-6", "12-3", "12-1")


@dataclass(frozen=True)
class TrialSleep:
    """A simulated trial: start and end (seconds since the epoch), and seconds of sleep."""

    start: float
    end: float
    seconds: float


def main() -> None:
    """Run the command line; the result is written after each part."""
    options = _parse_arguments()
    machine = describe_machine()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="raydistill-scaling-") as scratch:
        for part in (name for name in PARTS if name in options.part):
            results[part] = run_part(part, Path(scratch), options)
            markdown = as_markdown(results)
            result = BenchmarkResult("scaling", "Scaling over nodes, simulated", markdown, results, machine)
            path = result.write(options.results)
    print(markdown)
    print(path)


def run_part(part: str, scratch: Path, options: argparse.Namespace) -> Any:
    """The result of one of `PARTS`: a record, or a list with a record for each number of nodes."""
    most_nodes = max(options.nodes)
    if part == "labels":
        return [measure_labels(scratch, n, options.batches, options.batch_seconds) for n in options.nodes]
    if part == "batches":
        return measure_batches(most_nodes, options.empty_batches)
    if part == "trials":
        searches = [(n, options.trials * n, options.trial_seconds) for n in options.nodes]
        return [measure_trials(scratch, *search, "tune") for search in searches]
    if part == "train":
        searches = [(n, TRAIN_TRIALS_PER_NODE * n, 3 * options.trial_seconds) for n in options.nodes]
        return [measure_trials(scratch, *search, "train") for search in searches]
    if part == "driver":
        return [measure_driver(scratch, earlier) for earlier in options.earlier]
    return measure_trials(scratch, most_nodes, options.many, 1.0, "tune")


def measure_labels(scratch: Path, num_nodes: int, batches_per_node: int, batch_seconds: float) -> dict[str, Any]:
    """Run the label job on nodes of one GPU each; the simulated teacher takes `batch_seconds` for a full batch."""
    pairs = [(row["source"], row["target"]) for row in demo_rows("train")]
    chars_per_row = sum(len(source) for source, _ in pairs) / len(pairs)
    rows = round(num_nodes * batches_per_node * GPU_BATCH_CHARS / chars_per_row)
    data, recorded = scratch / f"rows-{num_nodes}.jsonl", scratch / f"batch-ends-{num_nodes}"
    write_jsonl(data, islice(cycle(pairs), rows))
    decoding = Decoding(beams=4, max_length=64)
    job = LabelJob(str(_unused_teacher(scratch)), Dataset(name=str(data)), decoding=decoding, metric="rouge2")
    open_engine = partial(simulated_engine, seconds_per_char=batch_seconds / GPU_BATCH_CHARS)
    factory = partial(open_recording_engine, recorded, open_engine)
    with cluster_nodes(num_nodes, cpus=1, gpus=1) as meter:
        start = time.time()
        folder = pseudolabel(job, scratch / f"labels-{num_nodes}", "cuda", verbose=False, engine_factory=factory)
        end = time.time()
    assert read_manifest(folder).rows == rows
    ends = read_ends(recorded)
    first, last = min(batch.time for batch in ends), max(batch.time for batch in ends)
    phases = {"before": (start, first), "labelling": (first, last), "after": (last, end)}
    rate, ideal_rate = steady_rate(ends), num_nodes * GPU_BATCH_CHARS / chars_per_row / batch_seconds
    print_progress(f"labels: {num_nodes} nodes, {rows} rows: {rate:.0f} rows/s of {ideal_rate:.0f}")
    return {
        "nodes": num_nodes,
        "rows": rows,
        "batches": len(ends),
        "chars": chars_per_row,
        "batch_seconds": batch_seconds,
        "rows_per_second": rate,
        "ideal": ideal_rate,
        "workers": len({batch.worker for batch in ends}),
        "phases": {name: {"seconds": b - a, **meter.cpu_between(a, b)} for name, (a, b) in phases.items()},
        "peak_gib": max(meter.memory_gib),
    }


def _unused_teacher(scratch: Path) -> Path:
    """A teacher's folder, which the label job checks although the simulated engine does not load it."""
    from tests.factories.models import save_tiny

    folder = scratch / "teacher"
    if not folder.is_dir():
        save_tiny("bart", folder, max_positions=1024)
    return folder


def measure_batches(num_nodes: int, count: int) -> dict[str, Any]:
    """Process empty batches in the label job's actor pool; the first tenth is not part of the figures."""
    finished: list[float] = []
    with cluster_nodes(num_nodes, cpus=1, gpus=1) as meter:
        run_batches(
            range(count), _make_empty_batch_function, device="cuda", on_done=lambda _: finished.append(time.time())
        )
    start, end = finished[count // 10], finished[-1]
    counted = count - count // 10 - 1
    print_progress(f"batches: {counted / (end - start):.0f} per second over {num_nodes} nodes")
    used = {name: seconds / counted for name, seconds in meter.cpu_between(start, end).items()}
    return {"nodes": num_nodes, "batches": count, "per_second": counted / (end - start), "cpu_per_batch": used}


def _make_empty_batch_function() -> BatchFunction:
    def process_batch(number: int) -> BatchStats:
        return {"rows": 1.0}

    return process_batch


def measure_trials(scratch: Path, num_nodes: int, count: int, seconds: float, launcher: str) -> dict[str, Any]:
    """Search with `count` simulated trials of `seconds` each, as many at a time as there are nodes."""
    space = endless_space(count, num_nodes, seconds, launcher)
    sweep = Path(tempfile.mkdtemp(dir=scratch))
    prepared = synthetic_sweep()
    write_sweep_record(space, sweep, prepared, "running")
    train_fn = partial(simulated_run, seconds_per_step=SECONDS_PER_STEP)
    # With Ray Train, the trial's own function occupies a tenth of a CPU in addition to its worker.
    with cluster_nodes(num_nodes, cpus=1 if launcher == "tune" else 2) as meter:
        start = time.time()
        context = TrialContext(space, sweep, prepared, "cpu", train_fn)
        run_search(context, [ProgressCallback(sweep, space.search, "rouge2")])
        end = time.time()
    sleeps = sorted((read_sleep(path) for path in sweep.glob(f"trials/*/{SLEEP_FILE}")), key=lambda sleep: sleep.start)
    assert len(sleeps) == count
    key = next((sweep / "trials").glob("*/result.json")).parent.name
    reading_seconds = [timeit(lambda: peer_curves(sweep, key), number=1) for _ in range(2)]
    busy = steady_rate(assign_slots(sleeps, num_nodes)) / num_nodes
    print_progress(f"{launcher}: {count} trials on {num_nodes} nodes: slots busy {busy:.0%} of the time")
    ends = sorted(sleep.end for sleep in sleeps)
    first, middle, last = ends[0], ends[count // 2], ends[-1]
    return {
        "launcher": launcher,
        "nodes": num_nodes,
        "trials": count,
        "trial_seconds": seconds,
        "busy": busy,
        "seconds": end - start,
        "start": sleeps[0].start - start,
        "reading": reading_seconds,
        "cpu_per_trial": _cpu_per_trial(meter, sleeps, first, last),
        "peak_gib": max(meter.memory_gib),
        "first_half": _cpu_per_trial(meter, sleeps, first, middle),
        "second_half": _cpu_per_trial(meter, sleeps, middle, last),
        "sleeps": [asdict(sleep) for sleep in sleeps],
    }


def measure_driver(scratch: Path, num_earlier: int) -> dict[str, Any]:
    """Seconds of what the driver does for a trial, and of a check for early stopping, after `num_earlier` trials.

    The study proposes the trials, their files are written without training, and the study and the progress callback
    receive the results. Ray Tune's own work is part of the part `many` only.
    """
    space = endless_space(num_earlier + 2 * DRIVER_TRIALS, None, 1.0, "tune")
    sweep = Path(tempfile.mkdtemp(dir=scratch))
    prepared = synthetic_sweep()
    write_sweep_record(space, sweep, prepared, "running")
    write_trials(space, sweep, prepared, num_earlier)
    seconds: dict[str, list[float]] = {"propose": [], "report": [], "progress": [], "check": []}

    def timed(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter()
        value = call(*arguments)
        seconds[name].append(time.perf_counter() - start)
        return value

    def check_stop(job: TrainJob, *_: Any) -> str | None:
        return timed("check", job.check_stop) if job.check_stop else None

    start = time.perf_counter()
    study = SweepStudy(space, sweep)
    progress = ProgressCallback(sweep, space.search, "rouge2")
    context = TrialContext(space, sweep, prepared, "cpu", partial(simulated_run, seconds_per_step=0.0))
    peer_curves(sweep, next(iter(study.finished_keys)))
    loading = time.perf_counter() - start
    for number in range(DRIVER_TRIALS):
        config = timed("propose", study.propose, str(number)).model_dump()
        job = context.make_job(config)
        result = simulated_run(job.run, job.folder, partial(check_stop, job), job.inputs, seconds_per_step=0.0)
        report = final_report(result, space.search.cost)
        trial = SimpleNamespace(trial_id=str(number), config=config)
        timed("progress", progress.on_trial_result, 0, [], trial, report)
        timed("report", study.report, str(number), report)
    # The first call of each kind reads what the others have in memory
    means = {name: sum(values[1:]) / len(values[1:]) for name, values in seconds.items()}
    print_progress(f"driver: after {num_earlier} trials: {means}")
    return {"earlier": num_earlier, "loading": loading, **means}


def write_trials(space: Space, sweep: Path, prepared: PreparedSweep, count: int) -> None:
    """Write the folders of `count` finished trials with random settings."""
    random_space = space.model_copy(update={"search": space.search.model_copy(update={"sampler": "random"})})
    study = SweepStudy(random_space, sweep)
    context = TrialContext(space, sweep, prepared, "cpu", partial(simulated_run, seconds_per_step=0.0))
    for i in range(count):
        proposal = study.propose(str(i))
        assert proposal is not None
        job = context.make_job(proposal.model_dump())
        result = simulated_run(job.run, job.folder, lambda *_: None, job.inputs, seconds_per_step=0.0)
        study.report(str(i), final_report(result, space.search.cost))


def assign_slots(sleeps: list[TrialSleep], num_slots: int) -> list[BatchEnd]:
    """Assign trials to slots, each to the slot that has been free for the longest time; return their ends."""
    free_since = [0.0] * num_slots
    ends = []
    for sleep in sorted(sleeps, key=lambda sleep: sleep.start):
        slot = free_since.index(min(free_since))
        free_since[slot] = sleep.end
        ends.append(BatchEnd(slot, sleep.end, sleep.seconds))
    return ends


def synthetic_sweep() -> PreparedSweep:
    """The preparation of a search without a teacher: invented costs of `SIZES`."""
    costs = {size: {"latency_ms": 100.0 * (i + 1), "params_m": 100.0} for i, size in enumerate(SIZES)}
    shapes = ShapeTable(teacher_size=SIZES[0], costs=costs, cheapest={}, engines={})
    teacher = SweepTeacher(
        name="none",
        key="none",
        size=SIZES[0],
        metric="rouge2",
        metrics={"rouge2": 20.0},
        interval=(20.0, 20.0),
        repetition=0.0,
        source_tokens=1,
        output_tokens=1,
        decoding={"beams": 1},
        signature="none",
        engine="none",
        precision="none",
        machine={},
        data={},
        rows={},
        corpus={},
        costs=shapes.teacher_costs,
        passes=TeacherPasses(),
        label_sets={},
    )
    return PreparedSweep(teacher, shapes)


def endless_space(trials: int, concurrent: int | None, seconds: float, launcher: str, **search: Any) -> Space:
    """A space that never runs out of combinations. Its trials are compared for early stopping, but none is stopped."""
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
    settings = {"trials": trials, "concurrent": concurrent, "stopping": "per_shape", "grace": 0.99, **search}
    return Space.model_validate({"name": "scaling", "run": run, "search": settings})


def read_sleep(path: Path) -> TrialSleep:
    """Read the `SLEEP_FILE` of a simulated trial."""
    _, start, end, seconds = json.loads(path.read_text(encoding="utf-8"))
    return TrialSleep(start, end, seconds)


def _cpu_per_trial(meter: Meter, sleeps: list[TrialSleep], start: float, end: float) -> dict[str, float]:
    """CPU seconds of the head's processes between two times, per trial that ended between them."""
    count = sum(start < sleep.end <= end for sleep in sleeps)
    return {name: seconds / max(1, count) for name, seconds in meter.cpu_between(start, end).items()}


def as_markdown(results: dict[str, Any]) -> str:
    """A section for each part that has run."""
    sections: dict[str, tuple[str, Callable[[Any], str]]] = {
        "labels": ("The label job", _labels_text),
        "batches": ("Empty batches", _batches_text),
        "trials": ("A search with reused Tune actors", _trials_text),
        "train": ("A search with Ray Train", _trials_text),
        "many": ("Many short trials", _many_text),
        "driver": ("The driver after many trials", _driver_text),
    }
    return "\n\n".join(f"## {title}\n\n{text(results[p])}" for p, (title, text) in sections.items() if p in results)


def _labels_text(records: list[dict[str, Any]]) -> str:
    header = [
        *("nodes", "rows", "batches", "rows/s", "times one node", "efficiency", "s before", "s labelling", "s after"),
        *("driver CPU ms/row before", "after", "driver CPU ms/batch labelling", "GCS", "rest", "peak GiB"),
    ]
    one_node = records[0]["rows_per_second"] / records[0]["nodes"]
    rows = []
    for record in records:
        phases, speedup = record["phases"], record["rows_per_second"] / one_node
        per_row = [1000 * phases[name]["driver"] / record["rows"] for name in ("before", "after")]
        processes = ("driver", "gcs", "rest of the head")
        per_batch = [1000 * phases["labelling"][process] / record["batches"] for process in processes]
        rows.append(
            [
                *(str(record["nodes"]), str(record["rows"]), str(record["batches"])),
                *(f"{record['rows_per_second']:.0f}", f"{speedup:.2f}", f"{speedup / record['nodes']:.1%}"),
                *(f"{phases[name]['seconds']:.1f}" for name in ("before", "labelling", "after")),
                *(f"{ms:.2f}" for ms in per_row),
                *(f"{ms:.1f}" for ms in per_batch),
                f"{record['peak_gib']:.1f}",
            ]
        )
    last = records[-1]
    return (
        f"A full batch ({GPU_BATCH_CHARS} characters, about {GPU_BATCH_CHARS / last['chars']:.0f} rows of "
        f"{last['chars']:.0f}) takes a teacher {last['batch_seconds']:g} s. Rates count each teacher's batches after "
        f"its first; on {last['nodes']} nodes the sleeps alone would give {last['ideal']:.0f} rows/s. Before: reading, "
        f"checking, planning, start of the actors; after: merging the outputs, which the actors have scored.\n\n"
        f"{markdown_table(header, rows)}"
    )


def _batches_text(record: dict[str, Any]) -> str:
    used = ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in record["cpu_per_batch"].items())
    return (
        f"{record['batches']} batches over {record['nodes']} nodes: {record['per_second']:.0f} per second. "
        f"CPU milliseconds per batch: {used}."
    )


def _trials_text(records: list[dict[str, Any]]) -> str:
    header = [
        *("nodes", "trials", "s of work per trial", "busy", "efficiency", "s in total", "s to the first trial"),
        *("driver CPU s/trial", "GCS", "rest", "peak GiB"),
    ]
    baseline = records[0]["busy"]
    rows = [
        [
            *(str(record["nodes"]), str(record["trials"]), f"{record['trial_seconds']:g}"),
            *(f"{record['busy']:.1%}", f"{record['busy'] / baseline:.1%}"),
            *(f"{record['seconds']:.0f}", f"{record['start']:.1f}"),
            *(f"{seconds:.2f}" for seconds in record["cpu_per_trial"].values()),
            f"{record['peak_gib']:.1f}",
        ]
        for record in records
    ]
    return (
        "Busy: the share of the slots' time, after each slot's first trial, that trials spend on their own work. "
        f"Efficiency: busy relative to the first row.\n\n{markdown_table(header, rows)}"
    )


def _many_text(record: dict[str, Any]) -> str:
    halves = [record[name]["driver"] for name in ("first_half", "second_half")]
    return (
        f"{record['trials']} trials of {record['trial_seconds']:g} s on {record['nodes']} nodes: slots busy "
        f"{record['busy']:.1%} of the time. Driver CPU per trial: {halves[0]:.3f} s in the first half, {halves[1]:.3f} "
        f"s in the second. At the end, the first check for early stopping of a process takes "
        f"{1000 * record['reading'][0]:.0f} ms, a further one {1000 * record['reading'][1]:.0f} ms."
    )


def _driver_text(records: list[dict[str, Any]]) -> str:
    header = [
        "earlier trials",
        "s to load",
        "ms: proposal",
        "report",
        "progress",
        "driver per trial",
        "check of a trial",
    ]
    rows = []
    for record in records:
        driver = [1000 * record[name] for name in ("propose", "report", "progress")]
        milliseconds = [*driver, sum(driver), 1000 * record["check"]]
        rows.append([str(record["earlier"]), f"{record['loading']:.1f}", *(f"{ms:.1f}" for ms in milliseconds)])
    return (
        f"Means of {DRIVER_TRIALS - 1} trials in one process, without Ray. To load: a new study, and the first check "
        f"for early stopping of a process, which reads every trial.\n\n{markdown_table(header, rows)}"
    )


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--nodes", nargs="+", type=int, default=list(NODE_COUNTS), help="default: 1 2 4 8")
    parser.add_argument("--batches", type=int, default=20, help="labels: batches per node; default: 20")
    parser.add_argument("--batch-seconds", type=float, default=2.0, help="labels: seconds per full batch; default: 2")
    parser.add_argument("--empty-batches", type=int, default=2000, help="batches: how many; default: 2000")
    parser.add_argument("--trials", type=int, default=5, help="trials: trials per node; default: 5")
    parser.add_argument(
        "--trial-seconds", type=float, default=10.0, help="trials: seconds per trial (train: three times); default: 10"
    )
    parser.add_argument("--many", type=int, default=200, help="many: trials; default: 200")
    parser.add_argument(
        "--earlier", nargs="+", type=int, default=[100, 1000, 5000], help="driver: trials before the measured ones"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    return parser.parse_args()


if __name__ == "__main__":
    main()
