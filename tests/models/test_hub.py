"""Resolution of checkpoints: folders, the hub's cache, shards and pickled weights."""

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch

from raydistill.config.presets import TEACHERS
from raydistill.config.run import Dataset, Decoding
from raydistill.core.errors import UserError
from raydistill.data.streaming import scan_split
from raydistill.inference.decoding import EngineOptions
from raydistill.inference.engines import open_engine
from raydistill.jobs.pseudolabel import LabelJob, beam_search_params, describe_job
from raydistill.models import fingerprints, loading, tokenization
from raydistill.models.hub import hub_commit, resolve_checkpoint
from tests.factories.kills import check_synced_before_publication, record_syncs_and_renames
from tests.factories.models import (
    FAMILIES,
    LANGUAGES,
    Malicious,
    lay_out_model,
    replace_by_pickle,
)
from tests.factories.workspace import corpus_rows, invoke, last_json


@pytest.mark.parametrize("family", FAMILIES)
def test_pickled_weights_are_converted_once_to_an_equal_model(family, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))
    folder = tmp_path / family
    shutil.copytree(tiny[family], folder)
    pickled = replace_by_pickle(folder, loading.load_model(tiny[family]).state_dict())
    assert fingerprints.weights_fingerprint(loading.load_model(folder)) == fingerprints.weights_fingerprint(
        tiny[family]
    )
    [converted] = (tmp_path / "home" / "cache" / "safetensors").glob("*/model.safetensors")
    before = converted.stat().st_mtime_ns
    assert fingerprints.weights_fingerprint(folder) == fingerprints.weights_fingerprint(tiny[family])
    assert len(tokenization.load_tokenizer(folder)) == len(tokenization.load_tokenizer(tiny[family]))
    assert converted.stat().st_mtime_ns == before
    assert sorted(p.name for p in folder.iterdir() if p != pickled) == sorted(
        p.name for p in tiny[family].iterdir() if p.name != "model.safetensors"
    )


def test_converted_weights_are_on_disk_before_they_get_their_name(bart, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))
    replace_by_pickle(bart, loading.load_model(bart).state_dict())
    events = record_syncs_and_renames(monkeypatch)
    check_synced_before_publication(events, resolve_checkpoint(bart))


def test_damaged_conversion_of_pickled_weights_is_replaced(bart, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))
    expected = fingerprints.weights_fingerprint(bart)
    replace_by_pickle(bart, loading.load_model(bart).state_dict())
    weights = resolve_checkpoint(bart) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert fingerprints.weights_fingerprint(bart) == expected
    assert len(list((tmp_path / "home" / "cache" / "safetensors").glob("[!.]*"))) == 1


@pytest.mark.parametrize("kind", ["code", "object", "truncated", "incomplete"])
def test_unsafe_or_damaged_pickle_is_refused_without_running_code(kind, bart, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))
    state = dict(loading.load_model(bart).state_dict())
    marker = tmp_path / "was_run"
    if kind == "code":
        replace_by_pickle(bart, {**state, "lm_head.bias": Malicious(marker)})
        torch.load(bart / "pytorch_model.bin", weights_only=False)
        assert marker.exists(), "without protection, loading this pickle runs code"
        marker.unlink()
    elif kind == "object":
        replace_by_pickle(bart, {**state, "step": 3})
    elif kind == "truncated":
        pickled = replace_by_pickle(bart, state)
        pickled.write_bytes(pickled.read_bytes()[:-1000])
    else:
        del state["model.encoder.layers.0.fc1.weight"]
        replace_by_pickle(bart, state)
    message = r"1 are missing, such as .*fc1" if kind == "incomplete" else r"pytorch_model\.bin: refused"
    with pytest.raises(UserError, match=message):
        loading.load_model(bart)
    assert not marker.exists()
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_missing_shard_is_named_in_the_error(bart):
    (bart / "model.safetensors").unlink()
    index = {"weight_map": {"x": "model-00001-of-00002.safetensors"}}
    (bart / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model-00001-of-00002\.safetensors is missing"):
        loading.load_model(bart)


def test_truncated_weight_file_is_named_in_the_error(bart):
    weights = bart / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged or truncated"):
        loading.load_model(bart)
    with pytest.raises(UserError, match="damaged or truncated"):
        fingerprints.weights_fingerprint(bart)


@pytest.mark.parametrize("location", ["nowhere", "/no/such/folder", "../nowhere"])
def test_missing_folder_that_is_no_hub_name_is_an_error(location):
    with pytest.raises(UserError, match="no such folder, and not a hub name"):
        loading.load_config(location)


def test_file_instead_of_a_folder_is_an_error(bart):
    with pytest.raises(UserError, match="is a file"):
        loading.load_config(bart / "config.json")


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    """An empty hub cache and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "hub"


def test_offline_uncached_model_fails_without_a_connection(offline, monkeypatch):
    looked_up = []

    def refuse(host, *_args, **_options):
        looked_up.append(host)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set and the checkpoint is not in the local cache"):
        loading.load_model("facebook/bart-large-xsum")
    assert looked_up == []


def test_offline_cached_model_loads_by_its_hub_name(offline, tiny):
    lay_out_model(offline, "someone/tiny-bart", tiny["bart"])
    model = loading.load_model("someone/tiny-bart")
    assert fingerprints.weights_fingerprint(model) == fingerprints.weights_fingerprint(tiny["bart"])
    assert len(tokenization.load_tokenizer("someone/tiny-bart")) == model.config.vocab_size


def test_offline_hub_commit_of_a_branch(offline, tiny):
    sha = lay_out_model(offline, "someone/tiny-bart", tiny["bart"])
    assert hub_commit("someone/tiny-bart@main") == hub_commit("someone/tiny-bart") == sha
    assert hub_commit(tiny["bart"]) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_offline_every_named_teacher_loads_from_the_cache(family, offline, tiny):
    for dataset, preset in TEACHERS[family].items():
        lay_out_model(offline, preset.hub, tiny[family], preset.revision)
        location = loading.locate_checkpoint(family, dataset)
        assert fingerprints.weights_fingerprint(loading.load_model(location)) == fingerprints.weights_fingerprint(
            tiny[family]
        )
        tokenizer = tokenization.load_tokenizer(location, preset.languages)
        if family in LANGUAGES:
            assert (tokenizer.src_lang, tokenizer.tgt_lang) == LANGUAGES[family]


def write_sources(path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in corpus_rows(12)))
    return path


def check_teacher_and_decoding(result: dict, teacher: Path) -> None:
    """Check the manifest of labels by the named Pegasus of XSUM against the checkpoint in the hub cache."""
    preset = TEACHERS["pegasus"]["xsum"]
    assert result["teacher"]["commit"] == preset.revision
    assert result["teacher"]["path"] == f"{preset.hub}@{preset.revision}"
    assert result["teacher"]["fingerprint"] == fingerprints.weights_fingerprint(teacher)
    assert (result["decoding"]["beams"], result["decoding"]["length_penalty"]) == (2, 0.6)


def test_pseudolabel_command_with_a_named_teacher_in_the_hub_cache(offline, tiny, tmp_path, monkeypatch):
    """Google's Pegasus checkpoint has pickled weights only."""
    preset = TEACHERS["pegasus"]["xsum"]
    folder = tmp_path / "pegasus"
    shutil.copytree(tiny["pegasus"], folder)
    replace_by_pickle(folder, loading.load_model(folder).state_dict())
    lay_out_model(offline, preset.hub, folder, preset.revision)
    file = write_sources(tmp_path / "texts.jsonl")
    arguments = ("pseudolabel", "--teacher", "pegasus", "--dataset", file, "--beams", 2, "--json")
    monkeypatch.setenv("HF_HUB_CACHE", str(offline))  # for Ray's workers
    result = last_json(invoke(tmp_path / "outputs", *arguments))
    assert result["rows"] == 12
    check_teacher_and_decoding(result, tiny["pegasus"])


def test_named_teacher_with_safetensors_weights_in_the_hub_cache_decodes(offline, tiny, tmp_path):
    """The same without Ray."""
    preset = TEACHERS["pegasus"]["xsum"]
    lay_out_model(offline, preset.hub, tiny["pegasus"], preset.revision)
    dataset = Dataset(name=str(write_sources(tmp_path / "texts.jsonl")))
    job = LabelJob("pegasus", dataset, decoding=Decoding(beams=2))
    description = describe_job(job, scan_split(dataset, "train"))
    check_teacher_and_decoding(description.model_dump(mode="json"), tiny["pegasus"])
    engine = open_engine(description.teacher.path, options=EngineOptions(cache_dir=tmp_path / "cache"))
    beam, max_source_tokens = beam_search_params(description)
    sources = [row["source"] for row in corpus_rows(12)]
    assert len(engine.generate(sources, beam, max_source_tokens=max_source_tokens)) == 12
