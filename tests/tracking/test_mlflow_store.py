"""The tracking store: creation of a local store, checks of URIs, and servers that do not answer."""

import socket
import subprocess
import sys
import time

import pytest

from raydistill.core.errors import UserError
from raydistill.tracking import mlflow_runs, mlflow_store
from tests.factories.sweeps import make_trial


def test_local_store_can_be_created_after_a_kill_during_creation(tmp_path):
    """MLflow creates its tables one by one and cannot open a store with only some of them."""
    file = tmp_path / "mlflow.db"
    code = f"from raydistill.tracking.mlflow_store import make_client; make_client('sqlite:///{file}')"
    worker = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not any(temporary.stat().st_size for temporary in tmp_path.glob(".mlflow.db.*.tmp")):
        assert time.monotonic() < deadline
        assert worker.poll() is None, "the process finished before it could be killed"
        time.sleep(0.01)
    worker.kill()
    worker.wait()
    assert not file.exists()
    client = mlflow_store.make_client(f"sqlite:///{file}")
    experiment_id = mlflow_store.get_or_create_experiment(client, "mine", f"sqlite:///{file}")
    assert client.get_experiment(experiment_id).name == "mine"
    assert not list(tmp_path.glob(".*.tmp*"))


def test_local_store_that_cannot_be_created_is_reported(tmp_path):
    (tmp_path / ".mlflow.db.lock").mkdir()
    with pytest.raises(mlflow_store.TrackingUnavailable, match="the store cannot be created"):
        mlflow_store.make_client(f"sqlite:///{tmp_path}/mlflow.db")


def test_plain_file_stores_are_rejected():
    for uri in ("file:///tmp/mlruns", "mlruns", "localhost:5000"):
        with pytest.raises(UserError, match="plain files"):
            mlflow_store.check_tracking(uri)


def test_unreachable_server_fails_within_two_seconds(sweep):
    make_trial(sweep, "a", 0, 10.0)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(mlflow_store.TrackingUnavailable, match="does not answer"):
            mlflow_runs.publish(sweep, uri)
        assert time.monotonic() - start < 5  # the plots are drawn first
        assert (sweep / "front.png").exists()
        server.listen()  # accepts connections and never answers
        start = time.monotonic()
        with pytest.raises(mlflow_store.TrackingUnavailable, match="does not answer"):
            mlflow_store.check_tracking(uri)
        assert time.monotonic() - start < 2
