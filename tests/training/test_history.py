"""The validations in the folder of a run, metrics.jsonl."""

import json
import time
from pathlib import Path

import pytest

from raydistill.core.errors import UserError
from raydistill.train import RunFollower, _describe_validation
from raydistill.training.records import Validation, read_history, write_history

LINES = [
    {"step": n, "total_steps": 2, "metric": "bleu", "score": 20.0 + n, "engine": "ctranslate2 fp32", "bleu": 20.0 + n}
    for n in (1, 2)
]
NO_METRIC = {name: value for name, value in LINES[0].items() if name != "metric"}


def test_validations_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert read_history(tmp_path) == []
    write_history(tmp_path, LINES)
    first, last = read_history(tmp_path)
    assert (first.step, last.step, last.engine, last.val_loss) == (1, 2, "ctranslate2 fp32", None)
    assert last.metric == "bleu"
    assert last.numbers == {"bleu": 22.0, "score": 22.0, "step": 2, "total_steps": 2}
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "sco')  # an incomplete line, as a kill leaves it
    assert read_history(tmp_path) == [first, last]


@pytest.mark.parametrize(
    ("line", "problem"),
    [("{", "line 1: Expecting"), ("[]", "line 1: "), ('{"step": 1, "score": 2}', "line 1: total_steps: Field required")]
    + [(json.dumps(NO_METRIC), "line 1: metric: Field required")]
    + [
        (json.dumps(LINES[0] | {name: "x"}), f"line 1: {name}: Input should be a valid number")
        for name in ("score", "b")
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n{json.dumps(LINES[1])}\n")
    with pytest.raises(UserError, match=f"metrics.jsonl: damaged: {problem}"):
        read_history(tmp_path)


def test_validations_are_printed_once_also_after_a_damaged_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_history(tmp_path, LINES[:1])
    follower = RunFollower(tmp_path)
    with follower:
        (tmp_path / "metrics.jsonl").write_text("{\n{\n")
        time.sleep(1.5)  # the follower reads the file every second
        assert follower.thread.is_alive()
        write_history(tmp_path, LINES)
    assert capsys.readouterr().err.splitlines() == ["  step      2, epoch 0.00, 0 s: bleu 22.00"]


def test_a_score_that_is_the_validation_loss_is_printed_once() -> None:
    loss = {"step": 1, "total_steps": 2, "metric": "val_loss", "val_loss": 2.5, "score": -2.5}
    line = _describe_validation(Validation.model_validate(loss))
    assert line == "  step      1, epoch 0.00, 0 s: validation loss 2.500"
