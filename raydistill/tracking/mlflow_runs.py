"""Publish a sweep to MLflow: one parent run for the sweep and a child run for every trial.

Everything is derived from the sweep's folder. Publishing is idempotent by means of tags: `raydistill.sweep` identifies
the parent run, `raydistill.trial` a child run. `raydistill.lines` counts the logged validations, and `raydistill.done`
marks a finished trial whose artifacts are complete. `raydistill.served` and `raydistill.report` identify the logged
version of served.json and of the report.
"""

import contextlib
import hashlib
import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydistill.config.metric_names import MetricChoice
from raydistill.core import artifact
from raydistill.core.files import check_symlinks, write_atomic
from raydistill.core.secrets import redact
from raydistill.data.card import public_name
from raydistill.results.page import refresh_report
from raydistill.results.records import Trial
from raydistill.results.selection import Selection, load_selection
from raydistill.results.served_students import SERVED_FILE
from raydistill.results.serving_latency import LATENCY_FILE
from raydistill.results.sweep_record import SWEEP_FILE, read_sweep
from raydistill.results.tables import choices_table, format_trial_counts, markdown_table, method_table
from raydistill.results.trial_index import TrialIndex, Version
from raydistill.tracking.checkpoints import download_checkpoint
from raydistill.tracking.mlflow_store import (
    check_tracking,
    get_or_create_experiment,
    make_client,
    translate_mlflow_errors,
    ui_address,
)

# Metrics of a checkpoint that do not depend on how it is served
CHECKPOINT_METRICS = ("val_loss", "params_m", "device_hours", "teacher_device_hours")
# Final metrics in addition to the scores
COSTS = (
    *("latency_ms", "latency_ms_b1", "rows_per_s", "speedup", "speedup_same_serving", "memory_mb", "peak_mb"),
    *CHECKPOINT_METRICS,
)
CHOSEN_TAG = "raydistill.chosen_for"
MODEL_TRAINING = "workflowType=machine_learning"  # of an address: MLflow's UI shows its pages for training, not GenAI's
SERVED_METRICS = ("latency_ms", "latency_ms_b1", "speedup", "speedup_same_serving", "rows_per_s")
PUBLISH_LOCK = "publish"  # in a sweep's folder, the name whose lock a command holds that publishes the sweep
LOCK_TIMEOUT_S = 120.0  # the first publication copies every checkpoint
BATCH_LIMITS = {"metrics": 900, "params": 90}  # MLflow accepts 1000 metrics and 100 parameters per request
MAX_PARAM_CHARS = 6000
MAX_TAG_CHARS = 4000
MAX_DESCRIPTION_CHARS = 8000
# Time between two complete publications of a running search, relative to the time of one: at most 5 % of a core
COMPLETE_FACTOR = 20


@dataclass(frozen=True)
class TrackedSweep:
    """A published sweep: its parent run, and the addresses of its experiment and of the parent run in MLflow's UI."""

    parent_run_id: str
    url: str
    parent_url: str


@dataclass(frozen=True)
class MetricPoint:
    """A value of a metric; times are in milliseconds since the epoch."""

    name: str
    value: float
    time_ms: int
    step: int


@dataclass(frozen=True)
class Experiment:
    """One sweep's runs in an MLflow experiment, and the client to write them with."""

    client: Any
    experiment_id: str
    tracking_id: str

    def runs_by_trial(self) -> dict[str, Any]:
        """This sweep's runs by trial key; the parent run under "".

        A request that a proxy repeated may have created a second run of a trial. The run with more tags, to which data
        was logged, is kept; the duplicate is deleted.
        """
        runs: dict[str, Any] = {}
        for run in self._search_runs():
            key = run.data.tags.get("raydistill.trial", "")
            other = runs.setdefault(key, run)
            if other is not run:
                runs[key], duplicate = sorted((run, other), key=lambda r: len(r.data.tags), reverse=True)
                self.client.delete_run(duplicate.info.run_id)
        return runs

    def create_parent_run(self, name: str) -> Any:
        """The sweep's run."""
        return _create_run(self.client, self.experiment_id, name, {"raydistill.sweep": self.tracking_id})

    def create_trial_run(self, parent_run_id: str, trial: Trial) -> Any:
        """A trial's run, as a child of the sweep's run."""
        tags = {"raydistill.sweep": self.tracking_id, "raydistill.trial": trial.key}
        tags["mlflow.parentRunId"] = parent_run_id
        return _create_run(self.client, self.experiment_id, trial.label, tags)

    def find_trial_run(self, key: str) -> Any:
        """The run of a trial, in one request; None if it was not published yet."""
        query = f"{self._query} and tags.`raydistill.trial` = '{key}'"
        runs = self.client.search_runs([self.experiment_id], query, max_results=2)
        return max(runs, key=lambda run: len(run.data.tags), default=None)

    @property
    def _query(self) -> str:
        return f"tags.`raydistill.sweep` = '{self.tracking_id}'"

    def _search_runs(self) -> Iterator[Any]:
        token = None
        while True:
            page = self.client.search_runs([self.experiment_id], self._query, max_results=500, page_token=token)
            yield from page
            token = page.token
            if not token:
                return


def publish(sweep: Path, finished: bool = False) -> TrackedSweep:
    """Bring the sweep's MLflow store and report files up to date with the sweep's folder.

    It is safe to repeat and to kill at any point. Checkpoints that another machine wrote are downloaded first.

    Args:
        sweep: The sweep's folder.
        finished: Whether the search is over, so that trials without a result count as killed.

    Raises:
        TrackingUnavailable: The store failed; publishing again later logs everything that is missing.
    """
    with publish_lock(sweep):
        return publish_locked(sweep, finished)


def publish_locked(sweep: Path, finished: bool) -> TrackedSweep:
    """`publish` for a caller that holds `publish_lock`."""
    selection = load_selection(sweep)
    report_paths = refresh_report(selection)
    uri = selection.record.tracking_uri
    check_tracking(uri)
    with translate_mlflow_errors(uri):
        experiment = open_experiment(sweep, selection.name, uri)
        client = experiment.client
        runs = experiment.runs_by_trial()
        parent = runs.get("") or experiment.create_parent_run(selection.name)
        for trial in selection.trials:
            run = runs.get(trial.key) or experiment.create_trial_run(parent.info.run_id, trial)
            _publish_trial(client, run, trial, selection.metrics, finished)
            _publish_served(client, run, trial, selection)
        children = {key: run for key, run in experiment.runs_by_trial().items() if key}
        _publish_parent(client, parent, children, selection, report_paths)
        _set_parent_status(client, parent, finished)
        _describe_experiment(client, experiment.experiment_id, parent.info.run_id, selection)
        view = _save_shared_view(client, experiment.experiment_id, selection.metrics)
    runs_url = f"{ui_address(uri)}/#/experiments/{experiment.experiment_id}/runs"
    parent_url = f"{runs_url}/{parent.info.run_id}?{MODEL_TRAINING}"
    return TrackedSweep(parent.info.run_id, f"{runs_url}?{view}&{MODEL_TRAINING}", parent_url)


class SearchPublisher:
    """Publishes a sweep again and again while its search runs.

    A publication logs the trials whose files changed since the last one: its requests do not grow with the number of
    trials. The report, the description of the sweep and the tags of the chosen trials need all trials. They follow when
    the time since the last complete publication is `COMPLETE_FACTOR` times as long as that publication took.
    """

    def __init__(self, sweep: Path) -> None:
        self.sweep = sweep
        self._index = TrialIndex(sweep)
        self._versions: dict[str, Version] = {}  # of the trials, when they were published
        self._tracked: TrackedSweep | None = None
        self._next_complete = 0.0  # of the monotonic clock

    def publish(self) -> None:
        """Bring the MLflow store up to date.

        Raises:
            TrackingUnavailable: The store failed; the next publication logs what is missing.
        """
        trials = self._index.read()
        started = time.monotonic()
        if self._tracked is None or started >= self._next_complete:
            self._tracked = publish(self.sweep)
            ended = time.monotonic()
            self._next_complete = ended + COMPLETE_FACTOR * (ended - started)
        else:
            changed = [indexed.trial for key, indexed in trials.items() if self._versions.get(key) != indexed.version]
            _publish_trials(self.sweep, self._tracked.parent_run_id, changed)
        self._versions = {key: indexed.version for key, indexed in trials.items()}


def _publish_trials(sweep: Path, parent_run_id: str, trials: list[Trial]) -> None:
    """Log some trials of a running search, without what depends on the other trials."""
    record = read_sweep(sweep)
    uri = record.tracking_uri
    check_tracking(uri)
    with publish_lock(sweep), translate_mlflow_errors(uri):
        experiment = open_experiment(sweep, record.name, uri)
        for trial in trials:
            run = experiment.find_trial_run(trial.key) or experiment.create_trial_run(parent_run_id, trial)
            _publish_trial(experiment.client, run, trial, record.teacher.metric_choice, finished=False)


@contextlib.contextmanager
def publish_lock(sweep: Path) -> Iterator[None]:
    """Let only one process or thread publish a sweep at a time, since two would both create a trial's run.

    Raises:
        LockHeld: The lock was not acquired within `LOCK_TIMEOUT_S`.
        UserError: The folder holds no sweep.
    """
    read_sweep(sweep)  # the lock would create the folder of a sweep that does not exist
    with artifact.lock(sweep / PUBLISH_LOCK, LOCK_TIMEOUT_S):
        yield


def open_experiment(sweep: Path, name: str, uri: str) -> Experiment:
    """The experiment of a sweep and its name in a store; created if it does not exist."""
    client = make_client(uri)
    experiment_id = get_or_create_experiment(client, name, uri)
    return Experiment(client, experiment_id, get_or_create_tracking_id(sweep, name))


def find_run(selection: Selection, key: str, uri: str) -> Any:
    """The run of a trial; None if it was not published yet."""
    return open_experiment(selection.sweep, selection.name, uri).runs_by_trial().get(key)


def flatten_params(data: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys and text, with secrets redacted, lists as JSON, and None left out."""
    flat: dict[str, str] = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= flatten_params(value, f"{name}.")
        elif value is not None:
            flat[name] = redact(value if isinstance(value, str) else json.dumps(value))
    return flat


def _publish_trial(client: Any, run: Any, trial: Trial, metrics: MetricChoice, finished: bool) -> None:
    if run.data.tags.get("raydistill.done") == "1":
        return
    _log_params(client, run, trial)
    last_time_ms, last_step = _publish_history(client, run, trial)
    if trial.status != "running":
        trial = download_checkpoint(trial)
        _publish_result(client, run.info.run_id, trial, _final_points(trial, metrics, last_time_ms + 1, last_step))
    elif finished:  # the trial has no result although the search is over
        client.set_terminated(run.info.run_id, "KILLED")
    elif run.info.status != "RUNNING":
        client.update_run(run.info.run_id, status="RUNNING")


def _publish_history(client: Any, run: Any, trial: Trial) -> tuple[int, int]:
    """Log the validations that are not logged yet; returns the time (ms) and step of the last one."""
    start_ms, history = run.info.start_time, trial.history()
    # Timestamps depend on the record alone, so that MLflow stores a line that is logged twice only once
    times = [start_ms + round(1000 * validation.time_s) for validation in history]
    steps = [validation.step for validation in history]
    num_logged = min(int(run.data.tags.get("raydistill.lines", 0)), len(history))
    points = [
        MetricPoint(name, float(value), time_ms, step)
        for validation, time_ms, step in list(zip(history, times, steps, strict=True))[num_logged:]
        for name, value in validation.numbers.items()
        if name not in ("step", "total_steps", "time_s")
    ]
    _log_metrics(client, run.info.run_id, points)
    if len(history) > num_logged:
        client.set_tag(run.info.run_id, "raydistill.lines", str(len(history)))
    return max(times, default=start_ms), max(steps, default=0)


def _publish_result(client: Any, run_id: str, trial: Trial, final_points: list[MetricPoint]) -> None:
    """Log a finished trial's final metrics, artifacts and status."""
    _log_metrics(client, run_id, final_points)
    client.update_run(run_id, name=trial.label)
    for name in ("run.json", "result.json", "metrics.jsonl"):
        if (trial.folder / name).is_file() and not (trial.folder / name).is_symlink():
            client.log_artifact(run_id, str(trial.folder / name))
    if trial.checkpoint is not None:
        check_symlinks(trial.checkpoint)
        client.log_artifacts(run_id, str(trial.checkpoint), "checkpoint")
    for name, text in (("reason", trial.reason), ("signature", trial.signature), ("status", trial.status)):
        if text:
            client.set_tag(run_id, f"raydistill.{name}", redact(text)[:MAX_TAG_CHARS])
    client.set_terminated(run_id, "FINISHED" if trial.scored else "FAILED")
    client.set_tag(run_id, "raydistill.done", "1")  # last, so that a kill before this line repeats everything above


def _publish_served(client: Any, run: Any, trial: Trial, selection: Selection) -> None:
    """Log a finalist's metrics as CONFIGURATION/NAME, and served.json.

    Serving follows the end of the trial, and configurations may be added later. A new session changes all latencies.
    """
    path = trial.folder / SERVED_FILE
    if not path.is_file() or path.is_symlink():
        return
    session = selection.sweep / LATENCY_FILE
    chosen = _representative_student(selection, trial)
    content = path.read_bytes() + (session.read_bytes() if session.is_file() else b"")
    digest = hashlib.sha256(content + (chosen.key.encode() if chosen else b"")).hexdigest()
    if run.data.tags.get("raydistill.served") == digest:
        return
    values = {
        f"{student.serving.key}/{name}": value
        for student in selection.students
        if student.serving and student.folder == trial.folder
        for name, value in _final_metrics(student, selection.metrics).items()
        if name not in CHECKPOINT_METRICS
    }
    time_ms = int(1000 * selection.session.started_at.timestamp()) if selection.session else run.info.start_time
    _log_constants(client, run, values, time_ms)
    if chosen:
        final = _final_metrics(chosen, selection.metrics)
        names = [name for name in (selection.metric, *SERVED_METRICS) if name in final]
        # With the present time, because another choice replaces the values, and MLflow shows the latest ones
        _log_constants(client, run, {f"served_{name}": final[name] for name in names}, round(1000 * time.time()))
    client.log_artifact(run.info.run_id, str(path))
    client.set_tag(run.info.run_id, "raydistill.served", digest)  # last, so that a kill repeats the lines above


def _representative_student(selection: Selection, trial: Trial) -> Trial | None:
    """The student by which the table of runs shows a trial: a chosen one, else the one with the highest score."""
    students = [student for student in selection.students if student.serving and student.folder == trial.folder]
    metric = selection.metric
    return max(students, key=lambda s: (bool(selection.budgets_of(s.key)), s.score(metric) or 0.0), default=None)


def _publish_parent(
    client: Any, parent: Any, children: dict[str, Any], selection: Selection, report_paths: list[Path]
) -> None:
    """Log the sweep's description, the teacher's metrics and the report, and tag the chosen trials."""
    experiment_url = f"#/experiments/{parent.info.experiment_id}/runs"
    links = {key: f"{experiment_url}/{child.info.run_id}" for key, child in children.items()}
    description = _describe_sweep(selection, links)
    client.set_tag(parent.info.run_id, "mlflow.note.content", description[:MAX_DESCRIPTION_CHARS])
    _log_constants(client, parent, _teacher_metrics(selection), parent.info.start_time)
    _log_report(client, parent, selection, report_paths)
    _tag_chosen_trials(client, children, selection)


def _describe_experiment(client: Any, experiment_id: str, parent_run_id: str, selection: Selection) -> None:
    """Describe the experiment, with links to the sweep's run and to the registered model."""
    chosen = [f"{budget}: {selection.student(key).label}" for budget, key in selection.chosen_keys.items() if key]
    parts = [
        f"Students of `{public_name(selection.teacher.name)}`, distilled by raydistill.",
        f"The choices with their reasons: [the sweep's run](#/experiments/{experiment_id}/runs/{parent_run_id}"
        f"?{MODEL_TRAINING}), whose artifact `front.html` is the decision page.",
    ]
    if chosen:
        parts.append(f"Chosen for {'; '.join(chosen)}. [Registered versions](#/models/{selection.name}).")
    client.set_experiment_tag(experiment_id, "mlflow.note.content", "\n\n".join(parts)[:MAX_DESCRIPTION_CHARS])


def _describe_sweep(selection: Selection, links: dict[str, str]) -> str:
    """The description of the sweep's run in Markdown; `links` maps trial keys to the URLs of their runs."""
    parts = [f"**{selection.name}**: {format_trial_counts(selection.trials)}."]
    if selection.choices:
        header, rows = choices_table(selection, links)
        # MLflow folds a description after a few lines: the links come first, so that they are visible
        chosen = "; ".join(f"{budget}: {student}" for budget, _, student, *_ in rows)
        parts = [f"**Chosen** for {chosen}", *parts, markdown_table(header, rows)]
    parts.append(markdown_table(*method_table(selection)))
    parts.append("The artifact `front.html` of this run shows the front with details of every student.")
    return "\n\n".join(parts)


def _teacher_metrics(selection: Selection) -> dict[str, float]:
    teacher = selection.teacher
    values = {f"teacher_{name}": value for name, value in {**teacher.metrics, **teacher.costs}.items()}
    return {**values, "teacher_device_hours": teacher.passes.total_hours}


def _log_report(client: Any, parent: Any, selection: Selection, report_paths: list[Path]) -> None:
    """Log the report's files if they were written since the last publication."""
    version = str(max(path.stat().st_mtime_ns for path in report_paths))
    if parent.data.tags.get("raydistill.report") == version:
        return
    for path in [*report_paths, *(selection.sweep / name for name in ("space.yaml", SWEEP_FILE, LATENCY_FILE))]:
        if path.exists():
            client.log_artifact(parent.info.run_id, str(path))
    client.set_tag(parent.info.run_id, "raydistill.report", version)


def _tag_chosen_trials(client: Any, children: dict[str, Any], selection: Selection) -> None:
    """Tag every trial's run with the budgets that the trial was chosen for, which its name begins with.

    The name is the first column of MLflow's table, whatever the width of the window.
    """
    chosen_trials = {name: selection.trial_key(key) for name, key in selection.chosen_keys.items() if key}
    labels = {trial.key: trial.label for trial in selection.trials}
    for key, child in children.items():
        budgets = ", ".join(name for name, chosen in chosen_trials.items() if chosen == key)
        if budgets != child.data.tags.get(CHOSEN_TAG, ""):
            label = labels.get(key, key)
            client.update_run(child.info.run_id, name=f"{budgets}: {label}" if budgets else label)
            client.set_tag(child.info.run_id, CHOSEN_TAG, budgets)


def _set_parent_status(client: Any, parent: Any, finished: bool) -> None:
    if finished:
        client.set_terminated(parent.info.run_id, "FINISHED")
    elif parent.info.status != "RUNNING":
        client.update_run(parent.info.run_id, status="RUNNING")


def _save_shared_view(client: Any, experiment_id: str, metrics: MetricChoice) -> str:
    """Store a view of the finished trials, like MLflow's Share button; returns the query string that opens the view.

    By default the UI hides metrics and parameters until the user selects their columns.
    """
    metric, *reported = map(metric_key, metrics.names)
    served = (f"served_{metric}", "served_latency_ms", "served_speedup")
    columns = [f"metrics.`{name}`" for name in (*served, f"test_{metric}", metric, *reported, "params_m")]
    columns += [f"params.`{name}`" for name in ("method", "student.size")] + [f"tags.`{CHOSEN_TAG}`"]
    view = {
        "searchFilter": "tags.`raydistill.trial` != ''",
        "orderByKey": f"metrics.`{metric}`",
        "orderByAsc": False,
        "selectedColumns": columns,
    }
    client.set_experiment_tag(experiment_id, "mlflow.sharedViewState.raydistill", json.dumps(view))
    return "viewStateShareKey=raydistill"


def _final_points(trial: Trial, metrics: MetricChoice, time_ms: int, last_step: int) -> list[MetricPoint]:
    """A finished trial's final metrics, at a time after its history, so that MLflow shows them as the latest values."""
    step = max(last_step, trial.steps)
    return [MetricPoint(name, value, time_ms, step) for name, value in _final_metrics(trial, metrics).items()]


def metric_key(name: str) -> str:
    """The name of a score in MLflow, which allows no "+", ":" and "@": "chrfpp" for chrf++, "m.f" for m:f."""
    return name.replace("+", "p").replace(":", ".").replace("@", ".")


def _final_metrics(trial: Trial, metrics: MetricChoice) -> dict[str, float]:
    """Final metrics, the test split's as `test_NAME`, and the main score's interval as `NAME_low` and `NAME_high`."""
    metric = metrics.deciding
    values = {name: trial.metrics[name] for name in (*metrics.names, *COSTS) if name in trial.metrics}
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

    params = flatten_params(trial.run_config().model_dump(mode="json"))
    if trial.size:
        params["size"] = trial.size
    params |= {f"copied.{side}": json.dumps(layers) for side, layers in trial.copied_layers.items()}
    # MLflow parameters are immutable, and a running trial has fewer of them
    new = [Param(name, value[:MAX_PARAM_CHARS]) for name, value in params.items() if name not in run.data.params]
    for i in range(0, len(new), BATCH_LIMITS["params"]):
        client.log_batch(run.info.run_id, params=new[i : i + BATCH_LIMITS["params"]])


def _log_constants(client: Any, run: Any, values: dict[str, float], time_ms: int) -> None:
    """Log metrics with a given time and step 0, so that logging them again adds nothing."""
    points = [MetricPoint(name, value, time_ms, 0) for name, value in values.items()]
    _log_metrics(client, run.info.run_id, points)


def _rounded(value: float) -> float:
    """A value with four significant digits, since MLflow shows all digits; the exact values are in the folders."""
    return float(f"{value:.4g}")


def _log_metrics(client: Any, run_id: str, points: list[MetricPoint]) -> None:
    from mlflow.entities import Metric

    metrics = [Metric(metric_key(point.name), _rounded(point.value), point.time_ms, point.step) for point in points]
    for i in range(0, len(metrics), BATCH_LIMITS["metrics"]):
        client.log_batch(run_id, metrics=metrics[i : i + BATCH_LIMITS["metrics"]])


def get_or_create_tracking_id(sweep: Path, name: str) -> str:
    """The sweep's id in a store, kept in its folder, so that sweeps of one name on a shared server stay separate."""
    path = sweep / "tracking_id"
    if not path.exists():
        write_atomic(path, f"{name}-{uuid.uuid4().hex[:12]}\n".encode())
    return path.read_text(encoding="utf-8").strip()


def _create_run(client: Any, experiment_id: str, name: str, tags: dict[str, str]) -> Any:
    return client.create_run(experiment_id, tags={**tags, "mlflow.source.name": "raydistill"}, run_name=name)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
