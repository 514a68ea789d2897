"""Malicious input: no code of a checkpoint or record runs, no path leaves its folder, no secret is printed."""

import json
import re
import shutil
import sqlite3

import numpy as np
import pytest
import torch

from raydistill.cluster.start import FORWARDED_ENV
from raydistill.core.errors import UserError
from raydistill.core.files import SCHEMA_VERSION, read_json, write_json_atomic
from raydistill.core.secrets import redact
from raydistill.models import loading, tokenization
from raydistill.models.hub import weight_files
from raydistill.results import records
from raydistill.tracking import mlflow_runs, mlflow_store
from tests.factories.models import Malicious, replace_by_pickle, save_tiny
from tests.factories.sweeps import change_result, change_sweep, make_trial, runs_of
from tests.factories.workspace import command


@pytest.fixture
def bart(tmp_path):
    save_tiny("bart", tmp_path / "bart")
    return tmp_path / "bart"


# No code runs


@pytest.mark.parametrize("name", ["pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt"])
def test_pickles_next_to_the_weights_are_never_opened(name, bart, tmp_path):
    torch.save({"x": Malicious(tmp_path / "was_run")}, bart / name)
    assert loading.load_model(bart).training is False
    assert not (tmp_path / "was_run").exists()


def test_remote_code_of_a_checkpoint_never_runs(bart, tmp_path):
    """`auto_map` names classes in a file of the checkpoint, which `trust_remote_code` would import."""
    marker = tmp_path / "was_run"
    (bart / "custom.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass Custom: pass\n")
    names = ("AutoConfig", "AutoModel", "AutoModelForSeq2SeqLM", "AutoTokenizer")
    for file in ("config.json", "tokenizer_config.json", "generation_config.json"):
        data = {**json.loads((bart / file).read_text()), "auto_map": {name: "custom.Custom" for name in names}}
        data["auto_map"]["AutoTokenizer"] = ["custom.Custom", "custom.Custom"]
        data["custom_generate"] = "custom.Custom"
        (bart / file).write_text(json.dumps(data))
    config = loading.load_config(bart)
    assert config.model_type == "bart"
    assert type(loading.load_model(bart)).__module__.startswith("transformers.models.bart")
    assert type(tokenization.load_tokenizer(bart)).__module__.startswith("transformers.")
    loading.load_generation_config(bart)
    assert not marker.exists()


def test_unknown_model_type_is_refused(bart):
    config = json.loads((bart / "config.json").read_text())
    (bart / "config.json").write_text(json.dumps({**config, "model_type": "custom", "auto_map": {}}))
    with pytest.raises(UserError, match="model_type is 'custom'"):
        loading.load_model(bart)


def test_pickled_row_statistics_are_refused(tmp_path):
    marker = tmp_path / "was_run"
    np.savez(tmp_path / "rows.npz", validation=np.array([Malicious(marker)], dtype=object))
    with pytest.raises(UserError, match=r"rows\.npz: damaged"):
        records.read_row_statistics(tmp_path / "rows.npz", "validation")
    assert not marker.exists()


# No input exhausts memory


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 10**10},
        {"encoder_layers": 10**9},
        {"decoder_layers": 900},
        {"decoder_ffn_dim": 10**9},
        {"d_model": 10**8},
        {"max_position_embeddings": 10**10},
    ],
)
def test_config_larger_than_its_weights_is_refused_before_allocation(bart, changes):
    config = json.loads((bart / "config.json").read_text())
    (bart / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError, match=r"no model of these families|asks for more than"):
        loading.load_model(bart)


def test_row_statistics_with_a_huge_unpacked_size_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_ROW_BYTES", 10**6)
    np.savez_compressed(tmp_path / "rows.npz", validation=np.zeros(10**6))
    assert (tmp_path / "rows.npz").stat().st_size < 10**4
    with pytest.raises(UserError, match="unpacks to more than"):
        records.read_row_statistics(tmp_path / "rows.npz", "validation")


# No path leaves its folder


@pytest.mark.parametrize("name", ["../model.safetensors", "/tmp/model.safetensors", "model/../model.safetensors", 3])
def test_weight_index_with_paths_outside_the_folder_is_refused(bart, name):
    (bart / "model.safetensors").rename(bart.parent / "model.safetensors")
    (bart / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(UserError, match=r"index\.json: damaged"):
        weight_files(bart)


def test_pickled_checkpoint_with_an_external_link_is_not_copied(bart, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))
    (tmp_path / "private.txt").write_text("private")
    replace_by_pickle(bart, loading.load_model(bart).state_dict())
    (bart / "notes.txt").symlink_to(tmp_path / "private.txt")
    with pytest.raises(UserError, match=r"notes\.txt: symbolic link to a file outside"):
        loading.load_model(bart)
    assert "private" not in "".join(p.read_text() for p in (tmp_path / "home").rglob("*.txt"))


def test_trial_cannot_publish_another_folder(sweep, tmp_path):
    (tmp_path / "private").mkdir()
    folder = make_trial(sweep, "a", 0, 10.0)
    shutil.rmtree(folder / "best")
    (folder / "best").symlink_to(tmp_path / "private")
    with pytest.raises(UserError, match="is outside"):
        mlflow_runs.publish(sweep)


def test_sweep_name_cannot_lead_to_another_artifact_folder(sweep):
    write_json_atomic(sweep / "sweep.json", {**read_json(sweep / "sweep.json"), "name": "../../elsewhere"})
    with pytest.raises(UserError, match=r"sweep\.json: damaged: name: String should match"):
        mlflow_runs.publish(sweep)


# No secret is printed


def test_forwarded_environment_contains_no_secret(monkeypatch):
    """Ray's dashboard shows the environment that a command requests."""
    for name in FORWARDED_ENV:
        monkeypatch.setenv(name, "show-everybody")
    assert redact("show-everybody") == "show-everybody"


def test_password_in_a_space_is_refused_and_not_printed(tmp_path):
    home = tmp_path / "outputs"
    space = tmp_path / "space.yaml"
    head = "name: x\nrun: {teacher: demo, dataset: demo}\n"
    space.write_text(head + "tracking_uri: http://me:hunter22@127.0.0.1:9\n")
    first = command(home, "sweep", space)
    assert first.returncode == 2
    assert "space.yaml:3: tracking_uri: contains a password or token" in first.stderr
    assert "MLFLOW_TRACKING_PASSWORD" in first.stderr
    space.write_text(head)
    second = command(home, "sweep", space, "--set", "tracking_uri=http://me:hunter22@127.0.0.1:9", "--dry-run")
    assert second.returncode == 2
    assert "hunter22" not in first.stderr + first.stdout + second.stderr + second.stdout
    assert not home.exists()


def test_tracking_uri_with_a_password_is_refused(sweep):
    for uri in ("http://me:hunter22@127.0.0.1:9", "postgresql://me:hunter22@127.0.0.1/x"):
        change_sweep(sweep, tracking_uri=uri)
        with pytest.raises(UserError, match="contains a password or token") as error:
            mlflow_runs.publish(sweep)
        assert "hunter22" not in str(error.value)


def test_mlflow_receives_no_secret_and_no_external_file(sweep, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "show-nobody")
    folder = make_trial(sweep, "a", 0, 10.0)
    secrets = {"name": "show-nobody", "dataset": {"name": "d", "languages": ["show-nobody", "de"]}}
    secrets["teacher"] = "http://me:hunter22@host/t"
    write_json_atomic(folder / "run.json", {"schema": SCHEMA_VERSION, **secrets})
    change_result(folder, reason="401: show-nobody")
    mlflow_runs.publish(sweep)
    run = runs_of(sweep)["a"]
    assert run.data.params["teacher"] == "http://***@host/t"
    assert (run.data.params["name"], run.data.params["dataset.languages"]) == ("***", '["***", "de"]')
    assert run.data.tags["raydistill.reason"] == "401: ***"
    with sqlite3.connect(mlflow_store.default_tracking_uri().removeprefix("sqlite:///")) as database:
        dump = "\n".join(database.iterdump())
    assert not re.search("hunter22|show-nobody", dump)
    (tmp_path / "key").write_text("private")
    (make_trial(sweep, "b", 1, 9.0) / "best" / "key").symlink_to(tmp_path / "key")
    with pytest.raises(UserError, match=r"best/key: symbolic link to a file outside"):
        mlflow_runs.publish(sweep)
    assert not list((tmp_path / "home").rglob("mlartifacts/**/key"))
