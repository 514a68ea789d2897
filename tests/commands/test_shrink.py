"""The command `raydistill shrink`, where training rows decide what is copied."""

import json
from contextlib import contextmanager

import pytest
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from raydistill.core import artifact
from raydistill.core.artifact import LockHeld
from raydistill.core.errors import UserError
from raydistill.models import families
from raydistill.models.metadata import METADATA_FILE, CheckpointMetadata
from raydistill.models.saving import CHECKPOINT_KIND
from raydistill.shrink import shrink
from raydistill.training.run import train
from raydistill.training.student_choice import StudentChoice
from tests.factories.training import make_run, no_report, write_run_workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return write_run_workspace(tmp_path_factory.mktemp("shrink"))


def test_a_pruned_student_with_measured_layers_is_what_a_run_on_the_data_starts_from(workspace, tmp_path, capsys):
    settings = {"size": "2-2", "init": "measured", "encoder_ffn": 0.5, "decoder_ffn": 8.0}
    teacher, output = str(workspace / "teacher"), tmp_path / "student"
    shrink(teacher=teacher, output=output, dataset=str(workspace), as_json=True, **settings)
    printed = json.loads(capsys.readouterr().out)
    metadata = CheckpointMetadata.read_from(output)
    assert (metadata.size, metadata.ffn) == ("2-2-ffn0.5-8", {"encoder": 16, "decoder": 8})
    assert printed["size"] == metadata.size
    model = AutoModelForSeq2SeqLM.from_pretrained(output)
    assert families.ffn_units(model.config) == (16, 8)
    assert printed["params_m"] == sum(p.numel() for p in model.parameters()) / 1e6
    run = make_run(workspace, student=settings, training={"max_steps": 1}, dataset=str(workspace))
    train(run, tmp_path / "run", no_report)
    choice = StudentChoice.read(tmp_path / "run" / "student.json")
    assert metadata.copied == {"encoder": [0, 1], "decoder": choice.layers[0].layers}
    source = AutoModelForSeq2SeqLM.from_pretrained(teacher).state_dict()
    for layer, copied in enumerate(choice.layers[0].layers):
        expected = source[f"model.decoder.layers.{copied}.fc1.weight"][choice.units["decoder"][copied]]
        assert (model.state_dict()[f"model.decoder.layers.{layer}.fc1.weight"] == expected).all()


def test_random_units_need_no_data(workspace, tmp_path):
    shrink(teacher=str(workspace / "teacher"), size="2-1", output=tmp_path / "s", decoder_ffn=0.25, ffn_choice="random")
    assert CheckpointMetadata.read_from(tmp_path / "s").ffn == {"encoder": None, "decoder": 8}


def test_a_checkpoint_has_its_metadata_from_the_moment_of_its_publication(workspace, tmp_path, monkeypatch):
    output, publish = tmp_path / "s", artifact.publish
    files = []

    def list_and_publish(temporary, *arguments):
        files.extend(path.name for path in temporary.iterdir())
        publish(temporary, *arguments)

    monkeypatch.setattr(artifact, "publish", list_and_publish)
    shrink(teacher=str(workspace / "teacher"), size="2-1", output=output)
    assert METADATA_FILE in files
    assert METADATA_FILE in artifact.open_artifact(output, artifact.Manifest, CHECKPOINT_KIND).files


def test_one_process_at_a_time_creates_a_checkpoint(workspace, tmp_path, monkeypatch):
    teacher, output = str(workspace / "teacher"), tmp_path / "s"
    with artifact.lock(output), pytest.raises(LockHeld, match="s: in use by process"):
        shrink(teacher=teacher, size="2-1", output=output)
    assert not output.exists()

    @contextmanager
    def lock_after_another_process(folder):
        folder.mkdir()
        yield

    monkeypatch.setattr(artifact, "lock", lock_after_another_process)
    with pytest.raises(UserError, match="s: exists already"):
        shrink(teacher=teacher, size="2-1", output=output)
    assert list(output.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoder_ffn": 0.5}, "read training rows: give --dataset"),
        ({"init": "measured"}, "read training rows: give --dataset"),
        ({"decoder_ffn": 1.5, "ffn_choice": "random"}, r"shrink: decoder_ffn: 1\.5 is neither a share"),
        (
            {"encoder_ffn": 64, "ffn_choice": "random"},
            r"student\.encoder_ffn 64: the teacher has 32 feed-forward units",
        ),
    ],
)
def test_settings_that_cannot_be_used_are_errors(settings, message, workspace, tmp_path):
    with pytest.raises(UserError, match=message):
        shrink(teacher=str(workspace / "teacher"), size="2-1", output=tmp_path / "s", **settings)
    assert not (tmp_path / "s").exists()


def test_a_number_of_tokens_is_kept(workspace, tmp_path, capsys):
    output, teacher = tmp_path / "student", str(workspace / "teacher")
    shrink(teacher=teacher, size="2-1", vocabulary="300", dataset=str(workspace), output=output, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert model.config.vocab_size == len(tokenizer) == CheckpointMetadata.read_from(output).vocabulary == 300
    assert printed["size"] == "2-1-v300"
    assert printed["params_m"] == sum(p.numel() for p in model.parameters()) / 1e6
    with pytest.raises(UserError, match="--vocabulary counts the tokens of training rows: give --dataset"):
        shrink(teacher=teacher, size="2-1", vocabulary="used", output=tmp_path / "other")
