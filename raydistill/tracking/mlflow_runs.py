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

from raydistill.core.files import check_links, write_atomic
from raydistill.core.secrets import hidden
from raydistill.results.costs import method_table
from raydistill.results.page import refreshed
from raydistill.results.records import Trial, decoding_name, read_sweep
from raydistill.results.selection import Outcome, outcome
from raydistill.results.served_students import SERVED
from raydistill.results.tables import choices_table, count_trials, markdown_table
from raydistill.tracking.mlflow_store import (
    TrackingDown,
    check_tracking,
    client_of,
    default_uri,
    experiment_of,
    plain_errors,
    ui_command,
)

FINAL = (
    *("rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "val_loss", "latency_ms", "latency_ms_b1"),
    *("speedup", "params_m", "memory_mb", "peak_mb", "gpu_hours", "teacher_gpu_hours"),
)
TRAINED = ("val_loss", "params_m", "memory_mb", "peak_mb", "gpu_hours", "teacher_gpu_hours")  # whatever the decoding
CHOSEN = "raydistill.chosen_for"
COLUMNS = ("latency_ms", "speedup", "params_m", "gpu_hours")
LOCK_WAIT_S = 120.0  # a first publishing copies every checkpoint
Bring = Callable[[Path], object]
CHUNK = {"metrics": 900, "params": 90}  # MLflow takes 1000 metrics and 100 parameters at once


@dataclass(frozen=True)
class Tracked:
    """Where a sweep is to be seen: the parent run, its page, and the command that shows a local store."""

    parent_run_id: str
    url: str
    command: str


def publish(
    sweep: Path, tracking_uri: str | None = None, finished: bool = False, bring: Bring | None = None
) -> Tracked:
    """Bring MLflow up to date with a sweep's folder; safe to repeat, and to kill at any point.

    Also writes SWEEP/table.md and SWEEP/front.png. Without a `tracking_uri` the sweep's own is used, else the
    local store. `bring` fetches a checkpoint that another machine made, of which only records may be here, before it
    is published. TrackingDown where the store fails: nothing is lost, publish again later.
    """
    with alone(sweep):
        return publish_alone(sweep, tracking_uri, finished, bring)


def publish_alone(sweep: Path, tracking_uri: str | None, finished: bool, bring: Bring | None) -> Tracked:
    """`publish` for one who is `alone` already."""
    found = outcome(sweep)
    report = refreshed(found)
    uri = uri_of(found, tracking_uri)
    check_tracking(uri)
    with plain_errors(uri):
        client = client_of(uri)
        experiment = experiment_of(client, found.name, uri)
        identity = _identity(sweep, found.name)
        runs = _runs(client, experiment, identity)
        parent = runs.get("") or _create(client, experiment, found.name, {"raydistill.sweep": identity})
        for trial in found.trials:
            run = runs.get(trial.key)
            if run is None:
                run = _create_child(client, experiment, parent.info.run_id, identity, trial)
            _publish_trial(client, run, trial, found.metric, finished, bring)
            _publish_served(client, run, trial, found)
        children = {key: run for key, run in _runs(client, experiment, identity).items() if key}
        _publish_parent(client, parent, children, found, report, finished)
        view = _share_view(client, experiment, found.metric)
    base = uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
    run_id = parent.info.run_id
    return Tracked(run_id, f"{base}/#/experiments/{experiment}/runs?{view}", ui_command(uri))


@contextlib.contextmanager
def alone(sweep: Path) -> Iterator[None]:
    """One process (and thread) at a time: two that look for a trial's run at once would both create it."""
    read_sweep(sweep)  # the lock would make the folder of a sweep that is not there
    lock = FileLock(sweep / ".publish.lock", timeout=LOCK_WAIT_S)
    try:
        lock.acquire()
    except Timeout:
        raise TrackingDown(f"{sweep}: another process has been publishing for {LOCK_WAIT_S:.0f} s") from None
    except OSError as error:
        raise TrackingDown(f"{sweep}: cannot be locked for publishing ({error.strerror})") from None
    try:
        yield
    finally:
        lock.release()


def _publish_trial(client: Any, run: Any, trial: Trial, metric: str, finished: bool, bring: Bring | None) -> None:
    if run.data.tags.get("raydistill.done") == "1":
        return
    _log_params(client, run, trial)
    last = _publish_history(client, run, trial)
    if trial.status != "running":
        if bring and trial.checkpoint:
            bring(trial.checkpoint)
        _publish_end(client, run.info.run_id, trial, metric, *last)
    elif finished:  # begun and never ended: the sweep is over without it
        client.set_terminated(run.info.run_id, "KILLED")
    elif run.info.status != "RUNNING":
        client.update_run(run.info.run_id, status="RUNNING")


def _publish_served(client: Any, run: Any, trial: Trial, found: Outcome) -> None:
    """What a finalist came to with each decoding, as the metrics DECODING/NAME, and the file that says so.

    It is found after the trial is done, and decodings may be added later.
    """
    path = trial.folder / SERVED
    if not path.is_file() or path.is_symlink():
        return
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if run.data.tags.get("raydistill.served") == digest:
        return
    # a constant time and step, so that publishing a decoding again adds nothing
    points = [
        (f"{decoding_name(student.decoding)}/{name}", value, run.info.start_time, 0)
        for student in found.students
        if student.decoding and student.folder == trial.folder
        for name, value in _final_metrics(student, found.metric).items()
        if name not in TRAINED
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


def _publish_end(client: Any, run_id: str, trial: Trial, metric: str, time: int, step: int) -> None:
    """The final metrics (later than the history, so that they are the run's latest), artifacts and status."""
    final = [(k, v, time + 1, max(step, trial.steps)) for k, v in _final_metrics(trial, metric).items()]
    _log_metrics(client, run_id, final)
    client.update_run(run_id, name=trial.label)
    for name in ("run.json", "result.json", "metrics.jsonl"):
        if (trial.folder / name).is_file() and not (trial.folder / name).is_symlink():
            client.log_artifact(run_id, str(trial.folder / name))
    if trial.checkpoint is not None:
        check_links(trial.checkpoint)
        client.log_artifacts(run_id, str(trial.checkpoint), "checkpoint")
    for name, text in (("reason", trial.reason), ("signature", trial.signature), ("status", trial.status)):
        if text:
            client.set_tag(run_id, f"raydistill.{name}", hidden(text)[:4000])
    client.set_terminated(run_id, "FINISHED" if trial.scored else "FAILED")
    client.set_tag(run_id, "raydistill.done", "1")  # last: a kill before it has all of this done again


def _publish_parent(
    client: Any, parent: Any, children: dict[str, Any], found: Outcome, report: list[Path], finished: bool
) -> None:
    run_id = parent.info.run_id
    note = f"**{found.name}**: {count_trials(found.trials)}."
    at = f"#/experiments/{parent.info.experiment_id}/runs"
    if found.choices:
        links = {key: f"{at}/{child.info.run_id}" for key, child in children.items()}
        header, rows = choices_table(found, links)
        # MLflow folds a description after a few lines: the links come first, so that they can be clicked at once.
        note = f"**Chosen** for {'; '.join(f'{name}: {student}' for name, _, student, *_ in rows)}\n\n{note}"
        note += f"\n\n{markdown_table(header, rows)}"
    note += f"\n\n{markdown_table(*method_table(found))}"
    note += "\n\nThe front to point at, and the learning curves: artifact `front.html` of this run."
    client.set_tag(run_id, "mlflow.note.content", note[:8000])
    teacher = found.teacher
    scores = {**(teacher.get("metrics") or {}), **(teacher.get("costs") or {})}
    # a constant time and step, so that publishing again adds nothing
    points = [(f"teacher_{k}", float(v), parent.info.start_time, 0) for k, v in scores.items() if _is_number(v)]
    if _is_number(found.info.get("teacher_gpu_hours")):
        points.append(("teacher_gpu_hours", float(found.info["teacher_gpu_hours"]), parent.info.start_time, 0))
    _log_metrics(client, run_id, points)
    drawn = str(max(path.stat().st_mtime_ns for path in report))
    if parent.data.tags.get("raydistill.report") != drawn:
        for path in [*report, found.sweep / "space.yaml", found.sweep / "sweep.json"]:
            if path.exists():
                client.log_artifact(run_id, str(path))
        client.set_tag(run_id, "raydistill.report", drawn)
    for key, child in children.items():
        budgets = ", ".join(name for name, chosen in found.chosen.items() if chosen and found.trial_of(chosen) == key)
        if budgets != child.data.tags.get(CHOSEN, ""):
            client.set_tag(child.info.run_id, CHOSEN, budgets)
    if finished:
        client.set_terminated(run_id, "FINISHED")
    elif parent.info.status != "RUNNING":
        client.update_run(run_id, status="RUNNING")


def _share_view(client: Any, experiment: str, metric: str) -> str:
    """Keep a view of the finished trials as MLflow's own Share button does; returns the query that opens it.

    Without it the UI hides metrics and parameters until a person picks them from a list of dozens.
    """
    metrics = (metric, f"test_{metric}", f"test_{metric}_low", f"test_{metric}_high", *COLUMNS)
    columns = [f"metrics.`{name}`" for name in metrics]
    columns += [f"params.`{name}`" for name in ("method", "student.size")] + [f"tags.`{CHOSEN}`"]
    view = {
        "searchFilter": "tags.`raydistill.trial` != ''",
        "orderByKey": f"metrics.`{metric}`",
        "orderByAsc": False,
        "selectedColumns": columns,
    }
    client.set_experiment_tag(experiment, "mlflow.sharedViewState.raydistill", json.dumps(view))
    return "viewStateShareKey=raydistill"


def flatten(data: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys and text without secrets; lists as JSON; what is None is left out."""
    flat: dict[str, str] = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= flatten(value, f"{name}.")
        elif value is not None:
            flat[name] = hidden(value if isinstance(value, str) else json.dumps(value))
    return flat


def _create_child(client: Any, experiment: str, parent: str, identity: str, trial: Trial) -> Any:
    tags = {"raydistill.sweep": identity, "raydistill.trial": trial.key, "mlflow.parentRunId": parent}
    return _create(client, experiment, trial.label, tags)


def _final_metrics(trial: Trial, metric: str) -> dict[str, float]:
    """The contract's metrics, the test split's with `test_`, and the main one's interval as `_low` and `_high`."""
    values = {name: trial.metrics[name] for name in FINAL if name in trial.metrics}
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

    params = flatten(trial.run_config())
    if trial.size:
        params["size"] = trial.size
    params |= {f"copied.{side}": json.dumps(layers) for side, layers in trial.copied.items()}
    # a parameter cannot be changed once logged, and a running trial has fewer of them
    new = [Param(k, v[:6000]) for k, v in params.items() if k not in run.data.params]
    for i in range(0, len(new), CHUNK["params"]):
        client.log_batch(run.info.run_id, params=new[i : i + CHUNK["params"]])


def _log_metrics(client: Any, run_id: str, points: list[tuple[str, float, int, int]]) -> None:
    from mlflow.entities import Metric

    metrics = [Metric(*point) for point in points]
    for i in range(0, len(metrics), CHUNK["metrics"]):
        client.log_batch(run_id, metrics=metrics[i : i + CHUNK["metrics"]])


def uri_of(found: Outcome, tracking_uri: str | None) -> str:
    """The store to write to: the one asked for, else the sweep's, else the local one."""
    return tracking_uri or found.info.get("tracking_uri") or default_uri()


def _identity(sweep: Path, name: str) -> str:
    """The sweep's own mark, kept in its folder: two sweeps of one name on a shared server stay apart."""
    path = sweep / "tracking_id"
    if not path.exists():
        write_atomic(path, f"{name}-{uuid.uuid4().hex[:12]}\n".encode())
    return path.read_text(encoding="utf-8").strip()


def run_of(client: Any, found: Outcome, key: str, uri: str) -> Any:
    """The run of a trial; None where there is none yet."""
    experiment = experiment_of(client, found.name, uri)
    return _runs(client, experiment, _identity(found.sweep, found.name)).get(key)


def _runs(client: Any, experiment: str, identity: str) -> dict[str, Any]:
    """This sweep's runs by trial key; the parent under "".

    A request that was sent again, since a proxy had given up on it, may have made a second run of a trial: of two the
    one that was written to, which has more tags, is kept, and the other deleted.
    """
    found: dict[str, Any] = {}
    token = None
    while True:
        text = f"tags.`raydistill.sweep` = '{identity}'"
        page = client.search_runs([experiment], text, max_results=500, page_token=token)
        for run in page:
            key = run.data.tags.get("raydistill.trial", "")
            other = found.setdefault(key, run)
            if other is not run:
                found[key], lesser = sorted((run, other), key=lambda one: len(one.data.tags), reverse=True)
                client.delete_run(lesser.info.run_id)
        token = page.token
        if not token:
            return found


def _create(client: Any, experiment: str, name: str, tags: dict[str, str]) -> Any:
    return client.create_run(experiment, tags={**tags, "mlflow.source.name": "raydistill"}, run_name=name)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
