"""The model card of an exported student."""

from pathlib import Path

from huggingface_hub import ModelCard

from raydistill.models.metadata import CheckpointMetadata
from raydistill.results.selection import load_selection
from raydistill.tracking.model_card import render_model_card
from tests.factories.sweeps import decide_by_chrf, make_sweep, make_trial


def test_card_shows_the_deciding_metric_with_its_interval_and_the_reported_metrics(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "mt")
    folder = make_trial(sweep, "a", 0, 10.0)
    decide_by_chrf(sweep, folder)
    config = {"name": "x", "teacher": "big", "dataset": "d"}
    CheckpointMetadata.parse({"teacher": "big", "config": config}).write_to(folder / "best")
    selection = load_selection(sweep)
    card = render_model_card(selection, selection.students[0], ["fast"])
    metadata = ModelCard(card).data.to_dict()
    assert (metadata["pipeline_tag"], metadata["metrics"]) == ("translation", ["chrf"])
    assert [r["metrics"][0]["name"] for r in metadata["model-index"][0]["results"]] == ["chrF++", "chrF++"]
    assert "| split | chrF++ | 95 % interval | BLEU | recall |" in card
    assert "| validation | 50.00 | 9.00 to 11.00 | 25.00 | 80.00 |" in card
    assert "| test | 50.00 | 48.00 to 52.00 | 24.00 | 80.00 |" in card
    assert "Students are chosen by the validation score in chrF++; all other scores are for reporting only." in card
