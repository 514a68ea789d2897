"""`raydistill cache`: list and remove the stores of the teacher cache and the converted checkpoints."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from raydistill.cache import _remove_leftovers
from raydistill.core import artifact
from raydistill.inference.ctranslate2_conversion import ensure_converted
from raydistill.models.hub import convert_to_safetensors
from raydistill.models.loading import load_model
from raydistill.models.tokenization import load_tokenizer
from raydistill.teacher_cache.builder import build_cache
from tests.factories.models import replace_by_pickle, save_tiny
from tests.factories.teacher_cache import cache_examples, cache_layout
from tests.factories.workspace import command, last_json


def test_stores_are_listed_and_removed_by_prefix_or_age(tmp_path):
    home = tmp_path / "outputs"
    layout = replace(cache_layout(home / "cache", cache_examples()), names=("bart", "news"))
    build_cache(layout, load_model(save_tiny("bart", tmp_path / "teacher", dropout=0.1)))
    listed = last_json(command(home, "cache", "list", "--json"))["stores"]
    assert sorted(s["name"] for s in listed) == sorted(w.name for w in [layout.encoder_store, *layout.decoder_stores])
    assert sum(s["bytes"] for s in listed) == sum(layout.array_sizes.values())
    without_name = command(home, "cache", "remove")
    assert (without_name.returncode, without_name.stdout) == (2, "")
    assert "--unused-days" in without_name.stderr
    unknown = command(home, "cache", "remove", "encoder-x")
    assert unknown.returncode == 2
    assert layout.encoder_store.name in unknown.stderr
    assert command(home, "cache", "remove", "--unused-days", "1").stdout.strip() == "nothing to remove"
    removed = last_json(command(home, "cache", "remove", layout.encoder_store.name[:12], "--json"))["removed"]
    assert [s["name"] for s in removed] == [layout.encoder_store.name]
    assert not layout.encoder_store.exists()
    assert layout.decoder_stores[0].exists()


@pytest.fixture
def conversions(tmp_path, monkeypatch):
    """The conversions of two checkpoints below tmp_path/outputs by name: to CTranslate2 and to safetensors."""
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "outputs"))
    cache = tmp_path / "outputs" / "cache"
    bart, pickled = (save_tiny("bart", tmp_path / name) for name in ("bart", "pickled"))
    replace_by_pickle(pickled, load_model(pickled).state_dict())
    folders = [
        ensure_converted(bart, load_tokenizer(bart), cache / "ctranslate2", 1, None),
        convert_to_safetensors(pickled, pickled),
    ]
    return {folder.relative_to(cache).as_posix(): folder for folder in folders}


def test_conversions_are_listed_with_their_checkpoint_and_removed_by_age_or_prefix(conversions, tmp_path):
    home = tmp_path / "outputs"
    ctranslate2, safetensors = conversions.values()
    (home / "cache" / "ctranslate2" / "damaged").mkdir()
    (home / "cache" / "ctranslate2" / ".x.0123abcd.tmp").mkdir()
    two_days_ago = time.time() - 2 * 86_400
    for path in (safetensors / "manifest.json", ctranslate2.with_name("damaged")):
        os.utime(path, (two_days_ago, two_days_ago))
    listed = {c["name"]: c for c in last_json(command(home, "cache", "list", "--json"))["conversions"]}
    assert set(listed) == {*conversions, "ctranslate2/damaged"}
    assert {name: (c["kind"], c["checkpoint"], round(c["days_unused"])) for name, c in listed.items()} == {
        f"ctranslate2/{ctranslate2.name}": ("conversion", str(tmp_path / "bart"), 0),
        f"safetensors/{safetensors.name}": ("safetensors", str(tmp_path / "pickled"), 2),
        "ctranslate2/damaged": ("conversion", None, 2),
    }
    for name, folder in conversions.items():
        assert listed[name]["bytes"] == sum(path.stat().st_size for path in folder.iterdir()) > 10_000
    table = command(home, "cache", "list").stdout
    assert f"ctranslate2/{ctranslate2.name}" in table
    assert str(tmp_path / "pickled") in table

    removed = last_json(command(home, "cache", "remove", "--unused-days", "1", "--json"))["removed"]
    assert {entry["name"] for entry in removed} == {f"safetensors/{safetensors.name}", "ctranslate2/damaged"}
    assert not safetensors.exists()
    assert ctranslate2.exists()
    removed = last_json(command(home, "cache", "remove", f"ctranslate2/{ctranslate2.name[:4]}", "--json"))["removed"]
    assert [entry["name"] for entry in removed] == [f"ctranslate2/{ctranslate2.name}"]
    assert not ctranslate2.exists()


def test_use_of_a_conversion_resets_its_age(conversions, tmp_path):
    two_days_ago = time.time() - 2 * 86_400
    ctranslate2, safetensors = conversions.values()
    for folder in (ctranslate2, safetensors):
        os.utime(folder / "manifest.json", (two_days_ago, two_days_ago))
    load_model(tmp_path / "pickled")
    ensure_converted(tmp_path / "bart", load_tokenizer(tmp_path / "bart"), ctranslate2.parent, 1, None)
    result = command(tmp_path / "outputs", "cache", "remove", "--unused-days", "1")
    assert result.stdout.strip() == "nothing to remove"
    assert ctranslate2.exists()
    assert safetensors.exists()


def test_folders_of_killed_commands_are_deleted_and_those_of_running_ones_kept(conversions, tmp_path):
    cache = tmp_path / "outputs" / "cache"
    names = ["ctranslate2/.killed.0123abcd.tmp", "safetensors/.killed.0123abcd.old", ".encoder-a.0123abcd.old"]
    for name in [*names, "ctranslate2/.running.0123abcd.tmp"]:
        (cache / name).mkdir()
        (cache / name / "model.bin").write_bytes(b"half")
    with artifact.lock(cache / "ctranslate2" / "running"):
        result = command(tmp_path / "outputs", "cache", "remove", "--unused-days", "1")
    assert result.returncode == 0
    assert not [name for name in names if (cache / name).exists()]
    assert (cache / "ctranslate2" / ".running.0123abcd.tmp" / "model.bin").exists()
    assert all(folder.exists() for folder in conversions.values())


def test_conversion_that_another_process_uses_is_not_removed(conversions, tmp_path):
    name, folder = next(iter(conversions.items()))
    with artifact.lock(folder):
        result = command(tmp_path / "outputs", "cache", "remove", name)
    assert result.returncode == os.EX_TEMPFAIL
    assert f"{folder}: in use by process {os.getpid()}" in result.stderr
    assert folder.exists()


@pytest.mark.parametrize("parent", ["cache", "cache/serving-0123", "labels", "shortlists", "sweeps/s/exports"])
def test_temporary_folders_of_killed_commands_are_removed(
    parent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path))
    leftovers = [tmp_path / parent / f".x.0123abcd.{suffix}" for suffix in ("tmp", "old")]
    for folder in leftovers:
        folder.mkdir(parents=True)
        (folder / "part").touch()
    (tmp_path / parent / "complete").mkdir()
    _remove_leftovers()
    assert not any(folder.exists() for folder in leftovers)
    assert (tmp_path / parent / "complete").is_dir()
