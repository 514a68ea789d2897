"""Registered model versions and their aliases."""

from pathlib import Path

import pytest

from raydistill.config.space import mlflow_alias
from raydistill.core.errors import UserError
from raydistill.tracking import mlflow_registry, mlflow_store
from tests.factories.sweeps import make_trial


def test_registering_again_creates_no_version_and_another_choice_moves_the_alias(sweep, make_export):
    make_trial(sweep, "a", 0, 10.0)
    make_trial(sweep, "b", 1, 12.0)
    first = mlflow_registry.register_choice(sweep, "a", "fast", make_export(sweep, "a"))
    assert first == mlflow_registry.register_choice(sweep, "a", "fast", make_export(sweep, "a"))
    other = mlflow_registry.register_choice(sweep, "b", "fast", make_export(sweep, "b"))
    assert other.version != first.version
    client = mlflow_store.make_client(mlflow_store.default_tracking_uri())
    version = client.get_model_version_by_alias("mini", "fast")
    assert str(version.version) == other.version
    assert version.tags["size"] == "4-1"
    assert version.tags["latency_ms"] == "120.0"
    artifacts = Path(version.source.removeprefix("file://"))
    assert (artifacts / "raydistill.json").exists()


def test_changed_model_card_updates_the_files_of_the_existing_version(sweep, make_export):
    make_trial(sweep, "b", 1, 12.0)
    first = mlflow_registry.register_choice(sweep, "b", "fast", make_export(sweep, "b"))
    files = ("README.md", *mlflow_registry.MLFLOW_FILES)
    for file in files:
        (sweep / "exports" / "b" / file).write_text("chosen for fast and small")
    again = mlflow_registry.register_choice(sweep, "b", "small", sweep / "exports" / "b")
    assert again.version == first.version
    client = mlflow_store.make_client(mlflow_store.default_tracking_uri())
    version = client.get_model_version_by_alias("mini", "small")
    artifacts = Path(version.source.removeprefix("file://"))
    for file in files:
        assert (artifacts / file).read_text() == "chosen for fast and small"


def test_student_without_a_checkpoint_is_rejected(sweep):
    make_trial(sweep, "a", 0, 10.0)
    with pytest.raises(UserError, match="no finished checkpoint"):
        mlflow_registry.register_choice(sweep, "nope", "fast", sweep)


def test_aliases_are_valid_in_mlflow():
    assert mlflow_alias("fast, small") == "fast-small"
    assert mlflow_alias("v3") == "budget-v3"
    assert mlflow_alias("latest") == "budget-latest"
