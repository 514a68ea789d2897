"""Registered model versions and their aliases."""

from pathlib import Path

import pytest
from mlflow.models import Model

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


def test_a_version_has_a_description_a_signature_an_example_and_an_address(sweep, make_export):
    make_trial(sweep, "a", 0, 10.0)
    registered = mlflow_registry.register_choice(sweep, "a", "fast", make_export(sweep, "a"))
    client = mlflow_store.make_client(mlflow_store.default_tracking_uri())
    version = client.get_model_version_by_alias("mini", "fast")
    for text in (
        "4-1 kd (trial 0) of `big`",
        "- ROUGE-2 on test: 9.50",
        "- latency, batch of 32: 100.0 ms",
        "Chosen for fast:",
    ):
        assert text in version.description
    assert registered.url == f"http://127.0.0.1:5000/#/models/mini/versions/{version.version}"
    model = Model.load(version.source.removeprefix("file://"))
    assert str(model.signature.inputs) == "[string (required)]"
    assert model.load_input_example(version.source.removeprefix("file://")) == ["a text", "another text"]


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
