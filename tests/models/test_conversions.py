"""Converted checkpoints below HOME/cache, and what killed commands leave of artifacts."""

from pathlib import Path

import pytest

from raydistill import cache
from raydistill.config.metric_names import MetricChoice
from raydistill.models import conversions
from raydistill.search.served_engine import ServingContext
from tests.factories.training import make_run


def test_conversions_of_a_sweep_that_was_killed_are_listed_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path))
    folder = ServingContext(make_run(tmp_path), MetricChoice("rouge2"), "0123").cache_dir / "a"
    assert folder.is_relative_to(tmp_path / "cache")  # a folder of a fixed name in /tmp could be another user's
    folder.mkdir(parents=True)
    manifest = conversions.make_manifest(folder, "conversion", "teacher")
    manifest.write(folder / "manifest.json")
    [entry] = cache._list_conversions()
    assert (entry.name, entry.checkpoint) == ("serving-0123/a", "teacher")
    entry.remove()
    assert not folder.exists()


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
    cache._remove_leftovers()
    assert not any(folder.exists() for folder in leftovers)
    assert (tmp_path / parent / "complete").is_dir()
