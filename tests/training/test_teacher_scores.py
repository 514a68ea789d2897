"""Scores of a teacher on the data of a run."""

from pathlib import Path

from raydistill.training.teacher_scores import score_teacher
from tests.factories.training import make_run


def test_scores_of_every_split_name_the_engine_that_scored_it(workspace: Path) -> None:
    scores, rows = score_teacher(make_run(workspace), "cpu", 1)
    assert (scores.engine, scores.precision) == ("ctranslate2", "fp32")
    assert scores.test is not None
    assert scores.test.engine == "ctranslate2 fp32"
    assert {split: len(statistics) for split, statistics in rows.items()} == {"validation": 6, "test": 5}
