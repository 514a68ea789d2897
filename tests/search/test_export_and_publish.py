"""The end of a sweep: students and the table first, whatever the disk or the tracking server do then."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from raydistill.core.files import read_json, write_json_atomic
from raydistill.results.selection import load_selection
from raydistill.search.prepare import PreparedSweep
from raydistill.search.sweep import export_and_publish
from raydistill.tracking.mlflow_store import make_client
from tests.factories.sweeps import KILL_SPACE, make_student, make_trial
from tests.factories.workspace import command, environment, last_json, make_world

TEACHER: dict[str, Any] = {"name": "big", "size": "4-4", "test": None, "baseline": None}


@pytest.fixture
def prepared(sweep: Path) -> PreparedSweep:
    """What the sweep was prepared with; its tracking server is not there."""
    info = read_json(sweep / "sweep.json")
    costs = {**info["teacher"]["costs"], "params_m": 9.0}
    teacher = {**TEACHER, **info["teacher"], "costs": costs}
    write_json_atomic(
        sweep / "sweep.json", {**info, "teacher": teacher, "tracking_uri": "http://127.0.0.1:9", "ended": {"why": ""}}
    )
    return PreparedSweep(teacher, {}, {})


def test_without_a_server_the_students_are_there_and_the_table_is_told_first(
    sweep: Path, prepared: PreparedSweep
) -> None:
    make_student(sweep, "a", 0, 10.0)
    told: list[str] = []
    result = export_and_publish(load_selection(sweep), prepared, told.append)
    assert result["exports"] == {"fast": str(sweep / "exports" / "a-b1")}
    assert (sweep / "exports" / "a-b1" / "model.safetensors").is_file()
    assert "sweep mini: 1 trials: 1 done" in told[0]
    assert f"chosen students: {sweep / 'exports'}" in told[0]
    assert "MLflow: the tracking server http://127.0.0.1:9 does not answer" in told[1]
    assert result["whole"]


def test_what_was_under_way_when_its_shape_lost_its_budget_is_left_and_not_waited_for(
    sweep: Path, prepared: PreparedSweep
) -> None:
    """Else the command would ask for ever to be given again, and end with status 1."""
    make_student(sweep, "a", 0, 10.0)
    make_trial(sweep, "b", 1, 9.0, status=None)
    prepared = replace(prepared, shape_costs_fewest_beams={"4-1": {"params_m": 3.0}})
    told: list[str] = []
    for bound, died in ((1.0, []), (9.0, ["b"])):
        info = read_json(sweep / "sweep.json")
        write_json_atomic(sweep / "sweep.json", {**info, "budgets": {"small": {"params_m": bound}}})
        result = export_and_publish(load_selection(sweep), prepared, told.append)
        assert (result["died"], result["whole"]) == (died, not died)
    assert "1 trials are left half-way (b): no budget admits their shape any more" in told[0]
    assert "1 trials died (b): run the same command" in told[2]


def test_a_full_disk_and_a_lost_checkpoint_leave_the_table(sweep: Path, prepared: PreparedSweep) -> None:
    folder = make_student(sweep, "a", 0, 10.0)
    for file in (folder / "best").iterdir():
        file.unlink()
    (folder / "best").rmdir()
    told: list[str] = []
    result = export_and_publish(load_selection(sweep), prepared, told.append)
    assert "fast: a b1 is not exported" in told[0]
    assert "its checkpoint was deleted" in told[0]
    assert (result["exports"], result["whole"]) == ({}, False)
    (sweep / "front.html").unlink()
    (sweep / "front.html").mkdir()  # cannot be written
    with pytest.raises(IsADirectoryError):
        export_and_publish(load_selection(sweep), prepared, told.append)
    assert "sweep mini: 1 trials: 1 done" in told[2]


def serve(port: int, folder: Path) -> subprocess.Popen[bytes]:
    """A real MLflow server on loopback, once it answers; its store is in `folder`."""
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
    """As a machine that goes down takes its server with it, workers and all."""
    os.killpg(server.pid, signal.SIGKILL)
    server.wait(30)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_that_is_down_in_the_middle_and_on_resume_loses_nothing(tmp_path: Path) -> None:
    """Stopped once a trial is over, down for the rest and for a second command, back for a third."""
    teacher, data = make_world(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = {**KILL_SPACE["run"], "teacher": str(teacher)}
    run["dataset"] = {"name": str(data), "max_source_tokens": 32, "max_target_tokens": 16}
    path = tmp_path / "killed.yaml"
    path.write_text(yaml.safe_dump({**KILL_SPACE, "run": run, "tracking_uri": f"http://127.0.0.1:{port}"}))
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
    exports = list((home / "sweeps/killed/exports").iterdir())
    assert len(exports) == 1
    assert (exports[0] / "README.md").is_file()

    again = command(home, "sweep", path, "--json")
    assert again.returncode == 0, again.stderr[-3000:]
    assert "The sweep goes on" in again.stderr

    server = serve(port, tmp_path)
    try:
        found = last_json(command(home, "sweep", path, "--json"))
        client = make_client(f"http://127.0.0.1:{port}")
        experiment = client.get_experiment_by_name("killed").experiment_id
        runs = client.search_runs([experiment], "tags.`raydistill.trial` != ''")
        assert sorted(r.data.tags["raydistill.trial"] for r in runs) == sorted(t["key"] for t in found["trials"])
        assert {r.info.status for r in runs} == {"FINISHED"}
        for one in runs:
            assert len(client.get_metric_history(one.info.run_id, "val_loss")) >= 12  # every validation, and the end
        assert client.get_model_version_by_alias("killed", "any").source
    finally:
        stop(server)
