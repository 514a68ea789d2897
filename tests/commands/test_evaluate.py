"""The `evaluate` command."""

import json

from raydistill.config.run import Dataset, Run
from raydistill.core.files import CHECKPOINT_METADATA
from raydistill.evaluate import training_languages


def test_student_is_scored_with_its_training_languages(tmp_path):
    run = Run(name="r", teacher="t", dataset={"name": "mine", "languages": ["en", "ro"]}, student={"size": "2-1"})
    (tmp_path / CHECKPOINT_METADATA).write_text(json.dumps({"config": run.model_dump(mode="json")}))
    assert training_languages(str(tmp_path), Dataset(name="other")) == ("en", "ro")
    assert training_languages("t5", Dataset(name="wmt16_en_ro")) == ("en", "ro")
