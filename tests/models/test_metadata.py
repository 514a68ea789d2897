"""The metadata of a checkpoint."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from raydistill.core.errors import UserError
from raydistill.models.metadata import METADATA_FILE, CheckpointMetadata, SplitScores


def test_scores_are_further_fields_of_a_split(tmp_path: Path) -> None:
    scores = SplitScores(interval=(9.0, 11.0), engine="ctranslate2 fp32", rouge2=10.0, repetition=0.1)
    assert scores.metrics == {"rouge2": 10.0, "repetition": 0.1}
    CheckpointMetadata(size="2-1", scores={"test": scores}).write_to(tmp_path)
    assert json.loads((tmp_path / METADATA_FILE).read_text())["scores"]["test"] == {
        "interval": [9.0, 11.0],
        "engine": "ctranslate2 fp32",
        "rouge2": 10.0,
        "repetition": 0.1,
    }
    assert CheckpointMetadata.read_from(tmp_path).scores == {"test": scores}
    with pytest.raises(ValidationError, match="rouge2"):
        SplitScores.model_validate({"rouge2": "high"})


def test_missing_and_damaged_metadata_are_errors_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=METADATA_FILE):
        CheckpointMetadata.read_from(tmp_path)
    CheckpointMetadata(size="2-1").write_to(tmp_path)
    content = json.loads((tmp_path / METADATA_FILE).read_text())
    (tmp_path / METADATA_FILE).write_text(json.dumps({**content, "size": 3}))
    with pytest.raises(UserError, match=r"size: .*Create the checkpoint again, or delete this file"):
        CheckpointMetadata.read_from(tmp_path)
