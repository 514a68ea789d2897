"""Converted checkpoints below HOME/cache."""

from pathlib import Path

import pytest

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
    [info] = conversions.list_conversions()
    assert (info.folder, info.checkpoint) == (folder, "teacher")
    conversions.remove(info)
    assert not folder.exists()
