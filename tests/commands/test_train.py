"""The `train` command on a folder whose run is finished."""

import json

import pytest

from raydistill import train
from raydistill.config.run import Run
from raydistill.training.records import RESULT_FILE, RUN_FILE, RunResult, write_run


@pytest.mark.parametrize(("repetition", "warns"), [(0.9, True), (0.4, False)])
def test_model_whose_outputs_repeat_themselves_is_reported(repetition, warns, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path))
    settings = {"name": "teacher", "teacher": str(tmp_path), "dataset": str(tmp_path)}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    folder = tmp_path / "runs" / "teacher"
    write_run(folder / RUN_FILE, Run.model_validate(settings))
    result = RunResult(key="teacher", status="done", metrics={"rouge2": 0.0, "repetition": repetition})
    result.write(folder / RESULT_FILE)
    train.train(str(tmp_path / "run.json"), [], as_json=True)
    printed = capsys.readouterr()
    assert ("90% of the outputs of teacher repeat themselves" in printed.err) == warns
    assert json.loads(printed.out) == {**result.to_json(), "checkpoint": str(folder / "best")}
