"""The `evaluate` command."""

from raydistill.config.run import Dataset, Run
from raydistill.evaluate import training_languages
from raydistill.models.metadata import CheckpointMetadata


def test_student_is_scored_with_its_training_languages(tmp_path):
    run = Run(name="r", teacher="t", dataset={"name": "mine", "languages": ["en", "ro"]}, student={"size": "2-1"})
    CheckpointMetadata(config=run).write_to(tmp_path)
    assert training_languages(str(tmp_path), Dataset(name="other")) == ("en", "ro")
    assert training_languages("t5", Dataset(name="wmt16_en_ro")) == ("en", "ro")
