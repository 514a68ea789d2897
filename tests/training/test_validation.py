"""Scores of a student during and after training."""

import json

import pytest
import torch

from raydistill.models.loading import load_model
from raydistill.models.tokenization import load_tokenizer
from raydistill.training import validation
from raydistill.training.run import train
from tests.factories.training import make_run, no_report, parse_json_file, read_metrics


def test_missing_metric_library_falls_back_to_validation_loss(workspace, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(validation, "METRIC_LIBRARIES", {"rouge2": "no_such_library"})
    result = train(make_run(workspace), tmp_path / "run", no_report)
    metrics = result.metrics
    assert metrics["score"] == -metrics["val_loss"] == max(m["score"] for m in read_metrics(tmp_path / "run"))
    assert "rouge2" not in metrics
    assert (result.test, result.interval, result.signature) == (None, None, "val_loss")
    assert "no_such_library is not installed" in capsys.readouterr().err
    assert load_model(tmp_path / "run" / "best")


def test_validation_loss_is_the_mean_over_target_tokens(workspace, tmp_path):
    """Compares with the loss of transformers, row by row, of the best checkpoint."""
    train(make_run(workspace), tmp_path / "run", no_report)
    model, tokenizer = load_model(tmp_path / "run" / "best"), load_tokenizer(tmp_path / "run" / "best")
    total, count = 0.0, 0
    for line in (workspace / "validation.jsonl").read_text().splitlines():
        row = json.loads(line)
        labels = torch.tensor([tokenizer(row["target"], truncation=True, max_length=20).input_ids])
        ids = torch.tensor([tokenizer(row["source"], truncation=True, max_length=40).input_ids])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * labels.numel()
        count += labels.numel()
    assert parse_json_file(tmp_path / "run" / "result.json")["metrics"]["val_loss"] == pytest.approx(
        total / count, rel=1e-4
    )


def test_validations_have_their_own_decoding_and_final_scores_that_of_the_run(workspace, tmp_path, monkeypatch):
    """The paper's XSUM recipe validates with 2 beams and length penalty 0.5, and reports the teacher's decoding."""
    calls = []
    score = validation.Validator.score

    def recording_score(self, checkpoint, splits, beam):
        calls.append((checkpoint.name == "best", *splits, beam.beams, beam.length_penalty, beam.max_length))
        return score(self, checkpoint, splits, beam)

    monkeypatch.setattr(validation.Validator, "score", recording_score)
    run = make_run(
        workspace,
        decoding={"beams": 3, "length_penalty": 1.5, "max_length": 8},
        evaluation={"validation_length_penalty": 0.5},
        training={"checks_per_epoch": 1},
    )
    train(run, tmp_path / "run", no_report)
    assert calls == [
        (False, "validation", 2, 0.5, 8),
        (True, "validation", "test", 3, 1.5, 8),
    ]
