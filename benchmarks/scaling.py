"""Scaling of the label job and the search over nodes, and their cost for the head: a simulation on one machine.

Several Ray nodes run on this machine. The jobs run on them unchanged, except that GPU work is replaced by sleeping
(benchmarks/simulated.py). There can therefore be more nodes than cores, and everything but GPU work is measured.

labels   the whole label job on 1, 2, 4 and 8 nodes of one GPU, with batches in proportion to the nodes: rows/s compared
         with one node, wall time and CPU time of the head before, during and after labelling. On the most nodes also
         with a quarter of the rows: the difference gives the driver's CPU time per row without its fixed costs
batches  empty batches through the label job's actor pool: the most batches per second that the driver can distribute
trials   a search with reused Tune actors (short CPU trials) on the same nodes, with trials in proportion to the nodes
gpu      a search with reused Tune actors that hold a GPU (`launcher: tune`), with trials of a minute, on one node and
         on the most nodes: the share of the time at work
train    a search with Ray Train, whose start alone takes seconds of this machine's cores: few trials
many     a search of very short trials on the most nodes: what do the first, the middle and the last trials cost?
driver   without Ray: what a trial costs the driver, and a check for early stopping its trial, after many others
publish  without Ray: what the publication of a trial to MLflow costs the driver, which publishes in a thread

The driver's CPU time is without the thread that measures. All parts take about 50 minutes on an idle machine. A quick
check:

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
from raydistill.tracking.mlflow_runs import SearchPublisher

PARTS = ("labels", "batches", "trials", "gpu", "train", "many", "driver", "publish")
NODE_COUNTS = (1, 2, 4, 8)
SECONDS_PER_STEP = 0.1
TRAIN_TRIALS_PER_NODE = 2
GPU_TRIALS_PER_NODE = 3
FEWER_ROWS = 4  # the label job of which the difference is taken has this part of the batches
WINDOW_TRIALS = 100  # whose cost is averaged
DRIVER_TRIALS = 20  # that are measured
SIZES = ("12-6", "12-3", "12-1")


@dataclass(frozen=True)
class SearchCase:
    """A search to measure: nodes of one slot, trials and their seconds, launcher and device."""

    nodes: int
    trials: int
    trial_seconds: float
    launcher: str
    device: str = "cpu"


@dataclass(frozen=True)
class RowCost:
    """The driver's CPU time of a label job as a line: fixed seconds, and seconds per row.

    The seconds per row contain what the driver uses while it waits for the actors.
    """

    fixed_seconds: float
    seconds_per_row: float

    @property
    def rows_per_second(self) -> float:
        """The rows per second at which the driver would need a whole core."""
        return 1 / self.seconds_per_row


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
    with tempfile.TemporaryDirectory(prefix="raydistill-scaling-", dir=options.work) as scratch:
        for part in (name for name in PARTS if name in options.part):
            results[part] = run_part(part, Path(scratch), options)
            markdown = as_markdown(results)
            result = BenchmarkResult("scaling", "Scaling over nodes, simulated", markdown, results, machine)
            path = result.write(options.results)
    print(markdown)
    print(path)


def run_part(part: str, scratch: Path, options: argparse.Namespace) -> Any:
    """The result of one of `PARTS`: a record, or a list with a record for each number of nodes or of earlier trials."""
    most_nodes = max(options.nodes)
    if part == "labels":
        by_nodes = [measure_labels(scratch, n, options.batches, options.batch_seconds) for n in options.nodes]
        fewer = measure_labels(scratch, most_nodes, max(1, options.batches // FEWER_ROWS), options.batch_seconds)
        return {"by_nodes": by_nodes, "fewer_rows": fewer}
    if part == "batches":
        return measure_batches(most_nodes, options.empty_batches)
    if part == "driver":
        return [measure_driver(scratch, earlier) for earlier in options.earlier]
    if part == "publish":
        return [measure_publication(scratch, earlier) for earlier in options.published]
    records = [measure_trials(scratch, case) for case in search_cases(part, options)]
    return records[0] if part == "many" else records


def search_cases(part: str, options: argparse.Namespace) -> list[SearchCase]:
    """The searches of a part."""
    if part == "trials":
        return [SearchCase(n, options.trials * n, options.trial_seconds, "tune") for n in options.nodes]
    if part == "gpu":
        nodes = sorted({min(options.nodes), max(options.nodes)})
        return [SearchCase(n, GPU_TRIALS_PER_NODE * n, options.gpu_trial_seconds, "tune", "cuda") for n in nodes]
    if part == "train":
        return [SearchCase(n, TRAIN_TRIALS_PER_NODE * n, 3 * options.trial_seconds, "train") for n in options.nodes]
    return [SearchCase(max(options.nodes), options.many, 1.0, "tune")]


def measure_labels(scratch: Path, num_nodes: int, batches_per_node: int, batch_seconds: float) -> dict[str, Any]:
    """Run the label job on nodes of one GPU each; the simulated teacher takes `batch_seconds` for a full batch."""
    pairs = [(row["source"], row["target"]) for row in demo_rows("train")]
    chars_per_row = mean_source_chars()
    rows = round(num_nodes * batches_per_node * GPU_BATCH_CHARS / chars_per_row)
    folder = Path(tempfile.mkdtemp(dir=scratch))
    data, recorded = folder / "rows.jsonl", folder / "batch-ends"
    write_jsonl(data, islice(cycle(pairs), rows))
    decoding = Decoding(beams=4, max_length=64)
    job = LabelJob(str(_unused_teacher(scratch)), Dataset(name=str(data)), decoding=decoding, metric="rouge2")
    open_engine = partial(simulated_engine, seconds_per_char=batch_seconds / GPU_BATCH_CHARS)
    factory = partial(open_recording_engine, recorded, open_engine)
    with cluster_nodes(num_nodes, cpus=1, gpus=1) as meter:
        start = time.time()
        labels = pseudolabel(job, folder / "labels", "cuda", verbose=False, engine_factory=factory)
        end = time.time()
    assert read_manifest(labels).rows == rows
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
        "driver_seconds": meter.cpu_between(start, end)["driver"],
        "peak_gib": max(meter.memory_gib),
    }


def mean_source_chars() -> float:
    """Characters of a source of the simulated label job, on average."""
    sources = [row["source"] for row in demo_rows("train")]
    return sum(map(len, sources)) / len(sources)


def driver_row_cost(fewer: dict[str, Any], more: dict[str, Any]) -> RowCost:
    """The line through the driver's CPU seconds of two label jobs on equal nodes, which differ in their rows."""
    per_row = (more["driver_seconds"] - fewer["driver_seconds"]) / (more["rows"] - fewer["rows"])
    return RowCost(more["driver_seconds"] - per_row * more["rows"], per_row)


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
    rate, rows = counted / (end - start), GPU_BATCH_CHARS / mean_source_chars()
    return {"nodes": num_nodes, "batches": count, "per_second": rate, "rows": rows, "cpu_per_batch": used}


def _make_empty_batch_function() -> BatchFunction:
    def process_batch(number: int) -> BatchStats:
        return {"rows": 1.0}

    return process_batch


def measure_trials(scratch: Path, case: SearchCase) -> dict[str, Any]:
    """Search with simulated trials, as many at a time as there are nodes."""
    space = endless_space(case.trials, case.nodes, case.trial_seconds, case.launcher)
    sweep = Path(tempfile.mkdtemp(dir=scratch))
    prepared = synthetic_sweep()
    write_sweep_record(space, sweep, prepared, "running")
    train_fn = partial(simulated_run, seconds_per_step=SECONDS_PER_STEP)
    # With Ray Train, the trial's own function occupies a tenth of a CPU in addition to its worker.
    cpus, gpus = 1 if case.launcher == "tune" else 2, int(case.device == "cuda")
    with cluster_nodes(case.nodes, cpus=cpus, gpus=gpus) as meter:
        start = time.time()
        context = TrialContext(space, sweep, prepared, case.device, train_fn)
        run_search(context, [ProgressCallback(sweep, space.search, "rouge2")])
        end = time.time()
    sleeps = sorted((read_sleep(path) for path in sweep.glob(f"trials/*/{SLEEP_FILE}")), key=lambda sleep: sleep.start)
    assert len(sleeps) == case.trials
    key = next((sweep / "trials").glob("*/result.json")).parent.name
    reading_seconds = [timeit(lambda: peer_curves(sweep, key), number=1) for _ in range(2)]
    busy = steady_rate(assign_slots(sleeps, case.nodes)) / case.nodes
    print_progress(f"{case.launcher}: {case.trials} trials on {case.nodes} nodes: slots busy {busy:.0%} of the time")
    ends = sorted(sleep.end for sleep in sleeps)
    windows = [(ends[first], ends[last]) for first, last in trial_windows(case.trials)]
    return {
        **asdict(case),
        "busy": busy,
        "busy_with_start": busy_with_start(sleeps, case.nodes, start),
        "seconds": end - start,
        "start": sleeps[0].start - start,
        "reading": reading_seconds,
        "cpu_per_trial": _cpu_per_trial(meter, sleeps, ends[0], ends[-1]),
        "peak_gib": max(meter.memory_gib),
        "windows": [_cpu_per_trial(meter, sleeps, *window) for window in windows],
        "sleeps": [asdict(sleep) for sleep in sleeps],
    }


def trial_windows(count: int, size: int = WINDOW_TRIALS) -> list[tuple[int, int]]:
    """The first, middle and last `size` of `count` trials in the order of their ends.

    A window (i, j) is the time from the end of trial i to the end of trial j, in which j - i trials end. With fewer
    trials than three windows need, the windows are shorter.
    """
    size = max(1, min(size, (count - 1) // 3))
    return [(first, min(first + size, count - 1)) for first in (0, (count - 1 - size) // 2, count - 1 - size)]


def busy_with_start(sleeps: list[TrialSleep], num_slots: int, start: float) -> float:
    """The share of the slots' time at work, from the start of the search to the end of its last trial."""
    seconds = max(sleep.end for sleep in sleeps) - start
    return sum(sleep.seconds for sleep in sleeps) / (num_slots * seconds)


def measure_driver(scratch: Path, num_earlier: int) -> dict[str, Any]:
    """Seconds of what the driver does for a trial, and of a check for early stopping, after `num_earlier` trials.

    The study proposes the trials, their files are written without training, and the study and the progress callback
    receive the results. Ray Tune's own work is measured by the part `many` only, MLflow's by the part `publish` only.
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


def measure_publication(scratch: Path, num_earlier: int) -> dict[str, Any]:
    """Seconds of the publication of a trial to MLflow, after `num_earlier` trials.

    A search publishes every minute, in a thread of the driver. The first publication logs all earlier trials; it also
    writes the report. The second one logs `DRIVER_TRIALS` further trials only, as nearly all publications of a search.
    """
    sweep = Path(tempfile.mkdtemp(dir=scratch))
    space = endless_space(num_earlier + 2 * DRIVER_TRIALS, None, 1.0, "tune")
    space = space.model_copy(update={"tracking_uri": f"sqlite:///{sweep / 'mlflow.db'}"})
    prepared = synthetic_sweep()
    write_sweep_record(space, sweep, prepared, "running")
    write_trials(space, sweep, prepared, num_earlier)
    publisher = SearchPublisher(sweep)
    first = timeit(publisher.publish, number=1)
    write_trials(space, sweep, prepared, DRIVER_TRIALS)
    per_trial = timeit(publisher.publish, number=1) / DRIVER_TRIALS
    print_progress(f"publish: after {num_earlier} trials: {per_trial:.3f} s a trial")
    return {"earlier": num_earlier, "first": first, "per_trial": per_trial}


def write_trials(space: Space, sweep: Path, prepared: PreparedSweep, count: int) -> None:
    """Write the folders of `count` further finished trials with random settings."""
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
        "gpu": ("A search with reused Tune actors that hold a GPU", _trials_text),
        "train": ("A search with Ray Train", _trials_text),
        "many": ("Many short trials", _many_text),
        "driver": ("The driver after many trials", _driver_text),
        "publish": ("Publication to MLflow", _publish_text),
    }
    return "\n\n".join(f"## {title}\n\n{text(results[p])}" for p, (title, text) in sections.items() if p in results)


def _labels_text(record: dict[str, Any]) -> str:
    header = [
        *("nodes", "rows", "batches", "rows/s", "times one node", "efficiency", "s before", "s labelling", "s after"),
        *("driver CPU s before", "labelling", "after"),
        *("driver CPU ms/batch labelling", "GCS", "rest", "peak GiB"),
    ]
    records, names = record["by_nodes"], ("before", "labelling", "after")
    one_node = records[0]["rows_per_second"] / records[0]["nodes"]
    rows = []
    for each in [*records, record["fewer_rows"]]:
        phases, speedup = each["phases"], each["rows_per_second"] / one_node
        processes = ("driver", "gcs", "rest of the head")
        per_batch = [1000 * phases["labelling"][process] / each["batches"] for process in processes]
        rows.append(
            [
                *(str(each["nodes"]), str(each["rows"]), str(each["batches"])),
                *(f"{each['rows_per_second']:.0f}", f"{speedup:.2f}", f"{speedup / each['nodes']:.1%}"),
                *(f"{phases[name]['seconds']:.1f}" for name in names),
                *(f"{phases[name]['driver']:.1f}" for name in names),
                *(f"{ms:.1f}" for ms in per_batch),
                f"{each['peak_gib']:.1f}",
            ]
        )
    last = max(records, key=lambda each: each["nodes"])
    return (
        f"A full batch ({GPU_BATCH_CHARS} characters, about {GPU_BATCH_CHARS / last['chars']:.0f} rows of "
        f"{last['chars']:.0f}) takes a teacher {last['batch_seconds']:g} s. Rates count each teacher's batches after "
        f"its first; on {last['nodes']} nodes the sleeps alone would give {last['ideal']:.0f} rows/s. The actors score "
        f"ROUGE-2 on the cores of this machine, which limits the rate as well. Before: reading, checking, planning, "
        f"start of the actors; after: merging the outputs, which the actors have scored.\n\n"
        f"{markdown_table(header, rows)}\n\n"
        f"{_row_cost_text(last['nodes'], driver_row_cost(record['fewer_rows'], last))}"
    )


def _row_cost_text(nodes: int, cost: RowCost) -> str:
    """The driver's CPU time per row, and the limit that follows from it."""
    if cost.seconds_per_row <= 0:
        return "The driver's CPU time per row is too small to be measured with these rows; use more --batches."
    return (
        f"The driver's CPU time on {nodes} nodes, from the last row of the table and the row with equal nodes: "
        f"{1000 * cost.seconds_per_row:.3f} ms per row (before, while and after labelling, with what it uses while it "
        f"waits), and {cost.fixed_seconds:.1f} s for any number of rows. At {cost.rows_per_second:.0f} rows/s the "
        f"driver would need a whole core."
    )


def _batches_text(record: dict[str, Any]) -> str:
    used = ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in record["cpu_per_batch"].items())
    return (
        f"{record['batches']} batches over {record['nodes']} nodes: {record['per_second']:.0f} per second, which would "
        f"be {record['per_second'] * record['rows']:.0f} rows/s in full batches of {record['rows']:.0f} rows. "
        f"CPU milliseconds per batch: {used}."
    )


def _trials_text(records: list[dict[str, Any]]) -> str:
    header = [
        *("nodes", "trials", "s of work per trial", "busy", "efficiency", "busy with the start", "s in total"),
        *("s to the first trial", "driver CPU s/trial", "GCS", "rest", "peak GiB"),
    ]
    baseline = records[0]["busy"]
    rows = [
        [
            *(str(record["nodes"]), str(record["trials"]), f"{record['trial_seconds']:g}"),
            *(f"{record['busy']:.1%}", f"{record['busy'] / baseline:.1%}", f"{record['busy_with_start']:.1%}"),
            *(f"{record['seconds']:.0f}", f"{record['start']:.1f}"),
            *(f"{seconds:.2f}" for seconds in record["cpu_per_trial"].values()),
            f"{record['peak_gib']:.1f}",
        ]
        for record in records
    ]
    return (
        "Busy: the share of the slots' time, after each slot's first trial, that trials spend on their own work. "
        "Efficiency: busy relative to the first row. Busy with the start: the share of all slots' time from the start "
        "of the search to its last trial's end. The processes of all nodes start on the cores of this machine.\n\n"
        f"{markdown_table(header, rows)}"
    )


def _many_text(record: dict[str, Any]) -> str:
    first, middle, last = (f"{window['driver']:.3f}" for window in record["windows"])
    size = trial_windows(record["trials"])[0][1]
    return (
        f"{record['trials']} trials of {record['trial_seconds']:g} s on {record['nodes']} nodes: slots busy "
        f"{record['busy']:.1%} of the time. Driver CPU per trial, what it uses while it waits included: {first} s in "
        f"the first {size} trials, {middle} s in the middle {size}, {last} s in the last {size}. MLflow is not part of "
        f"it. At the end, the first check for early stopping of a process takes {1000 * record['reading'][0]:.0f} ms, "
        f"a further one {1000 * record['reading'][1]:.0f} ms."
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


def _publish_text(records: list[dict[str, Any]]) -> str:
    header = ["earlier trials", "s of the first publication", "ms per further trial"]
    rows = [[str(r["earlier"]), f"{r['first']:.1f}", f"{1000 * r['per_trial']:.1f}"] for r in records]
    return (
        f"A local store. The first publication logs all earlier trials and writes the report; the second one logs "
        f"{DRIVER_TRIALS} further trials. Seconds of wall time in an idle process.\n\n{markdown_table(header, rows)}"
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
    parser.add_argument("--gpu-trial-seconds", type=float, default=60.0, help="gpu: seconds per trial; default: 60")
    parser.add_argument("--many", type=int, default=200, help="many: trials; default: 200")
    parser.add_argument(
        "--earlier", nargs="+", type=int, default=[100, 1000, 5000], help="driver: trials before the measured ones"
    )
    parser.add_argument(
        "--published", nargs="+", type=int, default=[100, 1000], help="publish: trials before the measured ones"
    )
    parser.add_argument("--work", help="folder for temporary files, such as sweeps; default: the system's")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    return parser.parse_args()


if __name__ == "__main__":
    main()
