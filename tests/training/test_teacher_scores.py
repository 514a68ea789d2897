"""Scores of a teacher on the data of a run."""

import json
from pathlib import Path

import pytest

from raydistill.config.metric_names import MetricChoice
from raydistill.config.run import Evaluation
from raydistill.training.run import train
from raydistill.training.teacher_scores import score_teacher
from tests.factories.training import make_run, no_report, read_metrics


def test_scores_of_every_split_name_the_engine_that_scored_it(workspace: Path) -> None:
    scores, rows = score_teacher(make_run(workspace), "cpu", 1)
    assert (scores.engine, scores.precision) == ("ctranslate2", "fp32")
    assert scores.test is not None
    assert scores.test.engine == "ctranslate2 fp32"
    assert {split: len(statistics) for split, statistics in rows.items()} == {"validation": 6, "test": 5}


def test_a_translation_by_its_columns_is_scored_by_chrf_with_bleu_reported(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run on the rows of the workspace in the form of WMT: the teacher's record, and a student's results."""
    for path in workspace.glob("*.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [json.dumps({"translation": {"en": row["source"], "de": row["target"]}}) for row in records]
        (tmp_path / path.name).write_text("\n".join(lines) + "\n")
    base = make_run(workspace)
    run = base.model_copy(update={"dataset": base.dataset.model_copy(update={"name": str(tmp_path)})})
    scores, rows = score_teacher(run, "cpu", 1)
    assert scores.metric_choice == MetricChoice(
        "chrf++", ("bleu",), "a translation, by the columns translation.en and translation.de"
    )
    assert scores.lead1 is None
    assert scores.signature.startswith("chrf++|nrefs:1|")
    assert " bleu|nrefs:1|" in scores.signature
    assert rows["validation"].shape == (6, 24)
    result = train(run, tmp_path / "run", no_report)
    assert result is not None
    assert result.metrics["score"] == result.metrics["chrf++"]
    assert result.test is not None
    assert set(result.test.metrics) == {"chrf++", "bleu", "repetition"}
    assert "bleu" not in read_metrics(tmp_path / "run")[0]  # validations during training score by chrF++ only
    assert "metric: chrf++ (auto: a translation, by the columns" in capsys.readouterr().err


def test_lead_1_is_scored_by_the_metrics_of_the_run(workspace: Path) -> None:
    evaluation = Evaluation(metric="tests.evaluation.own_metrics:copy_rate", report=["exact_match"])
    run = make_run(workspace).model_copy(update={"evaluation": evaluation})
    scores, rows = score_teacher(run, "cpu", 1)
    assert scores.lead1 is not None
    assert scores.lead1["tests.evaluation.own_metrics:copy_rate"] == 100  # every word is copied from the source
    assert set(scores.lead1) == set(scores.metrics)
    assert rows["test"].shape == (5, 2)
