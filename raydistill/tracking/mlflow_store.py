"""The store that MLflow keeps its runs in: which, whether it can be used, the client, its errors in plain words."""

import contextlib
import logging
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock

from raydistill.core.errors import UserError
from raydistill.core.files import atomic_path
from raydistill.core.paths import raydistill_home
from raydistill.core.secrets import CREDENTIALS_HINT, has_credentials, redact


class TrackingUnavailable(UserError):
    """The tracking store does not answer. The sweep can go on: publishing later makes up for all of it."""


def default_tracking_uri() -> str:
    """The local store: SQLite under `home()`."""
    return f"sqlite:///{raydistill_home() / 'mlflow.db'}"


def ui_command(uri: str | None = None) -> str:
    """The one command that shows a store in a browser; for a server, where to look."""
    uri = uri or default_tracking_uri()
    if uri.startswith(("http://", "https://")):
        return f"open {uri}"
    return f"mlflow ui --backend-store-uri {uri} --host 127.0.0.1 --port 5000"


def check_tracking(uri: str | None) -> None:
    """Say within two seconds whether a store can be used, without importing MLflow.

    UserError for a URI that cannot work (plain file stores: MLflow gave them up) or holds a password, TrackingDown
    where a server does not answer.
    """
    uri = uri or default_tracking_uri()
    if has_credentials(uri):
        raise UserError(f"tracking_uri {redact(uri)}: holds a password or token; leave it out. {CREDENTIALS_HINT}")
    scheme = urlsplit(uri).scheme if "://" in uri else ""
    if scheme in ("", "file"):
        raise UserError(
            f"tracking_uri {uri!r}: MLflow no longer keeps runs in plain files; "
            "use sqlite:////absolute/path/mlflow.db, or http://HOST:PORT of a server"
        )
    if scheme == "sqlite":
        _check_writable(_sqlite_path(uri), uri)
    if scheme not in ("http", "https"):
        return
    try:
        with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=1.5):
            return
    except urllib.error.HTTPError as error:
        why = {401: f"it wants credentials. {CREDENTIALS_HINT}", 403: "it refuses this host (see its --allowed-hosts)"}
        if error.code != 404:  # behind a proxy there may be no /health
            raise TrackingUnavailable(
                f"the tracking server {uri} answers {error.code}: {why.get(error.code, error.reason)}"
            ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise TrackingUnavailable(f"the tracking server {uri} does not answer ({reason}); is it running?") from None


def configure_mlflow() -> None:
    """Before mlflow is first imported, since it reads this then: no telemetry, few retries, nothing on stdout.

    A user's own settings stand.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is the result's
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)


def make_client(uri: str) -> Any:
    """An MlflowClient that gives up soon, and says nothing on stdout."""
    configure_mlflow()
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.ERROR)  # the import sets its own
    if uri.startswith("sqlite:"):
        try:
            _create_sqlite_store(_sqlite_path(uri))
        except OSError as error:
            raise TrackingUnavailable(f"tracking_uri {uri}: the store cannot be made ({error.strerror})") from None
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _create_sqlite_store(path: Path) -> None:
    """A local store that is not there yet is made under another name and then takes its own.

    MLflow makes its tables one by one, and a store whose making was killed could never be opened again.
    """
    from mlflow import MlflowClient

    if path.is_file() and path.stat().st_size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)  # for the lock
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.is_file() and path.stat().st_size:
            return
        for left in path.parent.glob(f".{path.name}.*.making*"):  # of one that was killed, SQLite's journal too
            left.unlink()
        with atomic_path(path) as place:
            MlflowClient(f"sqlite:///{place}").search_experiments(max_results=1)


def get_or_create_experiment(client: Any, name: str, uri: str) -> str:
    """The experiment's id. A local store keeps artifacts beside itself, a server where it says."""
    existing = client.get_experiment_by_name(name)
    if existing is None:
        location = None
        if uri.startswith("sqlite:"):
            location = (_sqlite_path(uri).absolute().parent / "mlartifacts" / name).as_uri()
        # The UI shows training runs with their metrics only where an experiment says that it is of this kind.
        kind = {"mlflow.experimentKind": "custom_model_development"}
        return str(client.create_experiment(name, artifact_location=location, tags=kind))
    if existing.lifecycle_stage == "deleted":
        client.restore_experiment(existing.experiment_id)
    return str(existing.experiment_id)


@contextlib.contextmanager
def translate_mlflow_errors(uri: str) -> Iterator[None]:
    """MLflow's and the connection's errors as TrackingDown, in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # mlflow, requests and sqlalchemy are not imported only to name their errors here
        if type(error).__module__.split(".")[0] not in ("mlflow", "requests", "urllib3", "sqlalchemy"):
            raise
        text = redact(" ".join(str(error).split()))[:300]
        raise TrackingUnavailable(f"MLflow at {uri} failed: {text}. Publishing again later makes up for it") from error


def _sqlite_path(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///").split("?")[0])


def _check_writable(path: Path, uri: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            return
    except OSError as error:
        raise TrackingUnavailable(f"tracking_uri {uri}: {path.parent} cannot be written ({error.strerror})") from None
