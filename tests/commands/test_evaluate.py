"""The `evaluate` command."""

import json

import pytest

from raydistill.config.metric_names import MetricChoice
from raydistill.config.run import Columns, Dataset, Run
from raydistill.core.errors import UserError
from raydistill.data.corpus import Corpus
from raydistill.evaluate import CheckpointReport, Evaluation, _print_comparison, _resolve_task, training_languages
from raydistill.evaluation.scoring import EvaluationResult, score_outputs
from raydistill.models.metadata import CheckpointMetadata

METRICS = MetricChoice("rouge1", ("bleu",))
CORPUS = Corpus(
    *("mine", "test", ["r0", "r1", "r2"], ["x y z"] * 3, ["the cat sat on the mat", "a dog ran home", "yes it is"]),
    Columns(source="source", target="target"),
)


def report(predictions):
    scored = score_outputs(METRICS, predictions, CORPUS)
    fields = (scored.scores, scored.score_interval, scored.repetition_rate, predictions, 1.0, "ctranslate2 fp32")
    return CheckpointReport("rouge1", EvaluationResult(*fields), 1.0, "ctranslate2 fp32", 1.0, 4, "signature")


def compare(first, second):
    return Evaluation.create(METRICS, CORPUS, {"A": report(first), "B": report(second)})


def test_comparison_shows_every_metric_and_the_rows_on_which_the_metrics_disagree(capsys):
    """The first checkpoint has all words in another order, the second has fewer words in the right order."""
    evaluation = compare(
        ["mat the on sat cat the", "home a ran dog", "is it yes"], ["the cat sat on the", "a dog ran", "yes it is"]
    )
    compared = evaluation.to_json()
    assert compared["metric"] == "rouge1"
    assert compared["comparison"] == compared["comparisons"]["rouge1"]
    assert compared["comparison"]["difference"] > 0 > compared["comparisons"]["bleu"]["difference"]
    assert compared["disagreements"]["rows"] == 2
    assert {row["id"] for row in compared["disagreements"]["largest"]} == {"r0", "r1"}
    row = next(row for row in compared["disagreements"]["largest"] if row["id"] == "r0")
    assert row["differences"]["rouge1"] == pytest.approx(100 - 1000 / 11)
    assert row["outputs"] == {"A": "mat the on sat cat the", "B": "the cat sat on the"}
    _print_comparison(evaluation, as_json=False)
    text = capsys.readouterr().out
    assert "rouge1, bleu disagree on 2 of 3 rows" in text
    assert "    reference: the cat sat on the mat\n    A: mat the on sat cat the\n    B: the cat sat on the\n" in text
    assert "distinguishable" in text


def test_opposite_verdicts_of_two_metrics_are_stated(capsys):
    first = ["mat the on sat cat the", "home a ran dog", "is it yes"]
    _print_comparison(compare(first, ["the cat sat on", "a dog ran", "yes it"]), as_json=False)
    assert (
        "the metrics disagree: better by rouge1: A; better by rouge2, rougeL, rougeLsum: B" in capsys.readouterr().out
    )


def test_a_metric_of_the_user_that_a_checkpoint_names_is_not_run(tmp_path):
    evaluation = {"metric": "my_metrics:f", "report": ["my_metrics:g", "bleu"]}
    run = Run(name="r", teacher="t", dataset="mine", student={"size": "2-1"}, evaluation=evaluation)
    CheckpointMetadata(config=run).write_to(tmp_path)
    with pytest.raises(UserError, match="is not run: give --metric my_metrics:f to run it, or another metric"):
        _resolve_task(str(tmp_path), None, "auto", [])
    task = _resolve_task(str(tmp_path), None, "chrf", [])
    assert (task.metric, task.report) == ("chrf", ["bleu"])
    assert _resolve_task(str(tmp_path), None, "chrf", ["rouge1"]).report == ["rouge1"]


def test_student_is_scored_with_its_training_languages(tmp_path):
    run = Run(name="r", teacher="t", dataset={"name": "mine", "languages": ["en", "ro"]}, student={"size": "2-1"})
    CheckpointMetadata(config=run).write_to(tmp_path)
    assert training_languages(str(tmp_path), Dataset(name="other")) == ("en", "ro")
    assert training_languages("t5", Dataset(name="wmt16_en_ro")) == ("en", "ro")


def test_predictions_hold_texts_and_scores_of_each_row_and_a_page_shows_both_checkpoints(tmp_path):
    corpus = Corpus("mine", "test", ["x", "y"], ["one", "two"], ["a b c", "d e f"], Columns(source="source"))
    reports = {}
    for name, outputs in {"A": ["a b c", "d e f"], "B": ["a b c", "d <b> g"]}.items():
        scored = score_outputs(MetricChoice("rouge2"), outputs, corpus)
        result = EvaluationResult(
            scored.scores, scored.score_interval, scored.repetition_rate, outputs, 1.0, "ctranslate2 fp32"
        )
        reports[name] = CheckpointReport("rouge2", result, 1.0, "ctranslate2 fp32", 3.0, 1, "rouge2|version")
    evaluation = Evaluation.create(MetricChoice("rouge2"), corpus, reports)
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
