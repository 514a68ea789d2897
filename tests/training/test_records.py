"""The records in the folder of a run."""

import json
from pathlib import Path

import pytest

from raydistill.config.run import Run
from raydistill.core.errors import UserError
from raydistill.core.files import SCHEMA_VERSION, write_json_atomic
from raydistill.models.shrinking import LayerPlan, plan_layers
from raydistill.training.records import (
    InputFingerprints,
    RunIdentity,
    read_history,
    read_run,
    write_history,
    write_run,
)
from tests.factories.training import VALIDATIONS

NO_METRIC = {name: value for name, value in VALIDATIONS[0].items() if name != "metric"}


def make_run(**student: object) -> Run:
    return Run.model_validate({"name": "r", "teacher": "t", "dataset": "d", "method": "kd", "student": student})


def test_a_run_is_read_as_written_and_missing_settings_have_their_defaults(tmp_path: Path) -> None:
    run = make_run(size="2-1", decoder_ffn=0.5)
    write_run(tmp_path / "run.json", run)
    assert read_run(tmp_path / "run.json") == run
    write_json_atomic(tmp_path / "short.json", {"schema": SCHEMA_VERSION, "name": "r", "teacher": "t", "dataset": "d"})
    assert read_run(tmp_path / "short.json") == Run.model_validate({"name": "r", "teacher": "t", "dataset": "d"})


def test_a_damaged_run_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json_atomic(path, {"schema": SCHEMA_VERSION, "name": "r", "teacher": "t", "dataset": "d", "method": "no"})
    with pytest.raises(UserError, match=rf"{path}: damaged"):
        read_run(path)


def test_changed_inputs_are_named() -> None:
    before = InputFingerprints(teacher="a", data={"train": "1", "validation": "2"})
    assert before.changes(before) == []
    assert before.changes(InputFingerprints(teacher="b", data={"train": "1"})) == ["teacher", "validation split"]
    assert before.changes(InputFingerprints(teacher="a", data={"train": "9", "validation": "2", "test": "3"})) == [
        "train split"
    ]


def test_identity_names_the_shape_and_the_copied_layers() -> None:
    run = make_run(size="2-1")
    plan = plan_layers((2, 3), run.student)
    assert isinstance(plan, LayerPlan)
    identity = RunIdentity.of(run, plan, "ignored")
    assert (identity.method, identity.size, identity.copied) == ("kd", "2-1", plan.copied)
    assert RunIdentity.of(run, None, "4-4") == RunIdentity("kd", "4-4", None, run.resolved_labels)


def test_validations_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert read_history(tmp_path) == []
    write_history(tmp_path, VALIDATIONS)
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
        (json.dumps(VALIDATIONS[0] | {name: "x"}), f"line 1: {name}: Input should be a valid number")
        for name in ("score", "b")
    ],
)
def test_a_damaged_line_of_the_history_is_named(tmp_path: Path, line: str, problem: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n{json.dumps(VALIDATIONS[1])}\n")
    with pytest.raises(UserError, match=f"metrics.jsonl: damaged: {problem}"):
        read_history(tmp_path)
