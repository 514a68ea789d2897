"""Publishing a sweep to a real SQLite store: repeated, interrupted and concurrent."""

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.utils.validation import _validate_metric_name

from raydistill.cluster import snapshots, sync
from raydistill.core import artifact
from raydistill.core.errors import TransientError, UserError
from raydistill.tracking import mlflow_registry, mlflow_runs, mlflow_store
from tests.factories.sweeps import (
    change_sweep,
    decide_by_chrf,
    finish_trial,
    make_trial,
    runs_of,
    served_student,
    write_served,
)

THIRD_VALIDATION: dict[str, Any] = {"step": 30, "total_steps": 30, "time_s": 5, "val_loss": 0.5}
THIRD_VALIDATION |= {"rouge2": 12.5, "metric": "rouge2", "score": 12.5}


def test_checkpoint_of_another_machine_is_downloaded_before_it_is_published(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the download fails, the trial's run is not marked as complete."""
    monkeypatch.setenv(sync.STORAGE_ENV, f"file://{tmp_path / 'storage'}")
    trial = make_trial(sweep, "a", 0, 10.0)
    (trial / "best" / "model.safetensors").write_bytes(b"weights")
    snapshots.save(sweep, trial)
    other_home = tmp_path / "other"
    monkeypatch.setenv("RAYDISTILL_HOME", str(other_home))
    other = other_home / "sweeps" / "mini"
    snapshots.pull_records(other)
    assert not (other / "trials" / "a" / "best").exists()

    objects = tmp_path / "storage" / snapshots.OBJECTS
    objects.rename(tmp_path / "unreachable")
    with pytest.raises(TransientError):
        mlflow_runs.publish(other)
    assert "raydistill.done" not in runs_of(other)["a"].data.tags
    (tmp_path / "unreachable").rename(objects)
    mlflow_runs.publish(other)
    run = runs_of(other)["a"]
    assert run.data.tags["raydistill.done"] == "1"
    artifacts = Path(run.info.artifact_uri.removeprefix("file://"))
    assert (artifacts / "checkpoint" / "model.safetensors").read_bytes() == b"weights"


def test_repeated_publishing_follows_a_sweep_without_duplicates(sweep: Path) -> None:
    make_trial(sweep, "a", 0, 10.0)
    running = make_trial(sweep, "b", 1, 12.0, status=None)
    first = mlflow_runs.publish(sweep)
    before = runs_of(sweep)
    assert set(before) == {"", "a", "b"}
    assert before["b"].info.status == "RUNNING"
    assert before["b"].data.metrics["rouge2"] == 12.0  # of the second validation
    assert before[""].info.status == "RUNNING"

    with (running / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(THIRD_VALIDATION) + "\n")
        file.write('{"step": 40, "rou')  # an incomplete line, as a kill leaves it
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
    shared_view = json.loads(client.get_experiment_by_name("mini").tags["mlflow.sharedViewState.raydistill"])
    columns = [
        c.removeprefix("metrics.").strip("`") for c in shared_view["selectedColumns"] if c.startswith("metrics.")
    ]
    assert set(columns) - set(final) == {"served_rouge2", "served_latency_ms", "served_speedup"}  # not served
    assert after["b"].data.params["training.learning_rate"] == "0.0003"
    assert after["b"].data.params["copied.decoder"] == "[0]"
    artifacts = {item.path for item in client.list_artifacts(after["b"].info.run_id)}
    assert artifacts == {"run.json", "result.json", "metrics.jsonl", "checkpoint"}
    on_parent = {item.path for item in client.list_artifacts(first.parent_run_id)}
    assert {"front.png", "table.md", "space.yaml"} <= on_parent
    assert "| fast | latency_ms <= 150" in after[""].data.tags["mlflow.note.content"]


def test_a_publication_during_the_search_logs_only_the_trials_that_changed(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A complete publication takes a minute of an invented clock, so that the next one follows after twenty."""
    now, complete = [0.0], []
    publish, publish_trial = mlflow_runs.publish, mlflow_runs._publish_trial
    published: list[str] = []

    def publish_in_a_minute(folder: Path) -> mlflow_runs.TrackedSweep:
        complete.append(now[0])
        now[0] += 60
        return publish(folder)

    def record(client: Any, run: Any, trial: Any, metrics: Any, finished: bool) -> None:
        published.append(trial.key)
        publish_trial(client, run, trial, metrics, finished)

    monkeypatch.setattr(mlflow_runs, "publish", publish_in_a_minute)
    monkeypatch.setattr(mlflow_runs, "_publish_trial", record)
    monkeypatch.setattr(mlflow_runs, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    publisher = mlflow_runs.SearchPublisher(sweep)
    make_trial(sweep, "a", 0, 10.0)
    running = make_trial(sweep, "b", 1, 12.0, status=None)
    publisher.publish()
    assert published == ["a", "b"]
    for _ in range(2):
        publisher.publish()  # nothing changed
    assert published == ["a", "b"]
    with (running / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(THIRD_VALIDATION) + "\n")
    make_trial(sweep, "c", 2, 1.0, status="failed")
    publisher.publish()
    assert published == ["a", "b", "b", "c"]
    finish_trial(running, 1, 12.5)
    publisher.publish()
    assert published[4:] == ["b"]
    assert complete == [0.0]
    after = runs_of(sweep)
    assert {key: run.info.status for key, run in after.items()} == {
        "": "RUNNING",
        "a": "FINISHED",
        "b": "FINISHED",
        "c": "FAILED",
    }
    assert len({after[key].data.tags["mlflow.parentRunId"] for key in "abc"}) == 1
    now[0] += 20 * 60
    publisher.publish()
    assert len(complete) == 2
    assert {run.info.run_id for run in runs_of(sweep).values()} == {run.info.run_id for run in after.values()}


def test_publishing_resumes_after_a_kill_before_the_tags_were_set(sweep: Path) -> None:
    make_trial(sweep, "a", 0, 10.0)
    make_trial(sweep, "b", 1, 12.0)
    mlflow_runs.publish(sweep)
    client = mlflow_store.make_client(mlflow_store.default_tracking_uri())
    run_id = runs_of(sweep)["a"].info.run_id
    for tag in ("raydistill.done", "raydistill.lines"):
        client.delete_tag(run_id, tag)
    client.update_run(run_id, status="RUNNING")
    mlflow_runs.publish(sweep)
    assert runs_of(sweep)["a"].info.run_id == run_id
    assert runs_of(sweep)["a"].info.status == "FINISHED"
    assert len(client.get_metric_history(run_id, "val_loss")) == 2


def test_duplicate_runs_are_deleted(sweep: Path) -> None:
    """A request that is repeated because a proxy timed out creates a second run."""
    make_trial(sweep, "a", 0, 10.0)
    parent = mlflow_runs.publish(sweep).parent_run_id
    client = mlflow_store.make_client(mlflow_store.default_tracking_uri())
    original = runs_of(sweep)["a"]
    tags = {k: original.data.tags[k] for k in ("raydistill.sweep", "raydistill.trial", "mlflow.parentRunId")}
    for duplicate_tags in (tags, {"raydistill.sweep": tags["raydistill.sweep"]}):
        client.create_run(original.info.experiment_id, tags=duplicate_tags)
    mlflow_runs.publish(sweep)
    after = runs_of(sweep)
    assert {key: run.info.run_id for key, run in after.items()} == {"": parent, "a": original.info.run_id}


def test_served_metrics_are_logged_once_per_configuration_after_the_trial_finished(sweep: Path) -> None:
    folder = make_trial(sweep, "a", 0, 10.0)
    mlflow_runs.publish(sweep)
    costs = {"latency_ms": 50.0, "latency_ms_b1": 2.0}
    beams_4 = served_student(4, 1.0, 10.0, costs)
    test = {"rouge2": 7.0, "interval": (6, 9)}
    beams_1 = served_student(1, 1.0, 8.0, {**costs, "latency_ms": 30.0}, interval=(9, 11), test=test)
    write_served(folder, beams_4)
    mlflow_runs.publish(sweep)
    write_served(folder, beams_4, beams_1)
    for _ in range(2):
        mlflow_runs.publish(sweep, finished=True)
    run = runs_of(sweep)["a"]
    metrics = run.data.metrics
    assert (metrics["b4-p1/rouge2"], metrics["b4-p1/latency_ms"], metrics["b4-p1/speedup"]) == (10.0, 50.0, 6.0)
    assert (metrics["b1/rouge2"], metrics["b1/rouge2_high"], metrics["b1/test_rouge2_low"]) == (8.0, 11.0, 6.0)
    assert "b1/params_m" not in metrics
    assert run.info.run_name == "fast: 4-1 kd (trial 0)"
    assert (metrics["served_rouge2"], metrics["served_latency_ms"], metrics["served_speedup"]) == (10.0, 50.0, 6.0)
    change_sweep(sweep, budgets={"fastest": {"latency_ms": 40.0}})
    mlflow_runs.publish(sweep, finished=True)
    run = runs_of(sweep)["a"]
    assert run.info.run_name == "fastest: 4-1 kd (trial 0)"
    assert (run.data.metrics["served_rouge2"], run.data.metrics["served_latency_ms"]) == (8.0, 30.0)
    assert (run.data.metrics["b4-p1/rouge2"], run.data.metrics["latency_ms"]) == (10.0, 100.0)
    client = mlflow_store.make_client(mlflow_store.default_tracking_uri())
    assert len(client.get_metric_history(run.info.run_id, "b4-p1/rouge2")) == 1
    assert "served.json" in {item.path for item in client.list_artifacts(run.info.run_id)}


def test_plots_are_updated_only_after_a_trial_finished(sweep: Path) -> None:
    make_trial(sweep, "a", 0, 10.0)
    running = make_trial(sweep, "b", 1, 12.0, status=None)

    def publish_and_stat() -> dict[str, int]:
        mlflow_runs.publish(sweep)
        return {name: (sweep / name).stat().st_mtime_ns for name in ("front.png", "curves.png", "front.html")}

    first = publish_and_stat()
    with (running / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(THIRD_VALIDATION) + "\n")
    assert publish_and_stat() == first
    assert runs_of(sweep)["b"].data.metrics["val_loss"] == 0.5  # metrics are always up to date
    for name in first:
        os.utime(sweep / name, (0, 0))
    (sweep / "front.png").unlink()
    finish_trial(running, 1, 12.5)
    assert all(modified > 0 for modified in publish_and_stat().values())
    client = mlflow_store.make_client(mlflow_store.default_tracking_uri())
    parent = runs_of(sweep)[""]
    path = client.download_artifacts(parent.info.run_id, "front.html")
    assert Path(path).read_bytes() == (sweep / "front.html").read_bytes()


def test_concurrent_publishing_creates_every_run_once(
    sweep: Path, make_export: Callable[[Path, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_trial(sweep, "a", 0, 10.0)
    create_run = mlflow_runs._create_run

    def create_slowly(*arguments: Any) -> Any:
        time.sleep(0.3)
        return create_run(*arguments)

    monkeypatch.setattr(mlflow_runs, "_create_run", create_slowly)
    mlflow_store.make_client(mlflow_store.default_tracking_uri())  # MLflow must be imported in one thread
    with ThreadPoolExecutor(2) as pool:
        publishing = pool.submit(mlflow_runs.publish, sweep)
        choosing = pool.submit(mlflow_registry.register_choice, sweep, "a", "fast", make_export(sweep, "a"))
        assert publishing.result(timeout=500).parent_run_id == runs_of(sweep)[""].info.run_id
        assert choosing.result(timeout=500).alias == "fast"
    assert set(runs_of(sweep)) == {"", "a"}


def test_waiting_for_another_publisher_times_out(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_runs, "LOCK_TIMEOUT_S", 0.1)
    with artifact.lock(sweep / "publish"), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(mlflow_runs.publish, sweep)
        with pytest.raises(artifact.LockHeld, match="publish: in use by process"):
            waiting.result(timeout=300)


def test_no_lock_is_created_outside_a_sweep(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no sweep\.json"):
        mlflow_runs.publish(tmp_path / "nope")
    assert list(tmp_path.iterdir()) == []


def test_the_experiment_links_the_sweep_and_its_model_and_values_are_rounded(sweep: Path) -> None:
    make_trial(sweep, "a", 0, 10.12345)
    published = mlflow_runs.publish(sweep, finished=True)
    client = mlflow_store.make_client(mlflow_store.default_tracking_uri())
    experiment = client.get_experiment_by_name("mini")
    note = experiment.tags["mlflow.note.content"]
    run_link = f"#/experiments/{experiment.experiment_id}/runs/{published.parent_run_id}?workflowType=machine_learning"
    assert f"[the sweep's run]({run_link})" in note
    assert "Chosen for fast: 4-1 kd (trial 0). [Registered versions](#/models/mini)." in note
    assert published.parent_url == f"http://127.0.0.1:5000/{run_link}"
    assert runs_of(sweep)["a"].data.metrics["rouge2"] == 10.12


def test_metrics_whose_names_mlflow_refuses_are_published(sweep: Path) -> None:
    """chrF++ decides; BLEU and a user's metric are reported."""
    decide_by_chrf(sweep, make_trial(sweep, "a", 0, 10.0))
    mlflow_runs.publish(sweep, finished=True)
    metrics = runs_of(sweep)["a"].data.metrics
    assert (metrics["chrfpp"], metrics["bleu"], metrics["terms.recall"]) == (50.0, 25.0, 80.0)
    assert (metrics["chrfpp_low"], metrics["test_chrfpp_high"], metrics["test_bleu"]) == (9.0, 52.0, 24.0)
    assert runs_of(sweep)[""].data.metrics["teacher_chrfpp"] == 60.0
    client = mlflow_store.make_client(mlflow_store.default_tracking_uri())
    view = json.loads(client.get_experiment_by_name("mini").tags["mlflow.sharedViewState.raydistill"])
    assert view["orderByKey"] == "metrics.`chrfpp`"
    assert view["selectedColumns"][4:7] == ["metrics.`chrfpp`", "metrics.`bleu`", "metrics.`terms.recall`"]


def test_mlflow_accepts_the_name_of_bertscore() -> None:
    key = mlflow_runs.metric_key("bertscore:owner/bert-base@refs/pr/3:9")
    assert key == "bertscore.owner/bert-base.refs/pr/3.9"
    _validate_metric_name(key)
