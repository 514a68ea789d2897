"""The end of a sweep: students and the table come first, so that no full disk or tracking server costs them."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from raydistill.results.selection import load_selection
from raydistill.search.sweep import export_and_publish
from raydistill.tracking.mlflow_store import make_client
from tests.factories.sweeps import (
    change_sweep,
    make_student,
    make_trial,
    shape_table,
    sweep_teacher,
    write_kill_space,
)
from tests.factories.workspace import command, environment, last_json


@pytest.fixture
def offline_sweep(sweep: Path) -> Path:
    """The sweep with a tracking server that is down."""
    teacher = sweep_teacher(costs={"latency_ms": 300.0, "params_m": 9.0})
    change_sweep(sweep, teacher=teacher, tracking_uri="http://127.0.0.1:9")
    return sweep


def test_without_a_server_students_are_exported_and_the_table_is_printed_first(offline_sweep: Path) -> None:
    sweep = offline_sweep
    make_student(sweep, "a", 0, 10.0)
    printed: list[str] = []
    result = export_and_publish(load_selection(sweep), printed.append)
    assert result["exports"] == {"fast": str(sweep / "exports" / "a-b1")}
    assert (sweep / "exports" / "a-b1" / "model.safetensors").is_file()
    assert "sweep mini: 1 trial: 1 done" in printed[0]
    assert f"chosen students: {sweep / 'exports'}" in printed[0]
    assert "MLflow: the tracking server http://127.0.0.1:9 does not answer" in printed[1]
    assert result["complete"]


def test_a_trial_whose_size_lost_its_budget_is_abandoned_and_not_counted_as_failed(offline_sweep: Path) -> None:
    """Otherwise the command would end with status 1 and ask to be rerun without end."""
    sweep = offline_sweep
    make_student(sweep, "a", 0, 10.0)
    make_trial(sweep, "b", 1, 9.0, status=None)
    change_sweep(sweep, shapes=shape_table({"4-4": {"params_m": 9.0}, "4-1": {"params_m": 3.0}}))
    printed: list[str] = []
    for bound, failed in ((1.0, []), (9.0, ["b"])):
        change_sweep(sweep, budgets={"small": {"params_m": bound}})
        result = export_and_publish(load_selection(sweep), printed.append)
        assert (result["failed"], result["complete"]) == (failed, not failed)
    assert "1 trial abandoned, since no budget admits the size any more: b" in printed[0]
    assert "1 trial failed; rerun the command to retry: b" in printed[2]


def test_a_full_disk_or_a_lost_checkpoint_does_not_suppress_the_table(offline_sweep: Path) -> None:
    sweep = offline_sweep
    folder = make_student(sweep, "a", 0, 10.0)
    for file in (folder / "best").iterdir():
        file.unlink()
    (folder / "best").rmdir()
    printed: list[str] = []
    result = export_and_publish(load_selection(sweep), printed.append)
    assert "fast: a b1 is not exported" in printed[0]
    assert f"the checkpoint was deleted, so that the student cannot be exported. Delete {folder} and" in printed[0]
    assert (result["exports"], result["complete"]) == ({}, False)
    (sweep / "front.html").unlink()
    (sweep / "front.html").mkdir()  # cannot be written
    with pytest.raises(IsADirectoryError):
        export_and_publish(load_selection(sweep), printed.append)
    assert "sweep mini: 1 trial: 1 done" in printed[2]


def serve(port: int, folder: Path) -> subprocess.Popen[bytes]:
    """Start an MLflow server on loopback with its store in `folder`, and wait until it answers."""
    arguments = ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}", "--port", str(port), "--workers", "1"]
    arguments += ["--artifacts-destination", str(folder / "artifacts"), "--host", "127.0.0.1"]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *arguments],
        env=environment(MLFLOW_DISABLE_TELEMETRY="true"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    for _ in range(240):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            return server
        except OSError:
            assert server.poll() is None, "the server ended"
            time.sleep(0.5)
    raise AssertionError("the server does not answer")


def stop(server: subprocess.Popen[bytes]) -> None:
    """Kill the server with its workers, as the loss of its machine does."""
    os.killpg(server.pid, signal.SIGKILL)
    server.wait(30)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_is_lost_while_the_tracking_server_is_down(tmp_path: Path) -> None:
    """The server stops after the first trial, is down during a second command, and is back for a third."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = write_kill_space(tmp_path, tracking_uri=f"http://127.0.0.1:{port}")
    home = tmp_path / "outputs"
    refused = command(home, "sweep", path)
    assert refused.returncode == 2, "a first start without its server"
    assert not (home / "sweeps").exists()

    server = serve(port, tmp_path)
    try:
        started = subprocess.Popen(
            [sys.executable, "-m", "raydistill.sweep", str(path), "--json"],
            env=environment(),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while not list(home.glob("sweeps/killed/trials/*/result.json")):
            assert started.poll() is None
            time.sleep(0.1)
    finally:
        stop(server)
    _, errors = started.communicate(timeout=280)
    assert started.returncode == 0, errors[-3000:]
    assert "run the same command again to publish" in errors
    exports = list((home / "sweeps/killed/exports").glob("[!.]*"))  # without the hidden lock files
    assert len(exports) == 1
    assert (exports[0] / "README.md").is_file()

    again = command(home, "sweep", path, "--json")
    assert again.returncode == 0, again.stderr[-3000:]
    assert "The sweep continues" in again.stderr

    server = serve(port, tmp_path)
    try:
        summary = last_json(command(home, "sweep", path, "--json"))
        client = make_client(f"http://127.0.0.1:{port}")
        experiment = client.get_experiment_by_name("killed").experiment_id
        runs = client.search_runs([experiment], "tags.`raydistill.trial` != ''")
        assert sorted(r.data.tags["raydistill.trial"] for r in runs) == sorted(t["key"] for t in summary["trials"])
        assert {r.info.status for r in runs} == {"FINISHED"}
        for run in runs:
            assert len(client.get_metric_history(run.info.run_id, "val_loss")) >= 12  # every validation, and the end
        assert client.get_model_version_by_alias("killed", "any").source
    finally:
        stop(server)
