"""The only file that knows MLflow: everything is derived from a sweep's folder, so it can be repeated at will.

Tags make it idempotent: `raydistill.sweep` finds the parent run, `raydistill.trial` a child, `raydistill.lines` says
how much of a history is logged, and `raydistill.done` that a finished trial's artifacts are all there.
"""

import contextlib
import json
import logging
import os
import re
import tempfile
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from raydistill.config.console import home
from raydistill.config.errors import UserError
from raydistill.config.files import check_links, write_atomic
from raydistill.config.load import ELSEWHERE
from raydistill.config.secrets import hidden, places_of_credentials
from raydistill.results.costs import method_table
from raydistill.results.figures import choices_table, count_trials, markdown_table
from raydistill.results.page import write_report
from raydistill.results.records import Outcome, Trial, decoding_label, outcome, read_sweep

FINAL = (
    *("rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "val_loss", "latency_ms", "latency_ms_b1"),
    *("speedup", "params_m", "memory_mb", "peak_mb", "gpu_hours", "teacher_gpu_hours"),
)
CHOSEN = "raydistill.chosen_for"
COLUMNS = ("latency_ms", "speedup", "params_m", "gpu_hours")
LOCK_WAIT_S = 120.0  # a first publishing copies every checkpoint
CHUNK = {"metrics": 900, "params": 90}  # MLflow takes 1000 metrics and 100 parameters at once


class TrackingDown(UserError):
    """The tracking store does not answer. The sweep can go on: publishing later makes up for all of it."""


@dataclass(frozen=True)
class Tracked:
    """Where a sweep is to be seen: the parent run, its page, and the command that shows a local store."""

    parent_run_id: str
    url: str
    command: str


@dataclass(frozen=True)
class Registered:
    """A version of a registered model; `uri` is what MLflow loads or downloads it by."""

    name: str
    version: str
    alias: str
    uri: str


def default_uri() -> str:
    """The local store: SQLite under `home()`."""
    return f"sqlite:///{home() / 'mlflow.db'}"


def ui_command(uri: str | None = None) -> str:
    """The one command that shows a store in a browser; for a server, where to look."""
    uri = uri or default_uri()
    if uri.startswith(("http://", "https://")):
        return f"open {uri}"
    return f"mlflow ui --backend-store-uri {uri} --host 127.0.0.1 --port 5000"


def check_tracking(uri: str | None) -> None:
    """Say within two seconds whether a store can be used, without importing MLflow.

    UserError for a URI that cannot work (plain file stores: MLflow gave them up) or holds a password, TrackingDown
    where a server does not answer.
    """
    uri = uri or default_uri()
    if list(places_of_credentials(uri)):
        raise UserError(f"tracking_uri {hidden(uri)}: holds a password or token; leave it out. {ELSEWHERE}")
    scheme = urlsplit(uri).scheme if "://" in uri else ""
    if scheme in ("", "file"):
        raise UserError(
            f"tracking_uri {uri!r}: MLflow no longer keeps runs in plain files; "
            "use sqlite:////absolute/path/mlflow.db, or http://HOST:PORT of a server"
        )
    if scheme == "sqlite":
        _check_writable(_sqlite_file(uri), uri)
    if scheme not in ("http", "https"):
        return
    try:
        with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=1.5):
            return
    except urllib.error.HTTPError as error:
        why = {401: f"it wants credentials. {ELSEWHERE}", 403: "it refuses this host (see its --allowed-hosts)"}
        if error.code != 404:  # behind a proxy there may be no /health
            raise TrackingDown(
                f"the tracking server {uri} answers {error.code}: {why.get(error.code, error.reason)}"
            ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise TrackingDown(f"the tracking server {uri} does not answer ({reason}); is it running?") from None


def publish(sweep: Path, tracking_uri: str | None = None, finished: bool = False) -> Tracked:
    """Bring MLflow up to date with a sweep's folder; safe to repeat, and to kill at any point.

    Also writes SWEEP/table.md and SWEEP/front.png. Without a `tracking_uri` the sweep's own is used, else the
    local store. TrackingDown where the store fails: nothing is lost, publish again later.
    """
    with _alone(sweep):
        return _publish(sweep, tracking_uri, finished)


def _publish(sweep: Path, tracking_uri: str | None, finished: bool) -> Tracked:
    found = outcome(sweep)
    report = write_report(found)
    uri = _uri(found, tracking_uri)
    check_tracking(uri)
    with _plain_errors(uri):
        client = _client(uri)
        experiment = _experiment(client, found.name, uri)
        identity = _identity(sweep, found.name)
        runs = _runs(client, experiment, identity)
        parent = runs.get("") or _create(client, experiment, found.name, {"raydistill.sweep": identity})
        for trial in found.trials:
            run = runs.get(trial.key)
            if run is None:
                run = _create_child(client, experiment, parent.info.run_id, identity, trial)
            _publish_trial(client, run, trial, found.metric, finished)
        children = {key: run for key, run in _runs(client, experiment, identity).items() if key}
        _publish_parent(client, parent, children, found, report, finished)
        view = _share_view(client, experiment, found.metric)
    base = uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
    run_id = parent.info.run_id
    return Tracked(run_id, f"{base}/#/experiments/{experiment}/runs?{view}", ui_command(uri))


def register_choice(
    sweep: Path, key: str, budget_name: str, export: Path, tracking_uri: str | None = None
) -> Registered:
    """Register a student as a version of the model named like the sweep, with an alias for the budget.

    `export` is the folder to hand over; it becomes the version's source, in a form that MLflow loads and serves too.
    Repeating it makes no new version; choosing another student moves the alias. Publishes the sweep first if its
    trial is not yet in MLflow. UserError for a student that has no checkpoint.
    """
    with _alone(sweep):
        return _register(sweep, key, budget_name, export, tracking_uri)


def _register(sweep: Path, student: str, budget_name: str, export: Path, tracking_uri: str | None) -> Registered:
    found = outcome(sweep)
    trial = next((t for t in found.students if t.key == student), None)
    if trial is None or trial.checkpoint is None:
        raise UserError(f"{sweep}: {student} has no finished checkpoint to register")
    key = trial.folder.name
    uri = _uri(found, tracking_uri)
    check_tracking(uri)
    with _plain_errors(uri):
        client = _client(uri)
        experiment = _experiment(client, found.name, uri)
        run = _runs(client, experiment, _identity(sweep, found.name)).get(key)
    if run is None or run.data.tags.get("raydistill.done") != "1":
        _publish(sweep, uri, finished=found.info.get("status") not in (None, "running"))
    with _plain_errors(uri):
        run = _runs(client, experiment, _identity(sweep, found.name))[key]
        version = _version(client, found.name, run, export)
        tags = {"size": trial.size, "method": trial.method, "score": trial.score(found.metric)}
        tags |= {"metric": found.metric, "latency_ms": trial.metrics.get("latency_ms"), "trial": key}
        tags |= {"params_m": trial.metrics.get("params_m")}
        tags |= {"decoding": decoding_label(trial.decoding) if trial.decoding else None}
        for name, value in tags.items():
            if value is not None:
                client.set_model_version_tag(found.name, version, name, str(value))
        alias = alias_of(budget_name)
        client.set_registered_model_alias(found.name, alias, version)
    return Registered(found.name, version, alias, f"models:/{found.name}@{alias}")


@contextlib.contextmanager
def _alone(sweep: Path) -> Iterator[None]:
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


def alias_of(budget_name: str) -> str:
    """A budget's name as an alias: letters, digits, - and _; "v3" and "latest" are MLflow's own."""
    alias = re.sub(r"[^A-Za-z0-9_-]+", "-", budget_name).strip("-") or "chosen"
    return f"budget-{alias}" if re.fullmatch(r"[vV]\d+|latest|\d+", alias) else alias


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


def _publish_trial(client: Any, run: Any, trial: Trial, metric: str, finished: bool) -> None:
    if run.data.tags.get("raydistill.done") == "1":
        return
    _log_params(client, run, trial)
    last = _publish_history(client, run, trial)
    if trial.status != "running":
        _publish_end(client, run.info.run_id, trial, metric, *last)
    elif finished:  # begun and never ended: the sweep is over without it
        client.set_terminated(run.info.run_id, "KILLED")
    elif run.info.status != "RUNNING":
        client.update_run(run.info.run_id, status="RUNNING")


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
        note += f"\n\n{markdown_table(*choices_table(found, links))}"
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
    for path in [*report, found.sweep / "space.yaml", found.sweep / "sweep.json"]:
        if path.exists():
            client.log_artifact(run_id, str(path))
    for key, child in children.items():
        budgets = ", ".join(name for name, chosen in found.chosen.items() if chosen and found.trial_of(chosen) == key)
        if budgets != child.data.tags.get(CHOSEN, ""):
            client.set_tag(child.info.run_id, CHOSEN, budgets)
    if finished:
        client.set_terminated(run_id, "FINISHED")
    elif parent.info.status != "RUNNING":
        client.update_run(run_id, status="RUNNING")


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


def _client(uri: str) -> Any:
    # read when mlflow is imported; a user's own settings stand
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is the result's
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.ERROR)  # the import sets its own
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _uri(found: Outcome, tracking_uri: str | None) -> str:
    return tracking_uri or found.info.get("tracking_uri") or default_uri()


def _experiment(client: Any, name: str, uri: str) -> str:
    """The experiment's id. A local store keeps artifacts beside itself, a server where it says."""
    existing = client.get_experiment_by_name(name)
    if existing is None:
        location = None
        if uri.startswith("sqlite:"):
            location = (_sqlite_file(uri).absolute().parent / "mlartifacts" / name).as_uri()
        # The UI shows training runs with their metrics only where an experiment says that it is of this kind.
        kind = {"mlflow.experimentKind": "custom_model_development"}
        return str(client.create_experiment(name, artifact_location=location, tags=kind))
    if existing.lifecycle_stage == "deleted":
        client.restore_experiment(existing.experiment_id)
    return str(existing.experiment_id)


def _identity(sweep: Path, name: str) -> str:
    """The sweep's own mark, kept in its folder: two sweeps of one name on a shared server stay apart."""
    path = sweep / "tracking_id"
    if not path.exists():
        write_atomic(path, f"{name}-{uuid.uuid4().hex[:12]}\n".encode())
    return path.read_text(encoding="utf-8").strip()


def _runs(client: Any, experiment: str, identity: str) -> dict[str, Any]:
    """This sweep's runs by trial key; the parent under ""."""
    found: dict[str, Any] = {}
    token = None
    while True:
        text = f"tags.`raydistill.sweep` = '{identity}'"
        page = client.search_runs([experiment], text, max_results=500, page_token=token)
        for run in page:
            found.setdefault(run.data.tags.get("raydistill.trial", ""), run)
        token = page.token
        if not token:
            return found


def _create(client: Any, experiment: str, name: str, tags: dict[str, str]) -> Any:
    return client.create_run(experiment, tags={**tags, "mlflow.source.name": "raydistill"}, run_name=name)


def _version(client: Any, name: str, run: Any, export: Path) -> str:
    """The model version made from this export of this run, which is made if there is none."""
    from mlflow import pyfunc
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(name, description="Students chosen by raydistill, an alias per budget")
    run_id, source = run.info.run_id, f"{run.info.artifact_uri}/{export.name}"
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.source == source:
            return str(version.version)
    model = Model(artifact_path=export.name, run_id=run_id)
    pyfunc.add_to_model(model, loader_module="raydistill.model.served")
    model.save(str(export / "MLmodel"))
    client.log_artifacts(run_id, str(export), export.name)
    return str(client.create_model_version(name, source, run_id=run_id, await_creation_for=0).version)


def _sqlite_file(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///").split("?")[0])


def _check_writable(path: Path, uri: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            return
    except OSError as error:
        raise TrackingDown(f"tracking_uri {uri}: {path.parent} cannot be written ({error.strerror})") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@contextlib.contextmanager
def _plain_errors(uri: str) -> Iterator[None]:
    """MLflow's and the connection's errors as TrackingDown, in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # mlflow, requests and sqlalchemy are not imported only to name their errors here
        if type(error).__module__.split(".")[0] not in ("mlflow", "requests", "urllib3", "sqlalchemy"):
            raise
        text = hidden(" ".join(str(error).split()))[:300]
        raise TrackingDown(f"MLflow at {uri} failed: {text}. Publishing again later makes up for it") from error
