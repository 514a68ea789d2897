"""Publishing into a real SQLite store: repeated, interrupted, and with a server that is not there."""

import json
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from raydistill.config.space import mlflow_alias
from raydistill.core.errors import TransientError, UserError
from raydistill.core.files import write_json_atomic
from raydistill.results import records
from raydistill.tracking import mlflow_registry, mlflow_runs, mlflow_store
from tests.factories.sweeps import finish_trial, make_trial, runs_of


def test_a_local_store_whose_making_is_killed_can_be_made_again(tmp_path):
    """MLflow makes its tables one by one; a store with half of them could never be opened again."""
    file = tmp_path / "mlflow.db"
    code = f"from raydistill.tracking.mlflow_store import client_of; client_of('sqlite:///{file}')"
    worker = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not any(making.stat().st_size for making in tmp_path.glob(".mlflow.db.*.making")):
        assert time.monotonic() < deadline
        assert worker.poll() is None, "it was over before it could be killed"
        time.sleep(0.01)
    worker.kill()
    worker.wait()
    assert not file.exists()
    client = mlflow_store.make_client(f"sqlite:///{file}")
    assert (
        client.get_experiment(mlflow_store.get_or_create_experiment(client, "mine", f"sqlite:///{file}")).name == "mine"
    )
    assert not list(tmp_path.glob(".*.making*"))


def test_a_local_store_that_cannot_be_made_says_so(tmp_path):
    (tmp_path / ".mlflow.db.lock").mkdir()
    with pytest.raises(mlflow_store.TrackingUnavailable, match="the store cannot be made"):
        mlflow_store.make_client(f"sqlite:///{tmp_path}/mlflow.db")


def exported(sweep: Path, key: str) -> Path:
    """A folder to hand over, as `cluster.export` makes it of a real checkpoint."""
    folder = sweep / "exports" / key
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "raydistill.json").write_text("{}")
    (folder / "README.md").write_text("chosen for fast")
    mlflow_registry.write_mlmodel(folder)
    return folder


def test_a_checkpoint_is_brought_here_before_it_is_published(sweep: Path) -> None:
    """A trial of another machine, of which only the records are here; one that cannot be brought is not over."""
    folder = make_trial(sweep, "a", 0, 10.0)
    weights = folder / "best" / "model.safetensors"
    weights.unlink(missing_ok=True)
    weights.parent.mkdir(exist_ok=True)
    (weights.parent / "raydistill.json").write_text("{}")

    def refuses(checkpoint: Path) -> None:
        raise TransientError("the storage does not answer")

    with pytest.raises(TransientError):
        mlflow_runs.publish(sweep, fetch=refuses)
    assert "raydistill.done" not in runs_of(sweep)["a"].data.tags
    mlflow_runs.publish(sweep, fetch=lambda checkpoint: (checkpoint / "model.safetensors").write_bytes(b"weights"))
    run = runs_of(sweep)["a"]
    assert run.data.tags["raydistill.done"] == "1"
    artifacts = Path(run.info.artifact_uri.removeprefix("file://"))
    assert (artifacts / "checkpoint" / "model.safetensors").read_bytes() == b"weights"


def test_publish_follows_a_sweep_and_never_doubles(sweep: Path) -> None:
    make_trial(sweep, "a", 0, 10.0)
    running = make_trial(sweep, "b", 1, 12.0, status=None)
    first = mlflow_runs.publish(sweep)
    before = runs_of(sweep)
    assert set(before) == {"", "a", "b"}
    assert before["b"].info.status == "RUNNING"
    assert before["b"].data.metrics["rouge2"] == 12.0  # the second validation's
    assert before[""].info.status == "RUNNING"

    with (running / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 30, "time_s": 5, "val_loss": 0.5, "rouge2": 12.5}) + "\n")
        file.write('{"step": 40, "rou')  # torn by a kill
    finish_trial(running, 1, 12.5)
    make_trial(sweep, "c", 2, 1.0, status="failed")
    second = mlflow_runs.publish(sweep, finished=True)
    third = mlflow_runs.publish(sweep, finished=True)
    assert first.parent_run_id == second.parent_run_id == third.parent_run_id

    after = runs_of(sweep)
    assert {key: run.info.status for key, run in after.items()} == {
        "": "FINISHED",
        "a": "FINISHED",
        "b": "FINISHED",
        "c": "FAILED",
    }
    assert after["c"].data.tags["raydistill.reason"] == "out of memory"
    assert all(after[k].data.tags["mlflow.parentRunId"] == first.parent_run_id for k in "abc")
    client = mlflow_store.make_client(mlflow_store.default_tracking_uri())
    history = client.get_metric_history(after["b"].info.run_id, "val_loss")
    assert [(m.step, m.value) for m in history] == [(10, 2.0), (20, 1.0), (30, 0.5)]
    final = after["b"].data.metrics
    assert (final["rouge2"], final["latency_ms"], final["test_rouge2"]) == (12.5, 125.0, 12.0)
    ends = ("rouge2_low", "rouge2_high", "test_rouge2_low", "test_rouge2_high")
    assert [final[name] for name in ends] == [11.5, 13.5, 10.5, 12.5]
    shared = json.loads(client.get_experiment_by_name("mini").tags["mlflow.sharedViewState.raydistill"])
    columns = [c.removeprefix("metrics.").strip("`") for c in shared["selectedColumns"] if c.startswith("metrics.")]
    assert set(columns) - set(final) == {"speedup", "gpu_hours"}  # which this trial did not measure
    assert after["b"].data.params["training.learning_rate"] == "0.0003"
    assert after["b"].data.params["copied.decoder"] == "[0]"
    artifacts = {item.path for item in client.list_artifacts(after["b"].info.run_id)}
    assert artifacts == {"run.json", "result.json", "metrics.jsonl", "checkpoint"}
    on_parent = {item.path for item in client.list_artifacts(first.parent_run_id)}
    assert {"front.png", "table.md", "space.yaml"} <= on_parent
    assert "| fast | latency_ms <= 150" in after[""].data.tags["mlflow.note.content"]


def test_a_kill_in_the_middle_is_made_up_for(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_trial(sweep, "a", 0, 10.0)
    make_trial(sweep, "b", 1, 12.0)
    mlflow_runs.publish(sweep)
    client = mlflow_store.make_client(mlflow_store.default_tracking_uri())
    run_id = runs_of(sweep)["a"].info.run_id
    for tag in ("raydistill.done", "raydistill.lines"):  # as if killed after the metrics, before their tags
        client.delete_tag(run_id, tag)
    client.update_run(run_id, status="RUNNING")
    mlflow_runs.publish(sweep)
    assert runs_of(sweep)["a"].info.run_id == run_id
    assert runs_of(sweep)["a"].info.status == "FINISHED"
    assert len(client.get_metric_history(run_id, "val_loss")) == 2


def test_a_run_that_was_created_twice_stands_once(sweep: Path) -> None:
    """As a server behind a proxy does that gives up after the run was made, so that the request is sent again."""
    make_trial(sweep, "a", 0, 10.0)
    parent = mlflow_runs.publish(sweep).parent_run_id
    client = mlflow_store.make_client(mlflow_store.default_tracking_uri())
    kept = runs_of(sweep)["a"]
    tags = {k: kept.data.tags[k] for k in ("raydistill.sweep", "raydistill.trial", "mlflow.parentRunId")}
    for one in (tags, {"raydistill.sweep": tags["raydistill.sweep"]}):
        client.create_run(kept.info.experiment_id, tags=one)
    mlflow_runs.publish(sweep)
    after = runs_of(sweep)
    assert {key: run.info.run_id for key, run in after.items()} == {"": parent, "a": kept.info.run_id}


def test_what_serving_found_is_logged_after_the_trial_is_done_and_once(sweep: Path) -> None:
    folder = make_trial(sweep, "a", 0, 10.0)
    mlflow_runs.publish(sweep)
    costs = {"latency_ms": 50.0, "latency_ms_b1": 2.0}
    one = {"beams": 4, "length_penalty": 1.0, "metrics": {"rouge2": 10.0}, "interval": [9, 11], "costs": costs}
    two = {**one, "beams": 1, "metrics": {"rouge2": 8.0}, "costs": {**costs, "latency_ms": 30.0}}
    write_json_atomic(folder / "served.json", {"decodings": [one]})
    mlflow_runs.publish(sweep)
    tested = {"test": {"rouge2": 7.0, "interval": [6, 9]}}
    write_json_atomic(folder / "served.json", {"decodings": [one, {**two, **tested}]})
    for _ in range(2):
        mlflow_runs.publish(sweep, finished=True)
    run = runs_of(sweep)["a"]
    found = run.data.metrics
    assert (found["b4-p1/rouge2"], found["b4-p1/latency_ms"], found["b4-p1/speedup"]) == (10.0, 50.0, 6.0)
    assert (found["b1/rouge2"], found["b1/rouge2_high"], found["b1/test_rouge2_low"]) == (8.0, 11.0, 6.0)
    assert "b1/params_m" not in found
    client = mlflow_store.make_client(mlflow_store.default_tracking_uri())
    assert len(client.get_metric_history(run.info.run_id, "b4-p1/rouge2")) == 1
    assert "served.json" in {item.path for item in client.list_artifacts(run.info.run_id)}


def test_pictures_are_drawn_again_only_where_a_trial_has_ended(sweep: Path) -> None:
    make_trial(sweep, "a", 0, 10.0)
    running = make_trial(sweep, "b", 1, 12.0, status=None)

    def drawn() -> dict[str, int]:
        mlflow_runs.publish(sweep)
        return {name: (sweep / name).stat().st_mtime_ns for name in ("front.png", "curves.png", "front.html")}

    first = drawn()
    with (running / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 30, "time_s": 5, "val_loss": 0.5, "rouge2": 12.5}) + "\n")
    assert drawn() == first
    assert runs_of(sweep)["b"].data.metrics["val_loss"] == 0.5  # the numbers go on
    (sweep / "front.png").unlink()
    finish_trial(running, 1, 12.5)
    assert all(drawn()[name] > then for name, then in first.items())
    client = mlflow_store.make_client(mlflow_store.default_tracking_uri())
    parent = runs_of(sweep)[""]
    place = client.download_artifacts(parent.info.run_id, "front.html")
    assert Path(place).read_bytes() == (sweep / "front.html").read_bytes()


def test_two_that_publish_at_once_make_each_run_once(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_trial(sweep, "a", 0, 10.0)
    create = mlflow_runs._create_run

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.3)
        return create(*arguments)

    monkeypatch.setattr(mlflow_runs, "_create_run", slowly)
    mlflow_store.make_client(mlflow_store.default_tracking_uri())  # imports it once, in this thread
    with ThreadPoolExecutor(2) as pool:
        publishing = pool.submit(mlflow_runs.publish, sweep)
        choosing = pool.submit(mlflow_registry.register_choice, sweep, "a", "fast", exported(sweep, "a"))
        assert publishing.result(timeout=120).parent_run_id == runs_of(sweep)[""].info.run_id
        assert choosing.result(timeout=120).alias == "fast"
    assert set(runs_of(sweep)) == {"", "a"}


def test_a_publishing_that_hangs_elsewhere_is_not_waited_for_without_end(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_runs, "LOCK_TIMEOUT_S", 0.1)
    with FileLock(sweep / ".publish.lock"), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(mlflow_runs.publish, sweep)
        with pytest.raises(mlflow_store.TrackingUnavailable, match="another process has been publishing"):
            waiting.result(timeout=60)


def test_a_folder_that_is_no_sweep_gets_no_lock(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no sweep\.json"):
        mlflow_runs.publish(tmp_path / "nope")
    assert list(tmp_path.iterdir()) == []


def test_register_makes_one_version_and_moves_the_alias(sweep: Path) -> None:
    make_trial(sweep, "a", 0, 10.0)
    make_trial(sweep, "b", 1, 12.0)
    first = mlflow_registry.register_choice(sweep, "a", "fast", exported(sweep, "a"))
    assert first == mlflow_registry.register_choice(sweep, "a", "fast", exported(sweep, "a"))
    other = mlflow_registry.register_choice(sweep, "b", "fast", exported(sweep, "b"))
    assert other.version != first.version
    client = mlflow_store.make_client(mlflow_store.default_tracking_uri())
    version = client.get_model_version_by_alias("mini", "fast")
    assert str(version.version) == other.version
    assert version.tags["size"] == "4-1"
    assert version.tags["latency_ms"] == "120.0"
    kept = Path(version.source.removeprefix("file://"))
    assert (kept / "raydistill.json").exists()
    for file in ("README.md", *mlflow_registry.MLFLOW_FILES):
        (sweep / "exports" / "b" / file).write_text("chosen for fast and small")
    again = mlflow_registry.register_choice(sweep, "b", "small", sweep / "exports" / "b")
    assert again.version == other.version
    for file in ("README.md", *mlflow_registry.MLFLOW_FILES):
        assert (kept / file).read_text() == "chosen for fast and small"
    with pytest.raises(UserError, match="no finished checkpoint"):
        mlflow_registry.register_choice(sweep, "nope", "fast", sweep)


def test_a_server_that_is_down_fails_at_once(sweep: Path) -> None:
    make_trial(sweep, "a", 0, 10.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(mlflow_store.TrackingUnavailable, match="does not answer"):
            mlflow_runs.publish(sweep, uri)
        assert time.monotonic() - start < 5  # the figure is drawn first
        assert (sweep / "front.png").exists()
        free.listen()  # accepts and says nothing
        start = time.monotonic()
        with pytest.raises(mlflow_store.TrackingUnavailable, match="does not answer"):
            mlflow_store.check_tracking(uri)
        assert time.monotonic() - start < 2


def test_file_stores_are_refused() -> None:
    for uri in ("file:///tmp/mlruns", "mlruns", "localhost:5000"):
        with pytest.raises(UserError, match="plain files"):
            mlflow_store.check_tracking(uri)


def test_aliases_are_what_mlflow_takes() -> None:
    assert mlflow_alias("fast, small") == "fast-small"
    assert mlflow_alias("v3") == "budget-v3"
    assert mlflow_alias("latest") == "budget-latest"


def test_records_are_read_back_and_damage_is_named(sweep: Path) -> None:
    folder = make_trial(sweep, "a", 0, 10.0)
    (trial,) = records.read_trials(sweep)
    assert (trial.size, trial.score("rouge2"), trial.interval, trial.steps) == ("4-1", 10.0, (9.0, 11.0), 20)
    assert len(trial.history()) == 2
    rows = trial.rows()
    assert rows is not None
    assert rows.tolist() == [10.0] * 20
    assert trial.rows("test") is None
    (folder / "result.json").write_text('{"status": "do')
    with pytest.raises(UserError, match=r"a/result.json: damaged"):
        records.read_trials(sweep)


def test_a_running_trial_has_no_number(sweep: Path) -> None:
    make_trial(sweep, "b", 0, 10.0)
    make_trial(sweep, "a", 1, 10.0, status=None)
    first, running = records.read_trials(sweep)
    assert (first.number, first.label) == (0, "4-1 kd (trial 0)")
    assert (running.status, running.number, running.label) == ("running", None, "a")


def test_writing_is_whole_and_refuses_nan(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json_atomic(path, {"a": np.float32(0.5)})
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomic(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 0.5}
    assert list(tmp_path.iterdir()) == [path]


def test_open_sweep_names_those_that_exist(sweep: Path) -> None:
    assert records.find_sweep("mini") == sweep
    assert records.find_sweep(str(sweep)) == sweep
    with pytest.raises(UserError, match=r"minni: no such sweep; sweeps in .*: mini"):
        records.find_sweep("minni")
