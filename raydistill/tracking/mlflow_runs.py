"""MLflow's runs of a sweep: everything is derived from the sweep's folder, so it can be repeated at will.

Tags make it idempotent: `raydistill.sweep` finds the parent run, `raydistill.trial` a child, `raydistill.lines` says
how much of a history is logged, `raydistill.done` that a finished trial's artifacts are all there, `raydistill.served`
which served.json was logged, and `raydistill.report` which pictures.
"""

import contextlib
import hashlib
import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from raydistill.core.files import check_symlinks, write_atomic
from raydistill.core.secrets import redact
from raydistill.results.page import refresh_report
from raydistill.results.records import Trial, decoding_key, read_sweep
from raydistill.results.selection import Selection, load_selection
from raydistill.results.served_students import SERVED_FILE
from raydistill.results.tables import choices_table, format_trial_counts, markdown_table, method_table
from raydistill.tracking.mlflow_store import (
    TrackingUnavailable,
    check_tracking,
    default_tracking_uri,
    get_or_create_experiment,
    make_client,
    translate_mlflow_errors,
    ui_command,
)

FINAL_METRICS = (
    *("rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "val_loss", "latency_ms", "latency_ms_b1"),
    *("speedup", "params_m", "memory_mb", "peak_mb", "gpu_hours", "teacher_gpu_hours"),
)
DECODING_INDEPENDENT_METRICS = (
    "val_loss",
    "params_m",
    "memory_mb",
    "peak_mb",
    "gpu_hours",
    "teacher_gpu_hours",
)  # whatever the decoding
CHOSEN_TAG = "raydistill.chosen_for"
VIEW_METRICS = ("latency_ms", "speedup", "params_m", "gpu_hours")
LOCK_TIMEOUT_S = 120.0  # a first publishing copies every checkpoint
FetchCheckpoint = Callable[[Path], object]
BATCH_LIMITS = {"metrics": 900, "params": 90}  # MLflow takes 1000 metrics and 100 parameters at once


@dataclass(frozen=True)
class TrackedSweep:
    """Where a sweep is to be seen: the parent run, its page, and the command that shows a local store."""

    parent_run_id: str
    url: str
    command: str


def publish(
    sweep: Path, tracking_uri: str | None = None, finished: bool = False, fetch: FetchCheckpoint | None = None
) -> TrackedSweep:
    """Bring MLflow up to date with a sweep's folder; safe to repeat, and to kill at any point.

    Also writes SWEEP/table.md and SWEEP/front.png. Without a `tracking_uri` the sweep's own is used, else the
    local store. `fetch` fetches a checkpoint that another machine made, of which only records may be here, before it
    is published. TrackingDown where the store fails: nothing is lost, publish again later.
    """
    with publish_lock(sweep):
        return publish_locked(sweep, tracking_uri, finished, fetch)


def publish_locked(
    sweep: Path, tracking_uri: str | None, finished: bool, fetch: FetchCheckpoint | None
) -> TrackedSweep:
    """`publish` for one who is `publish_lock` already."""
    found = load_selection(sweep)
    report = refresh_report(found)
    uri = resolve_tracking_uri(found, tracking_uri)
    check_tracking(uri)
    with translate_mlflow_errors(uri):
        client = make_client(uri)
        experiment = get_or_create_experiment(client, found.name, uri)
        identity = _get_or_create_tracking_id(sweep, found.name)
        runs = _runs_by_trial(client, experiment, identity)
        parent = runs.get("") or _create_run(client, experiment, found.name, {"raydistill.sweep": identity})
        for trial in found.trials:
            run = runs.get(trial.key)
            if run is None:
                run = _create_trial_run(client, experiment, parent.info.run_id, identity, trial)
            _publish_trial(client, run, trial, found.metric, finished, fetch)
            _publish_served(client, run, trial, found)
        children = {key: run for key, run in _runs_by_trial(client, experiment, identity).items() if key}
        _publish_parent(client, parent, children, found, report, finished)
        view = _save_shared_view(client, experiment, found.metric)
    base = uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
    run_id = parent.info.run_id
    return TrackedSweep(run_id, f"{base}/#/experiments/{experiment}/runs?{view}", ui_command(uri))


@contextlib.contextmanager
def publish_lock(sweep: Path) -> Iterator[None]:
    """One process (and thread) at a time: two that look for a trial's run at once would both create it."""
    read_sweep(sweep)  # the lock would make the folder of a sweep that is not there
    lock = FileLock(sweep / ".publish.lock", timeout=LOCK_TIMEOUT_S)
    try:
        lock.acquire()
    except Timeout:
        raise TrackingUnavailable(f"{sweep}: another process has been publishing for {LOCK_TIMEOUT_S:.0f} s") from None
    except OSError as error:
        raise TrackingUnavailable(f"{sweep}: cannot be locked for publishing ({error.strerror})") from None
    try:
        yield
    finally:
        lock.release()


def _publish_trial(
    client: Any, run: Any, trial: Trial, metric: str, finished: bool, fetch: FetchCheckpoint | None
) -> None:
    if run.data.tags.get("raydistill.done") == "1":
        return
    _log_params(client, run, trial)
    last = _publish_history(client, run, trial)
    if trial.status != "running":
        if fetch and trial.checkpoint:
            fetch(trial.checkpoint)
        _publish_result(client, run.info.run_id, trial, metric, *last)
    elif finished:  # begun and never ended: the sweep is over without it
        client.set_terminated(run.info.run_id, "KILLED")
    elif run.info.status != "RUNNING":
        client.update_run(run.info.run_id, status="RUNNING")


def _publish_served(client: Any, run: Any, trial: Trial, selection: Selection) -> None:
    """What a finalist came to with each decoding, as the metrics DECODING/NAME, and the file that says so.

    It is found after the trial is done, and decodings may be added later.
    """
    path = trial.folder / SERVED_FILE
    if not path.is_file() or path.is_symlink():
        return
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if run.data.tags.get("raydistill.served") == digest:
        return
    # a constant time and step, so that publishing a decoding again adds nothing
    points = [
        (f"{decoding_key(student.decoding)}/{name}", value, run.info.start_time, 0)
        for student in selection.students
        if student.decoding and student.folder == trial.folder
        for name, value in _final_metrics(student, selection.metric).items()
        if name not in DECODING_INDEPENDENT_METRICS
    ]
    _log_metrics(client, run.info.run_id, points)
    client.log_artifact(run.info.run_id, str(path))
    client.set_tag(run.info.run_id, "raydistill.served", digest)  # last


def _publish_history(client: Any, run: Any, trial: Trial) -> tuple[int, int]:
    """Log the validations that are not logged yet; returns the last time (ms) and step."""
    start, lines = run.info.start_time, trial.history()
    # timestamps depend on the record alone, so that a line logged twice is the same metric twice
    places = [(start + round(1000 * float(at.get("time_s", 0))), int(at.get("step", 0))) for at in lines]
    logged = min(int(run.data.tags.get("raydistill.lines", 0)), len(lines))
    points = [
        (name, float(value), *place)
        for line, place in list(zip(lines, places, strict=True))[logged:]
        for name, value in line.items()
        if name not in ("step", "time_s") and _is_number(value)
    ]
    _log_metrics(client, run.info.run_id, points)
    if len(lines) > logged:
        client.set_tag(run.info.run_id, "raydistill.lines", str(len(lines)))
    return max((time for time, _ in places), default=start), max((step for _, step in places), default=0)


def _publish_result(client: Any, run_id: str, trial: Trial, metric: str, last_time_ms: int, last_step: int) -> None:
    """The final metrics (later than the history, so that they are the run's latest), artifacts and status."""
    final = [(k, v, last_time_ms + 1, max(last_step, trial.steps)) for k, v in _final_metrics(trial, metric).items()]
    _log_metrics(client, run_id, final)
    client.update_run(run_id, name=trial.label)
    for name in ("run.json", "result.json", "metrics.jsonl"):
        if (trial.folder / name).is_file() and not (trial.folder / name).is_symlink():
            client.log_artifact(run_id, str(trial.folder / name))
    if trial.checkpoint is not None:
        check_symlinks(trial.checkpoint)
        client.log_artifacts(run_id, str(trial.checkpoint), "checkpoint")
    for name, text in (("reason", trial.reason), ("signature", trial.signature), ("status", trial.status)):
        if text:
            client.set_tag(run_id, f"raydistill.{name}", redact(text)[:4000])
    client.set_terminated(run_id, "FINISHED" if trial.scored else "FAILED")
    client.set_tag(run_id, "raydistill.done", "1")  # last: a kill before it has all of this done again


def _publish_parent(
    client: Any, parent: Any, children: dict[str, Any], selection: Selection, report_paths: list[Path], finished: bool
) -> None:
    run_id = parent.info.run_id
    note = f"**{selection.name}**: {format_trial_counts(selection.trials)}."
    at = f"#/experiments/{parent.info.experiment_id}/runs"
    if selection.choices:
        links = {key: f"{at}/{child.info.run_id}" for key, child in children.items()}
        header, rows = choices_table(selection, links)
        # MLflow folds a description after a few lines: the links come first, so that they can be clicked at once.
        note = f"**Chosen** for {'; '.join(f'{name}: {student}' for name, _, student, *_ in rows)}\n\n{note}"
        note += f"\n\n{markdown_table(header, rows)}"
    note += f"\n\n{markdown_table(*method_table(selection))}"
    note += "\n\nThe front to point at, and the learning curves: artifact `front.html` of this run."
    client.set_tag(run_id, "mlflow.note.content", note[:8000])
    teacher = selection.teacher
    scores = {**(teacher.get("metrics") or {}), **(teacher.get("costs") or {})}
    # a constant time and step, so that publishing again adds nothing
    points = [(f"teacher_{k}", float(v), parent.info.start_time, 0) for k, v in scores.items() if _is_number(v)]
    if _is_number(selection.record.get("teacher_gpu_hours")):
        points.append(("teacher_gpu_hours", float(selection.record["teacher_gpu_hours"]), parent.info.start_time, 0))
    _log_metrics(client, run_id, points)
    drawn = str(max(path.stat().st_mtime_ns for path in report_paths))
    if parent.data.tags.get("raydistill.report") != drawn:
        for path in [*report_paths, selection.sweep / "space.yaml", selection.sweep / "sweep.json"]:
            if path.exists():
                client.log_artifact(run_id, str(path))
        client.set_tag(run_id, "raydistill.report", drawn)
    for key, child in children.items():
        budgets = ", ".join(
            name for name, chosen in selection.chosen_keys.items() if chosen and selection.trial_key(chosen) == key
        )
        if budgets != child.data.tags.get(CHOSEN_TAG, ""):
            client.set_tag(child.info.run_id, CHOSEN_TAG, budgets)
    if finished:
        client.set_terminated(run_id, "FINISHED")
    elif parent.info.status != "RUNNING":
        client.update_run(run_id, status="RUNNING")


def _save_shared_view(client: Any, experiment_id: str, metric: str) -> str:
    """Keep a view of the finished trials as MLflow's own Share button does; returns the query that opens it.

    Without it the UI hides metrics and parameters until a person picks them from a list of dozens.
    """
    metrics = (metric, f"test_{metric}", f"test_{metric}_low", f"test_{metric}_high", *VIEW_METRICS)
    columns = [f"metrics.`{name}`" for name in metrics]
    columns += [f"params.`{name}`" for name in ("method", "student.size")] + [f"tags.`{CHOSEN_TAG}`"]
    view = {
        "searchFilter": "tags.`raydistill.trial` != ''",
        "orderByKey": f"metrics.`{metric}`",
        "orderByAsc": False,
        "selectedColumns": columns,
    }
    client.set_experiment_tag(experiment_id, "mlflow.sharedViewState.raydistill", json.dumps(view))
    return "viewStateShareKey=raydistill"


def flatten_params(data: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys and text without secrets; lists as JSON; what is None is left out."""
    flat: dict[str, str] = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= flatten_params(value, f"{name}.")
        elif value is not None:
            flat[name] = redact(value if isinstance(value, str) else json.dumps(value))
    return flat


def _create_trial_run(client: Any, experiment_id: str, parent_run_id: str, tracking_id: str, trial: Trial) -> Any:
    tags = {"raydistill.sweep": tracking_id, "raydistill.trial": trial.key, "mlflow.parentRunId": parent_run_id}
    return _create_run(client, experiment_id, trial.label, tags)


def _final_metrics(trial: Trial, metric: str) -> dict[str, float]:
    """The contract's metrics, the test split's with `test_`, and the main one's interval as `_low` and `_high`."""
    values = {name: trial.metrics[name] for name in FINAL_METRICS if name in trial.metrics}
    if trial.interval:
        values |= {f"{metric}_low": trial.interval[0], f"{metric}_high": trial.interval[1]}
    for name, value in (trial.test or {}).items():
        if _is_number(value):
            values[f"test_{name}"] = float(value)
        elif name == "interval" and value:
            values |= {f"test_{metric}_low": float(value[0]), f"test_{metric}_high": float(value[1])}
    return values


def _log_params(client: Any, run: Any, trial: Trial) -> None:
    from mlflow.entities import Param

    params = flatten_params(trial.run_config())
    if trial.size:
        params["size"] = trial.size
    params |= {f"copied.{side}": json.dumps(layers) for side, layers in trial.copied.items()}
    # a parameter cannot be changed once logged, and a running trial has fewer of them
    new = [Param(k, v[:6000]) for k, v in params.items() if k not in run.data.params]
    for i in range(0, len(new), BATCH_LIMITS["params"]):
        client.log_batch(run.info.run_id, params=new[i : i + BATCH_LIMITS["params"]])


def _log_metrics(client: Any, run_id: str, points: list[tuple[str, float, int, int]]) -> None:
    from mlflow.entities import Metric

    metrics = [Metric(*point) for point in points]
    for i in range(0, len(metrics), BATCH_LIMITS["metrics"]):
        client.log_batch(run_id, metrics=metrics[i : i + BATCH_LIMITS["metrics"]])


def resolve_tracking_uri(selection: Selection, tracking_uri: str | None) -> str:
    """The store to write to: the one asked for, else the sweep's, else the local one."""
    return tracking_uri or selection.record.get("tracking_uri") or default_tracking_uri()


def _get_or_create_tracking_id(sweep: Path, name: str) -> str:
    """The sweep's own mark, kept in its folder: two sweeps of one name on a shared server stay apart."""
    path = sweep / "tracking_id"
    if not path.exists():
        write_atomic(path, f"{name}-{uuid.uuid4().hex[:12]}\n".encode())
    return path.read_text(encoding="utf-8").strip()


def find_run(client: Any, selection: Selection, key: str, uri: str) -> Any:
    """The run of a trial; None where there is none yet."""
    experiment = get_or_create_experiment(client, selection.name, uri)
    return _runs_by_trial(client, experiment, _get_or_create_tracking_id(selection.sweep, selection.name)).get(key)


def _runs_by_trial(client: Any, experiment_id: str, tracking_id: str) -> dict[str, Any]:
    """This sweep's runs by trial key; the parent under "".

    A request that was sent again, since a proxy had given up on it, may have made a second run of a trial: of two the
    one that was written to, which has more tags, is kept, and the other deleted.
    """
    found: dict[str, Any] = {}
    token = None
    while True:
        text = f"tags.`raydistill.sweep` = '{tracking_id}'"
        page = client.search_runs([experiment_id], text, max_results=500, page_token=token)
        for run in page:
            key = run.data.tags.get("raydistill.trial", "")
            other = found.setdefault(key, run)
            if other is not run:
                found[key], lesser = sorted((run, other), key=lambda one: len(one.data.tags), reverse=True)
                client.delete_run(lesser.info.run_id)
        token = page.token
        if not token:
            return found


def _create_run(client: Any, experiment_id: str, name: str, tags: dict[str, str]) -> Any:
    return client.create_run(experiment_id, tags={**tags, "mlflow.source.name": "raydistill"}, run_name=name)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
