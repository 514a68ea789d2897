"""The upload of an export to a local stand-in of the hub, and the model card as the hub reads it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, constants

from raydistill.core.errors import TransientError, UserError
from raydistill.models.metadata import CheckpointMetadata
from raydistill.push import push
from raydistill.results.selection import load_selection
from raydistill.tracking.export import export_student
from raydistill.tracking.hub_push import push_export
from tests.factories.hub_server import HubServer, hub_server
from tests.factories.sweeps import make_student, write_sample_texts

TOKEN = "hf_only-from-the-environment"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in speaks LFS
    with hub_server(TOKEN) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def export(sweep: Path, tmp_path: Path) -> Path:
    """An exported student whose run names local paths, with sample outputs."""
    data = tmp_path / "private" / "corpus"
    data.mkdir(parents=True)
    (data / "README.md").write_text("---\nlanguage: [en, ro]\nlicense: cc-by-4.0\n---\n# Corpus\n")
    best = make_student(sweep, "a", 0, 10.0) / "best"
    metadata = CheckpointMetadata.read_from(best)
    assert metadata.config is not None
    dataset = metadata.config.dataset.model_copy(update={"name": str(data)})
    teacher = str(tmp_path / "private" / "big" / "best")
    config = metadata.config.model_copy(update={"dataset": dataset, "teacher": teacher})
    metadata.model_copy(update={"config": config, "teacher": teacher}).write_to(best)
    selection = load_selection(sweep)
    write_sample_texts(selection, ["an output | with\na line", "second", "third", "fourth"])
    return export_student(selection, "a b1")


def test_card_has_the_hubs_metadata_and_samples_and_no_local_path(export: Path, tmp_path: Path) -> None:
    card = (export / "README.md").read_text()
    metadata = ModelCard(card).data.to_dict()
    expected = {"language": ["en", "ro"], "license": "cc-by-4.0", "library_name": "transformers"}
    expected |= {"metrics": ["rouge"], "pipeline_tag": "summarization"}
    assert {name: metadata[name] for name in expected} == expected
    assert "base_model" not in metadata
    [index] = metadata["model-index"]
    values = {r["dataset"]["split"]: r["metrics"][0]["value"] for r in index["results"]}
    assert values == {"validation": 10.0}
    assert index["results"][0]["dataset"]["name"] == "corpus"
    assert "| source 0 | reference 0 | an output \\| with a line |" in card
    assert "fourth" not in card
    assert metadata["widget"][1] == {"text": "source 1", "output": {"text": "second"}}
    assert "A student of `big` (4-4)" in card
    assert str(tmp_path) not in card


def test_teacher_and_data_of_the_hub_are_named(sweep: Path) -> None:
    best = make_student(sweep, "a", 0, 10.0) / "best"
    metadata = CheckpointMetadata.read_from(best)
    assert metadata.config is not None
    dataset = metadata.config.dataset.model_copy(update={"name": "cnn_dailymail"})
    config = metadata.config.model_copy(update={"dataset": dataset, "teacher": "bart"})
    metadata.model_copy(update={"config": config, "teacher": "bart"}).write_to(best)
    card = (export_student(load_selection(sweep), "a b1") / "README.md").read_text()
    block = yaml.safe_load(card.split("---")[1])
    assert block["base_model"] == "facebook/bart-large-cnn"
    assert block["datasets"] == ["abisee/cnn_dailymail"]
    assert (block["language"], block["license"]) == (["en"], "apache-2.0")


def test_an_export_is_uploaded_with_a_card_that_loads_from_the_repository(
    hub: HubServer, export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(export, "my-team/student", private=True, as_json=True)
    output = json.loads(capsys.readouterr().out)
    assert output == {"repository": "my-team/student", "commit": f"{hub.url}/my-team/student/commit/{'a' * 40}"}
    assert hub.private == {"my-team/student": True}
    files = hub.files["my-team/student"]
    expected = {
        p.relative_to(export).as_posix() for p in export.rglob("*") if p.is_file() and p.name != "manifest.json"
    }
    assert set(files) == expected
    for name in expected - {"README.md", "raydistill.json"}:
        assert files[name] == (export / name).read_bytes()
    card = files["README.md"].decode()
    assert 'AutoTokenizer.from_pretrained("my-team/student")' in card
    assert 'folder = snapshot_download("my-team/student")' in card
    metadata = json.loads(files["raydistill.json"])
    assert (metadata["teacher"], metadata["config"]["dataset"]["name"]) == ("big", "corpus")
    assert metadata["serving"] == json.loads((export / "raydistill.json").read_text())["serving"]
    for name, content in files.items():
        assert str(tmp_path).encode() not in content, name
    assert push_export(export, "my-team/student")


def test_errors_of_an_upload_say_what_to_do(
    hub: HubServer, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="expected owner/name"):
        push_export(export, "student")
    with pytest.raises(UserError, match="not a complete export"):
        push_export(tmp_path, "my-team/student")
    hub.fail_with = 503
    with pytest.raises(TransientError, match="the hub refuses"):
        push_export(export, "my-team/student")
    hub.fail_with = None
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match="401"):
        push_export(export, "my-team/student")
    # A token that `hf auth login` stored is not used
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(token_file))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="HF_TOKEN is not set"):
        push_export(export, "my-team/student")
    assert hub.files == {}
