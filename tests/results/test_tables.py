"""Cells of the trials table, and Markdown escaping."""

from dataclasses import replace
from pathlib import Path

from raydistill.config.metric_names import MetricChoice
from raydistill.results.records import Trial
from raydistill.results.tables import markdown_table, metric_name, trials_table
from tests.factories.selections import make_finished_trial

TRIALS = [
    make_finished_trial("b", 1, "2-2", "kd", 20, 900),
    make_finished_trial("a", 0, "2-1", "sft", 18, 600),
    Trial("x", Path("x"), "failed", reason="loss is NaN\nmore", number=2, size="2-1", method="kd"),
    make_finished_trial("c", 3, "2-2", "pl", 19, 900),
    Trial("r", Path("r"), "running", size="2-1", method="kd"),
]


def test_rows_are_sorted_by_cost_with_failed_trials_last() -> None:
    header, rows = trials_table(TRIALS, ["a", "b"], {"fast": "a", "cheap": "a", "none": None}, MetricChoice("rouge2"))
    assert [row[header.index("trial")] for row in rows] == ["0", "1", "3", "-", "2"]
    assert [row[0] for row in rows] == ["2-1 *", "2-2 *", "2-2", "2-1", "2-1"]
    assert rows[0][header.index("test ROUGE-2")] == "17.50 [16.50, 18.50]"
    assert rows[0][header.index("decoder from")] == "0 5"
    assert rows[0][-1] == "fast, cheap"
    assert [row[-1] for row in rows[3:]] == ["running", "failed: loss is NaN"]
    assert "encoder from" not in header  # every trial copies the whole encoder
    assert all(len(row) == len(header) for row in rows)


def test_a_shrunk_encoder_adds_a_column() -> None:
    shrunk = Trial("e", Path("e"), "done", size="2-2", copied_layers={"encoder": [0, 3], "decoder": [0]})
    header, rows = trials_table([shrunk], [], {}, MetricChoice("rouge2"))
    assert rows[0][header.index("encoder from")] == "0 3"


def test_a_column_names_the_engine_if_different_engines_scored_the_trials() -> None:
    first, second = (replace(trial, engine=f"{name} fp32") for trial, name in zip(TRIALS, ("b", "a"), strict=False))
    header, rows = trials_table([first, second, *TRIALS[2:]], [], {}, MetricChoice("rouge2"))
    assert [row[header.index("engine")] for row in rows] == ["a fp32", "b fp32", "-", "-", "-"]
    assert "engine" not in trials_table([first, *TRIALS[2:]], [], {}, MetricChoice("rouge2"))[0]


def test_markdown_table_escapes_vertical_bars_and_line_breaks() -> None:
    assert markdown_table(["a", "b"], [["x|y", "1\n2"]]) == "| a | b |\n| --- | --- |\n| x\\|y | 1 2 |"


def test_reported_scores_are_in_a_column_of_their_own() -> None:
    first = replace(TRIALS[0], metrics={**TRIALS[0].metrics, "bleu": 31.234, "terms:recall": 80.0})
    metrics = MetricChoice("rouge2", ("bleu", "terms:recall"))
    header, rows = trials_table([first, TRIALS[2]], [], {}, metrics)
    column = header.index("validation BLEU / recall")
    assert [row[column] for row in rows] == ["31.23 / 80.00", "-"]
    assert header.index("validation ROUGE-2") == column - 1


def test_bertscore_is_named_with_its_model_and_layer() -> None:
    assert metric_name("bertscore:owner/bert-base@refs/pr/3:9") == "BERTScore (bert-base, layer 9)"
