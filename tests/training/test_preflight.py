"""Checks of runs before anything starts."""

import json
from pathlib import Path
from typing import Any

import pytest

from raydistill.core.errors import UserError
from raydistill.models.metadata import METADATA_FILE, CheckpointMetadata
from raydistill.training.preflight import check_run
from tests.factories.training import make_run


@pytest.fixture
def repetitive_teacher(workspace: Path, tmp_path: Path) -> str:
    """A checkpoint whose metadata say that 80 % of its validation outputs repeat themselves."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    for path in (workspace / "teacher").iterdir():
        (folder / path.name).symlink_to(path)
    CheckpointMetadata.parse({"scores": {"validation": {"rouge2": 0.0, "repetition": 0.8}}}).write_to(folder)
    assert json.loads((folder / METADATA_FILE).read_text())["scores"]["validation"]["repetition"] == 0.8
    return str(folder)


@pytest.mark.parametrize("changes", [{"method": "kd"}, {"method": "pl"}, {"method": "sft"}])
def test_a_teacher_whose_outputs_repeat_themselves_is_refused(
    workspace: Path, repetitive_teacher: str, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"80% of the outputs of the teacher .*allow_repetitive_teacher: true"):
        check_run(make_run(workspace, **changes, teacher=repetitive_teacher))
    assert capsys.readouterr().err == ""
    evaluation = {"allow_repetitive_teacher": True}
    check_run(make_run(workspace, **changes, teacher=repetitive_teacher, evaluation=evaluation))
    assert "warning: 80% of the outputs of teacher" in capsys.readouterr().err


def test_a_checkpoint_whose_outputs_repeat_themselves_may_be_trained_further(
    workspace: Path, repetitive_teacher: str
) -> None:
    check_run(make_run(workspace, teacher=repetitive_teacher, student=None))


def test_a_user_metric_that_cannot_be_imported_is_an_error_before_training(workspace: Path) -> None:
    for evaluation in ({"metric": "no_such_module:f"}, {"report": ["bleu", "no_such_module:f"]}):
        with pytest.raises(UserError, match="metric no_such_module:f: the module no_such_module cannot be imported"):
            check_run(make_run(workspace, evaluation=evaluation))


def test_a_model_of_bertscore_that_cannot_be_used_is_an_error_before_training(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for evaluation in ({"metric": "bertscore:owner/missing:9"}, {"report": ["bleu", "bertscore:owner/missing:9"]}):
        with pytest.raises(UserError, match="owner/missing: no such folder; HF_HUB_OFFLINE is set"):
            check_run(make_run(workspace, evaluation=evaluation))
    with pytest.raises(UserError, match="is no encoder; BERTScore needs one"):
        check_run(make_run(workspace, evaluation={"metric": f"bertscore:{workspace / 'teacher'}:1"}))
