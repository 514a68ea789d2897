"""The `evaluate` command."""

import json
from dataclasses import asdict

from raydistill.config.run import Columns, Dataset, Run
from raydistill.data.corpus import Corpus
from raydistill.evaluate import CheckpointReport, Evaluation, training_languages
from raydistill.evaluation.metrics import paired_bootstrap
from raydistill.evaluation.scoring import EvaluationResult, score_outputs
from raydistill.models.metadata import CheckpointMetadata


def test_student_is_scored_with_its_training_languages(tmp_path):
    run = Run(name="r", teacher="t", dataset={"name": "mine", "languages": ["en", "ro"]}, student={"size": "2-1"})
    CheckpointMetadata(config=run).write_to(tmp_path)
    assert training_languages(str(tmp_path), Dataset(name="other")) == ("en", "ro")
    assert training_languages("t5", Dataset(name="wmt16_en_ro")) == ("en", "ro")


def test_predictions_hold_texts_and_scores_of_each_row_and_a_page_shows_both_checkpoints(tmp_path):
    corpus = Corpus("mine", "test", ["x", "y"], ["one", "two"], ["a b c", "d e f"], Columns(source="source"))
    reports = {}
    for name, outputs in {"A": ["a b c", "d e f"], "B": ["a b c", "d <b> g"]}.items():
        scored = score_outputs("rouge2", outputs, corpus.targets)
        result = EvaluationResult(
            scored.scores, scored.score_interval, scored.repetition_rate, outputs, 1.0, "ctranslate2 fp32"
        )
        reports[name] = CheckpointReport("rouge2", result, 1.0, "ctranslate2 fp32", 3.0, 1, "rouge2|version")
    rows = [report.result.scores.row_stats for report in reports.values()]
    evaluation = Evaluation("rouge2", corpus, reports, asdict(paired_bootstrap("rouge2", *rows)))
    path = tmp_path / "outputs.jsonl"
    evaluation.write_predictions(path)
    assert json.loads(path.read_text().splitlines()[1]) == {
        "id": "y",
        "source": "two",
        "reference": "d e f",
        "outputs": {"A": "d e f", "B": "d <b> g"},
        "scores": {"A": 100.0, "B": 0.0},
    }
    html = evaluation.write_page(tmp_path / "outputs.html").read_text()
    for text in ("<title>A and B</title>", "mine, test, 2 rows", "difference: +50.00", "on 2 rows of the test split"):
        assert text in html
    assert "d <b> g" not in html
    frame = evaluation.to_pandas()
    assert list(frame.columns) == ["id", "source", "reference", "output A", "output B", "rouge2 A", "rouge2 B"]
    assert frame["rouge2 B"].tolist() == [100.0, 0.0]
