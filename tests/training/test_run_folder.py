"""What a run leaves in its folder: its config, the fingerprints of its inputs, its lock and its checkpoints."""

import contextlib
import json
import signal
import subprocess
import sys
import threading

import pytest

from raydistill.config.run import Run
from raydistill.core import artifact
from raydistill.core.artifact import Manifest
from raydistill.core.errors import TransientError, UserError
from raydistill.core.files import SCHEMA_VERSION
from raydistill.models.loading import load_model
from raydistill.models.metadata import CheckpointMetadata
from raydistill.models.saving import CHECKPOINT_KIND, build_checkpoint, save_checkpoint
from raydistill.models.tokenization import load_tokenizer
from raydistill.training import loop, run_folder, validation
from raydistill.training import run as training_run
from raydistill.training.inputs import RunInputs
from raydistill.training.records import RunResult
from raydistill.training.run import train
from raydistill.training.state import StateManifest, TrainingState
from raydistill.training.tokenized_data import input_fingerprints
from tests.factories.kills import identities, kill_at_every_step
from tests.factories.models import save_tiny
from tests.factories.training import fail_if_called, make_run, no_report, parse_json_file

# The content of a lock file after the lock was given to a process of another machine.
SUCCESSOR = "process 1 on other since 2026-01-01T00:00:00+00:00\n0123456789abcdef"


def interrupt(_metrics, _folder):
    """A report callback that ends the process's run."""
    raise KeyboardInterrupt


def test_resume_accepts_changed_memory_settings(tmp_path):
    run = Run.model_validate({"name": "r", "teacher": "t", "dataset": "d", "training": {"micro_tokens": 16384}})
    run_folder.check_same_config(tmp_path, run)
    other = {"name": "r", "teacher": "t", "dataset": "d", "training": {"gpus": 0.5}}
    run_folder.check_same_config(tmp_path, Run.model_validate(other))
    other["training"]["batch_size"] = 7
    with pytest.raises(UserError, match="other settings"):
        run_folder.check_same_config(tmp_path, Run.model_validate(other))


@pytest.mark.parametrize("finished", [True, False])
def test_folder_of_another_config_is_rejected(workspace, finished, tmp_path):
    with contextlib.suppress(KeyboardInterrupt):
        train(make_run(workspace), tmp_path / "run", no_report if finished else interrupt)
    with pytest.raises(UserError, match="run: holds a run with other settings"):
        train(make_run(workspace, training={"learning_rate": 0.5}), tmp_path / "run", no_report)


def test_resume_fills_settings_missing_from_run_json_with_defaults(workspace, tmp_path):
    run = make_run(workspace)
    whole = train(run, tmp_path / "run", no_report)
    path = tmp_path / "run" / "run.json"
    config = parse_json_file(path)
    del config["evaluation"]["validation_length_penalty"], config["training"]["cache_precision"]
    path.write_text(json.dumps(config))
    assert train(run, tmp_path / "run", fail_if_called) == whole
    path.write_text(json.dumps(config | {"method": "kd"}))
    with pytest.raises(UserError, match="holds a run with other settings"):
        train(run, tmp_path / "run", fail_if_called)


@pytest.mark.parametrize("part", ["teacher", "train"])
def test_resume_with_another_teacher_or_other_data_is_rejected(workspace, tmp_path, part):
    run = make_run(workspace)
    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "run", interrupt)
    path = tmp_path / "run" / "input_fingerprints.json"
    recorded = parse_json_file(path)
    assert recorded == input_fingerprints(run).to_json()
    path.write_text(
        json.dumps(recorded | ({"teacher": "other"} if part == "teacher" else {"data": {"train": "other"}}))
    )
    with pytest.raises(UserError, match=f"inputs changed since this run was started: {part}"):
        train(run, tmp_path / "run", fail_if_called)
    path.write_text(json.dumps(recorded))
    assert train(run, tmp_path / "run", no_report).status == "done"


def test_run_folder_is_locked_by_one_process(workspace, tmp_path, monkeypatch):
    """A worker that outlives its driver still holds the lock: the next process waits for it."""
    folder = tmp_path / "run"
    monkeypatch.setattr(training_run, "LOCK_TIMEOUT_S", 0.2)
    with artifact.lock(folder), pytest.raises(TransientError, match=r"run: in use by process \d+ on "):
        train(make_run(workspace), folder, fail_if_called)
    assert list(folder.iterdir()) == []
    monkeypatch.setattr(training_run, "LOCK_TIMEOUT_S", 600)
    hold_lock = (
        "import sys, time; from pathlib import Path; from raydistill.core import artifact\n"
        "with artifact.lock(Path(sys.argv[1])): print(flush=True); time.sleep(60)"
    )
    other_process = subprocess.Popen([sys.executable, "-c", hold_lock, str(folder)], stdout=subprocess.PIPE)
    other_process.stdout.readline()
    threading.Timer(0.5, other_process.kill).start()
    assert train(make_run(workspace), folder, no_report).status == "done"
    assert other_process.wait() == -signal.SIGKILL


# Functions of a run that change its folder, in the order of their calls.
CHANGES = [
    (training_run, "check_same_config"),
    (training_run, "check_same_inputs"),
    (validation, "score_splits"),  # the conversion that it reads is deleted afterwards
    (loop, "write_history"),
    (loop, "save_state"),
    (loop, "delete_checkpoints"),
    (loop, "save_progress"),
    (training_run, "promote_best_checkpoint"),
    (training_run, "write_row_statistics"),
    (CheckpointMetadata, "write_to"),
    (training_run, "write_result"),
    (run_folder, "delete_working_files"),
]


@pytest.mark.parametrize(("owner", "name"), CHANGES)
def test_a_worker_that_lost_its_lock_before_a_change_changes_no_file(owner, name, workspace, tmp_path, monkeypatch):
    folder, change = tmp_path / "run", getattr(owner, name)
    files = {}

    def lose_lock_and_change(*args, **options):
        artifact.lock_path(folder).write_text(SUCCESSOR)
        files.update(identities(folder))
        return change(*args, **options)

    monkeypatch.setattr(owner, name, lose_lock_and_change)
    with pytest.raises(TransientError, match="run: was written by another process meanwhile"):
        train(make_run(workspace), folder, lambda _metrics, _folder: "stopped by the test")
    assert artifact.lock_path(folder).read_text() == SUCCESSOR
    assert identities(folder) == files


def test_a_worker_that_lost_its_lock_during_a_report_leaves_the_files_of_its_successor(workspace, tmp_path):
    """The successor has trained further. Its manifest names a file of tensors of a later step."""
    folder = tmp_path / "run"
    manifest, metrics = folder / "state" / "manifest.json", folder / "metrics.jsonl"
    successor = json.dumps(StateManifest(progress=TrainingState(step=9)).to_json())

    def report(_metrics, _folder):
        artifact.lock_path(folder).write_text(SUCCESSOR)
        manifest.write_text(successor)
        metrics.write_text("successor")
        return "stopped by the test"

    with pytest.raises(TransientError, match="run: was written by another process meanwhile"):
        train(make_run(workspace), folder, report)
    assert manifest.read_text() == successor
    assert metrics.read_text() == "successor"


@pytest.mark.parametrize("status", ["done", "failed"])
def test_the_end_of_a_run_deletes_temporary_files_and_the_folder_of_a_conversion_that_was_killed(status, tmp_path):
    for name in (".engine/.abc.0123abcd.tmp/model.bin", ".engine/abc/model.bin", ".rows.npz.0123abcd.tmp", "rows.npz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "best" / ".x.0123abcd.tmp").mkdir(parents=True)
    run_folder.delete_working_files(tmp_path, RunResult.model_construct(status=status))
    kept = ["best", ".x.0123abcd.tmp"] if status == "done" else []
    assert {path.name for path in tmp_path.rglob("*")} == {*kept, "rows.npz"}


def test_failed_save_leaves_no_checkpoint(tmp_path, monkeypatch):
    save_tiny("bart", tmp_path / "t")
    model, tokenizer = load_model(tmp_path / "t"), load_tokenizer(tmp_path / "t")

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(model, tokenizer, tmp_path / "checkpoint-1")
    assert not (tmp_path / "checkpoint-1").exists()


def test_a_kill_at_any_step_of_a_deletion_leaves_whole_checkpoints(tmp_path):
    folder = tmp_path / "home" / "run"
    paths = [folder / f"checkpoint-{step}" for step in (1, 2)]

    def prepare():
        for path in paths:
            with build_checkpoint(path) as temporary:
                for name in "abcdef":
                    (temporary / name).touch()
        (folder / ".checkpoint-3.01234567.tmp").mkdir()  # a kill while a checkpoint was written

    def read(_):
        whole = [path for path in paths if artifact.is_complete(path)]
        for path in whole:
            artifact.open_artifact(path, Manifest, CHECKPOINT_KIND)
        return [path.name for path in whole]

    folder.parent.mkdir()
    remaining = kill_at_every_step(lambda: run_folder.delete_checkpoints(folder, keep_step=2), prepare, folder, read)
    # Steps: the temporary folder with the unlink of its manifest; rename, fsync, and the deletion of seven files and a
    # folder
    assert remaining == [["checkpoint-1", "checkpoint-2"]] * 3 + [["checkpoint-2"]] * 10
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]


def test_best_checkpoint_replaces_an_older_one(workspace, tmp_path):
    run = make_run(workspace)
    whole = train(run, tmp_path / "whole", no_report, RunInputs())
    (tmp_path / "run" / "best").mkdir(parents=True)
    (tmp_path / "run" / "best" / "stale").touch()
    assert train(run, tmp_path / "run", no_report, RunInputs()).best_step == whole.best_step
    assert not (tmp_path / "run" / "best" / "stale").exists()


@pytest.mark.parametrize("name", ["run.json", "result.json"])
def test_folder_of_an_older_schema_is_rejected_with_a_remedy(workspace, tmp_path, name):
    folder = tmp_path / "run"
    train(make_run(workspace), folder, no_report)
    record = parse_json_file(folder / name)
    assert record["schema"] == SCHEMA_VERSION
    (folder / name).write_text(json.dumps({key: value for key, value in record.items() if key != "schema"}))
    with pytest.raises(UserError, match=rf"{name}: schema version 1, but .* reads {SCHEMA_VERSION}\. Move "):
        train(make_run(workspace), folder, fail_if_called)
