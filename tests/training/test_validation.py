"""Scores of a student during and after training."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from raydistill.config.run import Evaluation
from raydistill.core.errors import TransientError
from raydistill.evaluation.metrics import BUILT_IN
from raydistill.inference import ctranslate2_conversion
from raydistill.inference.shortlist import kept_tokens
from raydistill.models.loading import load_config, load_model
from raydistill.models.metadata import CheckpointMetadata
from raydistill.models.tokenization import load_tokenizer
from raydistill.training import validation
from raydistill.training.run import train
from tests.factories.training import make_run, no_report, parse_json_file, read_metrics


def test_missing_metric_library_falls_back_to_validation_loss(workspace, tmp_path, monkeypatch, capsys):
    rouge2 = replace(BUILT_IN["rouge2"], library="no_such_library")
    monkeypatch.setitem(BUILT_IN, "rouge2", rouge2)
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

    def recording_score(self, checkpoint, splits, beam, engine, **options):
        calls.append((checkpoint.name == "best", *splits, beam.beams, beam.length_penalty, beam.max_length))
        return score(self, checkpoint, splits, beam, engine, **options)

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


def fail_conversion(monkeypatch, call):
    """Let one call of CTranslate2's conversion fail, counted from 1."""
    convert, calls = ctranslate2_conversion.convert_to_ctranslate2, itertools.count(1)

    def convert_or_fail(*arguments):
        if next(calls) == call:
            raise RuntimeError("not enough memory")
        convert(*arguments)

    monkeypatch.setattr(ctranslate2_conversion, "convert_to_ctranslate2", convert_or_fail)


def test_all_validations_of_a_run_use_one_engine(workspace, tmp_path, monkeypatch):
    """CTranslate2 fails at the second of three validations, as it does while memory is low."""
    run = make_run(workspace, training={"checks_per_epoch": 3})
    whole = train(run, tmp_path / "whole", no_report)
    assert (whole.engine, whole.test.engine) == ("ctranslate2 fp32", "ctranslate2 fp32")
    fail_conversion(monkeypatch, call=2)
    with pytest.raises(TransientError, match=r"not enough memory.* run the same command again"):
        train(run, tmp_path / "run", no_report)
    assert [metrics["engine"] for metrics in read_metrics(tmp_path / "run")] == ["ctranslate2 fp32"]
    resumed = train(run, tmp_path / "run", no_report)
    assert [metrics["engine"] for metrics in read_metrics(tmp_path / "run")] == ["ctranslate2 fp32"] * 3
    assert (resumed.engine, resumed.best_step, resumed.test) == (whole.engine, whole.best_step, whole.test)


def test_engine_of_the_first_validation_scores_the_whole_run(workspace, tmp_path, monkeypatch, capsys):
    """CTranslate2 fails at the first validation only: transformers scores all of them, and the reason is printed."""
    fail_conversion(monkeypatch, call=1)
    result = train(make_run(workspace), tmp_path / "run", no_report)
    messages = capsys.readouterr().err
    assert messages.count("using transformers, since") == 1
    assert "converting for CTranslate2" not in messages
    assert [metrics["engine"] for metrics in read_metrics(tmp_path / "run")] == ["transformers fp32"] * 2
    assert (result.engine, result.test.engine) == ("transformers fp32", "transformers fp32")
    scores = CheckpointMetadata.read_from(tmp_path / "run" / "best").scores
    assert {split: split_scores.engine for split, split_scores in scores.items()} == {
        "validation": "transformers fp32",
        "test": "transformers fp32",
    }


def test_only_validations_during_training_are_in_int8_with_a_shortlist(workspace, tmp_path, monkeypatch):
    opened = []
    score_splits = validation.score_splits

    def recording_score_splits(engine, *arguments):
        opened.append((engine.name, engine.precision, engine.shortlist and len(engine.shortlist.always)))
        return score_splits(engine, *arguments)

    monkeypatch.setattr(validation, "score_splits", recording_score_splits)
    training = {"checks_per_epoch": 1}
    plain = train(make_run(workspace, training=training), tmp_path / "plain", no_report)
    settings = {"validation_precision": "int8", "validation_shortlist": 6}
    result = train(make_run(workspace, training=training, evaluation=settings), tmp_path / "run", no_report)
    tokenizer = load_tokenizer(tmp_path / "run" / "best")
    num_special = len(kept_tokens(tokenizer, load_config(tmp_path / "run" / "best")))
    full = ("ctranslate2", "fp32", None)
    assert [opened[0], opened[1], opened[3]] == [full] * 3
    assert opened[2][:2] == ("ctranslate2", "int8")
    assert 6 <= opened[2][2] <= 6 + num_special < len(tokenizer)
    assert [metrics["engine"] for metrics in read_metrics(tmp_path / "run")] == ["ctranslate2 int8"]
    assert (result.engine, result.test.engine) == ("ctranslate2 fp32", "ctranslate2 fp32")
    assert (result.metrics["score"], result.test) == (plain.metrics["score"], plain.test)


def test_all_validations_in_int8_use_one_engine(workspace, tmp_path, monkeypatch):
    run = make_run(workspace, training={"checks_per_epoch": 2}, evaluation={"validation_precision": "int8"})
    fail_conversion(monkeypatch, call=2)
    with pytest.raises(TransientError, match=r"not enough memory.* ctranslate2 int8 scored the run's first validation"):
        train(run, tmp_path / "run", no_report)
    resumed = train(run, tmp_path / "run", no_report)
    assert [metrics["engine"] for metrics in read_metrics(tmp_path / "run")] == ["ctranslate2 int8"] * 2
    assert resumed.engine == "ctranslate2 fp32"


def test_transformers_scores_a_run_in_fp32_if_ctranslate2_cannot(workspace, tmp_path, monkeypatch):
    fail_conversion(monkeypatch, call=1)
    result = train(make_run(workspace, evaluation={"validation_precision": "int8"}), tmp_path / "run", no_report)
    assert {metrics["engine"] for metrics in read_metrics(tmp_path / "run")} == {"transformers fp32"}
    assert result.engine == "transformers fp32"


def test_validations_in_int8_need_ctranslate2():
    with pytest.raises(ValidationError, match="needs CTranslate2"):
        Evaluation(validation_precision="int8", engine="transformers")
