"""The MLflow tracking store: its location, a quick check, the client, and error messages."""

import contextlib
import logging
import math
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from raydistill.core import artifact
from raydistill.core.console import print_progress
from raydistill.core.errors import UserError
from raydistill.core.files import atomic_path
from raydistill.core.paths import raydistill_home
from raydistill.core.secrets import CREDENTIALS_HINT, has_credentials, redact

HTTP_ERROR_HINTS = {
    401: f"authentication is required. {CREDENTIALS_HINT}",
    403: "the server refuses this host (see its --allowed-hosts)",
}


class TrackingUnavailable(UserError):
    """The tracking store cannot be used now; the sweep can continue and be published later."""


def default_tracking_uri() -> str:
    """The local store: SQLite in the folder of `raydistill_home`."""
    return f"sqlite:///{raydistill_home() / 'mlflow.db'}"


def ui_command(uri: str | None = None) -> str:
    """The command that shows a store in a browser; for a server, the URL to open."""
    uri = uri or default_tracking_uri()
    if uri.startswith(("http://", "https://")):
        return f"open {uri}"
    return f"mlflow ui --backend-store-uri {uri} --host 127.0.0.1 --port 5000"


def ui_address(uri: str) -> str:
    """The address of the store's UI: of the server, or where `ui_command` opens the UI of a local store."""
    return uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"


def check_tracking(uri: str | None) -> None:
    """Check within two seconds that a store can be used, without importing MLflow.

    Raises:
        UserError: The URI can never work (MLflow no longer supports plain files) or contains credentials.
        TrackingUnavailable: The server does not answer, or the local store cannot be written.
    """
    uri = uri or default_tracking_uri()
    if has_credentials(uri):
        raise UserError(f"tracking_uri {redact(uri)}: contains a password or token; remove it. {CREDENTIALS_HINT}")
    scheme = urlsplit(uri).scheme if "://" in uri else ""
    if scheme in ("", "file"):
        raise UserError(
            f"tracking_uri {uri!r}: MLflow no longer keeps runs in plain files; "
            "use sqlite:////absolute/path/mlflow.db, or http://HOST:PORT of a server"
        )
    if scheme == "sqlite":
        _check_writable(_sqlite_path(uri), uri)
    elif scheme in ("http", "https"):
        _check_server(uri)


def configure_mlflow() -> None:
    """Set MLflow's environment variables before its first import: no telemetry, few retries, no output on stdout.

    Variables that the user has set are kept.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is reserved for --json
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)


def make_client(uri: str) -> Any:
    """An `MlflowClient` for a store; a local store is created if it does not exist.

    Raises:
        TrackingUnavailable: The local store cannot be created.
    """
    configure_mlflow()
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.ERROR)  # the import resets the level
    if uri.startswith("sqlite:"):
        try:
            _create_sqlite_store(_sqlite_path(uri))
        except OSError as error:
            raise TrackingUnavailable(f"tracking_uri {uri}: the store cannot be created ({error.strerror})") from None
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def get_or_create_experiment(client: Any, name: str, uri: str) -> str:
    """The id of the experiment with this name; a deleted experiment is restored.

    A local store keeps artifacts in the folder `mlartifacts` next to its database; a server uses its own default.
    """
    existing = client.get_experiment_by_name(name)
    if existing is None:
        location = None
        if uri.startswith("sqlite:"):
            location = (_sqlite_path(uri).absolute().parent / "mlartifacts" / name).as_uri()
        # The UI shows training runs with their metrics only for experiments of this kind
        kind = {"mlflow.experimentKind": "custom_model_development"}
        return str(client.create_experiment(name, artifact_location=location, tags=kind))
    if existing.lifecycle_stage == "deleted":
        client.restore_experiment(existing.experiment_id)
    return str(existing.experiment_id)


@contextlib.contextmanager
def translate_mlflow_errors(uri: str) -> Iterator[None]:
    """Raise errors of MLflow and of the connection as `TrackingUnavailable`, with a message of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Importing these packages only to name their exceptions would be slow
        if type(error).__module__.split(".")[0] not in ("mlflow", "requests", "urllib3", "sqlalchemy"):
            raise
        text = redact(" ".join(str(error).split()))[:300]
        raise TrackingUnavailable(f"MLflow at {uri} failed: {text}. Run the command again to publish") from error


def _create_sqlite_store(path: Path) -> None:
    """Create a local store under a temporary name and rename the complete store.

    MLflow creates its tables one by one, and cannot open a store with only some of them.
    """
    if path.is_file() and path.stat().st_size:
        return
    with artifact.lock(path, math.inf, print_progress):
        if path.is_file() and path.stat().st_size:
            return
        for leftover in path.parent.glob(f".{path.name}.*.tmp*"):  # from a killed process; includes SQLite's journal
            leftover.unlink()
        with atomic_path(path) as temporary:
            write_empty_store(temporary)


def write_empty_store(path: Path) -> None:
    """Write a SQLite store without experiments; MLflow runs all its migrations, which takes seconds."""
    from mlflow import MlflowClient

    MlflowClient(f"sqlite:///{path}").search_experiments(max_results=1)


def _sqlite_path(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///").split("?")[0])


def _check_writable(path: Path, uri: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            return
    except OSError as error:
        raise TrackingUnavailable(f"tracking_uri {uri}: {path.parent} cannot be written ({error.strerror})") from None


def _check_server(uri: str) -> None:
    try:
        with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=1.5):
            return
    except urllib.error.HTTPError as error:
        if error.code != 404:  # behind a proxy, /health may not exist
            reason = HTTP_ERROR_HINTS.get(error.code, error.reason)
            raise TrackingUnavailable(f"the tracking server {uri} answers {error.code}: {reason}") from None
    except (OSError, ValueError) as error:
        detail = getattr(error, "reason", error)
        raise TrackingUnavailable(f"the tracking server {uri} does not answer ({detail}); is it running?") from None
