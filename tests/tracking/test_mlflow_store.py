"""The tracking store: creation of a local store, checks of URIs, and servers that do not answer."""

import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from raydistill.core import artifact
from raydistill.core.errors import UserError
from raydistill.tracking import mlflow_runs, mlflow_store
from tests.factories.sweeps import change_sweep, make_trial

CREATE_UNTIL_THE_THIRD_TABLE = """
import os, signal, sys
from sqlalchemy import event
from sqlalchemy.engine import Engine
from raydistill.tracking.mlflow_store import make_client

tables = []

@event.listens_for(Engine, "after_cursor_execute")
def kill_this_process(connection, cursor, statement, *arguments):
    if "CREATE TABLE" in statement:
        tables.append(statement)
        if len(tables) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

make_client(f"sqlite:///{sys.argv[1]}")
"""


def test_local_store_can_be_created_after_a_kill_during_creation(tmp_path):
    """MLflow creates its tables one by one and cannot open a store with only some of them."""
    file = tmp_path / "mlflow.db"
    killed = subprocess.run([sys.executable, "-c", CREATE_UNTIL_THE_THIRD_TABLE, str(file)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.glob(".mlflow.db.*.tmp"))
    assert not file.exists()
    client = mlflow_store.make_client(f"sqlite:///{file}")
    experiment_id = mlflow_store.get_or_create_experiment(client, "mine", f"sqlite:///{file}")
    assert client.get_experiment(experiment_id).name == "mine"
    assert not list(tmp_path.glob(".*.tmp*"))


def test_a_process_that_waits_for_the_creation_of_a_local_store_says_so(tmp_path, capsys):
    file = tmp_path / "mlflow.db"
    with ThreadPoolExecutor(1) as pool:
        with artifact.lock(file):
            waiting = pool.submit(mlflow_store._create_sqlite_store, file)
            message = ""
            while "in use by process" not in message:
                assert not waiting.done()
                message += capsys.readouterr().err
                time.sleep(0.01)
            file.write_text("created by the owner of the lock")
        waiting.result()
    assert "; waiting" in message
    assert file.read_text() == "created by the owner of the lock"


def test_local_store_that_cannot_be_created_is_reported(tmp_path):
    (tmp_path / ".mlflow.db.lock").mkdir()
    with pytest.raises(mlflow_store.TrackingUnavailable, match="the store cannot be created"):
        mlflow_store.make_client(f"sqlite:///{tmp_path}/mlflow.db")


def test_plain_file_stores_are_rejected():
    for uri in ("file:///tmp/mlruns", "mlruns", "localhost:5000"):
        with pytest.raises(UserError, match="plain files"):
            mlflow_store.check_tracking(uri)


def test_a_server_that_does_not_answer_is_reported_after_a_short_timeout(sweep, monkeypatch):
    make_trial(sweep, "a", 0, 10.0)
    timeouts = []
    urlopen = urllib.request.urlopen

    def record_timeout(url, timeout):
        timeouts.append(timeout)
        return urlopen(url, timeout=timeout)

    monkeypatch.setattr(urllib.request, "urlopen", record_timeout)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        change_sweep(sweep, tracking_uri=uri)
        with pytest.raises(mlflow_store.TrackingUnavailable, match="does not answer"):
            mlflow_runs.publish(sweep)
        assert (sweep / "front.png").exists()
        server.listen()  # accepts connections and never answers
        with pytest.raises(mlflow_store.TrackingUnavailable, match="does not answer"):
            mlflow_store.check_tracking(uri)
    assert timeouts == [1.5, 1.5]
