"""The functions `raydistill.sweep` and so on, which do what the commands do."""

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import raydistill
from raydistill.config.run import Run
from raydistill.config.space import Space
from raydistill.core.errors import UserError
from raydistill.pseudolabel import LabelResult
from raydistill.results.selection import load_selection
from raydistill.sweep import SweepResult, load_space
from raydistill.tracking import mlflow_store
from raydistill.tracking.export import export_student
from raydistill.training.records import RESULT_FILE, RUN_FILE, RunResult, write_history, write_run
from tests.factories.label_sets import pseudolabel_manifest, write_labels
from tests.factories.models import sentences
from tests.factories.sweeps import RUN, decide_by_chrf, make_student, make_trial
from tests.factories.workspace import make_world


def test_functions_are_not_replaced_by_the_modules_of_their_names() -> None:
    for name in raydistill.__all__:
        importlib.import_module(f"raydistill.{name}")
        assert callable(getattr(raydistill, name))
    assert raydistill.choose.__module__ == "raydistill.choose"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        raydistill.nothing  # noqa: B018


def test_choice_is_returned_as_an_object_that_loads_the_student_and_nothing_is_registered(sweep: Path) -> None:
    make_student(sweep, "a", 0, 10.0)
    choices = raydistill.choose("mini", {"latency_ms": "50%"}, name="half")
    [chosen] = choices.students
    assert (chosen.key, chosen.bounds, chosen.speedup) == ("a", {"latency_ms": 150.0}, 7.5)
    assert chosen.registered is None
    client = mlflow_store.make_client(mlflow_store.default_tracking_uri())
    assert client.search_registered_models() == []
    frame = choices.to_pandas()
    assert "costs" not in frame
    assert frame[["budget", "latency_ms", "params_m"]].to_dict("records") == [
        {"budget": "half", "latency_ms": 40.0, "params_m": 3.0}
    ]
    student = choices.best("half")
    assert student.folder == sweep / "exports" / "a-b1"
    assert len(student.load("cpu", 1).predict(sentences(3))) == 3
    with pytest.raises(UserError, match="fast: no such budget; known: half"):
        choices.best("fast")
    with pytest.raises(UserError, match="cannot bound 'latency'"):
        raydistill.choose("mini", {"latency": 900})


def test_scores_that_are_reported_are_columns(sweep: Path) -> None:
    folder = make_trial(sweep, "a", 0, 10.0)
    decide_by_chrf(sweep, folder)
    shutil.rmtree(folder / "best")  # nothing to export
    choices = raydistill.choose("mini", {"latency_ms": 900}, name="any")
    assert choices.students[0].reported == {"bleu": 25.0, "terms:recall": 80.0}
    columns = ["bleu", "terms:recall"]
    assert choices.to_pandas()[["score", *columns]].to_numpy().tolist() == [[50.0, 25.0, 80.0]]
    frame = SweepResult(sweep, {"complete": True}, {}).to_pandas()
    assert frame[["chrf++", *columns]].to_numpy().tolist() == [[50.0, 25.0, 80.0]]


def test_result_of_a_sweep_has_a_table_and_the_best_student_of_each_budget(sweep: Path) -> None:
    make_student(sweep, "a", 0, 10.0)
    selection = load_selection(sweep)
    exports = {"fast": export_student(selection, "a b1")}
    result = SweepResult(sweep, {"complete": True}, exports)
    frame = result.to_pandas().set_index("key")
    assert frame.loc["a b1", ["rouge2", "rouge2_low", "latency_ms", "speedup", "chosen_for"]].tolist() == [
        *(10.0, 9.0, 40.0, 7.5, "fast"),
    ]
    assert frame.loc["a b4-p1", "chosen_for"] == ""
    best = result.best("fast")
    assert (best.key, best.folder) == ("a b1", exports["fast"])
    with pytest.raises(UserError, match="small: no such budget; known: fast"):
        result.best("small")


def test_a_space_is_a_file_its_content_or_an_object(tmp_path: Path) -> None:
    content = {"name": "s", "run": RUN, "search": {"trials": 6}}
    (tmp_path / "space.yaml").write_text(json.dumps(content))
    expected = load_space(tmp_path / "space.yaml", ["search.trials=4"])
    assert expected.search.trials == 4
    assert load_space(content, ["search.trials=4"]) == expected
    assert load_space(Space.model_validate(content), ["search.trials=4"]) == expected
    with pytest.raises(UserError, match=r"space: search\.trails"):
        load_space({**content, "search": {"trails": 6}}, [])


def test_a_finished_run_is_returned_with_its_checkpoint_and_validations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path))
    settings = {"name": "teacher", "teacher": str(tmp_path), "dataset": str(tmp_path)}
    folder = tmp_path / "runs" / "teacher"
    write_run(folder / RUN_FILE, Run.model_validate(settings))
    RunResult(key="teacher", status="done", metrics={"rouge2": 12.0}).write(folder / RESULT_FILE)
    scored = {"total_steps": 2, "metric": "rouge2"}
    write_history(folder, [{**scored, "step": i, "score": 10.0 + i, "rouge2": 10.0 + i} for i in (1, 2)])
    runs: list[Any] = [settings, Run.model_validate(settings)]
    for run in runs:
        trained = raydistill.train(run)
        assert trained.checkpoint == folder / "best"
        assert trained.result.metrics == {"rouge2": 12.0}
        assert trained.to_pandas()["rouge2"].tolist() == [11.0, 12.0]
    with pytest.raises(UserError, match="another name"):
        raydistill.train(settings, ["training.epochs=7"])


def test_labels_are_a_table_and_arguments_are_checked(tmp_path: Path) -> None:
    write_labels(tmp_path / "labels")
    frame = LabelResult(tmp_path / "labels", pseudolabel_manifest()).to_pandas()
    assert frame.values.tolist()[:2] == [["a", 0, "Ein Hund.", -0.5], ["a", 1, "Zwei Hunde.", -0.75]]
    with pytest.raises(UserError, match="more than --beams 2"):
        raydistill.pseudolabel("pegasus", beams=2, n_best=3)
    with pytest.raises(UserError, match="min_rouge"):
        raydistill.pseudolabel("pegasus", keep={"min_rouge": 3})


def test_two_checkpoints_are_evaluated_on_the_same_rows(tmp_path: Path) -> None:
    teacher, data = make_world(tmp_path)
    copy = shutil.copytree(teacher, tmp_path / "copy")
    scored = raydistill.evaluate(teacher, copy, dataset=str(data), rows=4, beams=1, threads=1)
    assert scored.comparison is not None
    assert scored.comparison["difference"] == 0
    frame = scored.to_pandas()
    assert frame[f"output {teacher}"].tolist() == frame[f"output {copy}"].tolist()
    assert len(frame) == 4
    with pytest.raises(UserError, match="two different checkpoints"):
        raydistill.evaluate(teacher, teacher, dataset=str(data))


def test_jobs_are_a_table(sweep: Path) -> None:
    make_trial(sweep, "a", 0, 10.0)
    statuses = raydistill.status("mini")
    assert statuses.jobs == raydistill.status().jobs
    assert statuses.to_pandas()["name"].tolist() == ["mini"]
    with pytest.raises(UserError, match="other: no sweep, run or label job of this name"):
        raydistill.status("other")
