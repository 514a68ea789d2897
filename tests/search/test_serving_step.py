"""The whole serving step of a sweep on tiny real models: shapes, shortlists, first pass, scores, session, choice.

`run_exclusive` calls its function in this process, so that no Ray is needed.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raydistill.config.space import Space, corner_runs
from raydistill.evaluation import throughput
from raydistill.evaluation.paired_latency import StoppingRule
from raydistill.models.metadata import CheckpointMetadata
from raydistill.results.selection import load_selection
from raydistill.results.serving_latency import LATENCY_FILE, TEACHER_SHAPE, read_session
from raydistill.results.sweep_record import SweepTeacher, TeacherPasses
from raydistill.results.tables import result_tables
from raydistill.search import finalists, prepare, serving_timing, shape_latency
from raydistill.search.finalists import all_served, serve_finalists
from raydistill.search.prepare import PreparedSweep, check_budgets
from raydistill.search.shortlists import ensure_shortlists
from raydistill.search.summary import format_summary, summary_record
from raydistill.search.sweep_folder import write_sweep_record
from raydistill.tracking import export
from tests.factories.sweeps import change_result, change_sweep, make_trial
from tests.factories.workspace import make_world

SHORT = StoppingRule(min_pairs=2, max_seconds=0.2)


def run_here(function: Callable[..., Any], *args: Any, device: str, **_: Any) -> Any:
    """`run_exclusive` in this process, with one thread."""
    return function(*args, device, 1)


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Space:
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(prepare, "run_exclusive", run_here)
    monkeypatch.setattr(finalists, "run_exclusive", run_here)
    for name in ("BOUNDED_RULE", "REPORTED_RULE"):
        monkeypatch.setattr(serving_timing, name, SHORT)
    for name in ("SEARCH_RULE", "EXCLUSION_RULE"):
        monkeypatch.setattr(shape_latency, name, SHORT)
    teacher, data = make_world(tmp_path)
    run = {
        "teacher": str(teacher),
        "dataset": {"name": str(data), "max_source_tokens": 32, "max_target_tokens": 16},
        "decoding": {"beams": 2, "max_length": 12},
    }
    serving = {"beams": [1], "precision": ["fp32", "int8", "fp16"], "shortlist": ["off", 30]}
    budgets = {"slow": {"latency_ms": 1e6}, "any": {"params_m": 100}}
    return Space.model_validate({"name": "s", "run": run, "serving": serving, "budgets": budgets})


def prepare_sweep(space: Space, sweep: Path) -> SweepTeacher:
    """Write sweep.json, and a finished trial whose student is the teacher itself."""
    runs = corner_runs(space)
    scores = prepare._score_teacher(runs[0], sweep, "cpu")
    shapes = prepare._time_shapes(prepare._make_shape_task(space, runs, scores, "cpu"), "cpu")
    check_budgets(space, ["2-3"], shapes)
    teacher = SweepTeacher(**dict(scores), costs=shapes.teacher_costs, passes=TeacherPasses(), label_sets={})
    shortlists = ensure_shortlists(space, runs, teacher)
    write_sweep_record(space, sweep, PreparedSweep(teacher, shapes, shortlists), "running")
    folder = make_trial(sweep, "a", 0, 10.0)
    change_result(folder, size="2-3", metrics={"rouge2": 10.0, **shapes.costs["2-3"]})
    shutil.copytree(str(runs[0].teacher), folder / "best", dirs_exist_ok=True)
    metadata = CheckpointMetadata(teacher="big", config=runs[0], decoding=scores.decoding)
    metadata.write_to(folder / "best")
    return teacher


def check_throughput(sweep: Path) -> None:
    """The student that was chosen by its throughput is exported with its setting of threads and batches."""
    selection = load_selection(sweep)
    assert selection.chosen_keys["bulk"]
    chosen = selection.student(str(selection.chosen_keys["bulk"]))
    assert chosen.metrics["rows_per_s"] >= 0.01 * selection.teacher.costs["rows_per_s"] > 0
    setting = selection.throughput_setting(chosen)
    assert setting
    assert setting.batch_tokens in (20, 40, 60)
    exported = export.export_student(selection, chosen.key)
    serving = CheckpointMetadata.read_from(exported).serving
    assert serving is not None
    assert serving.throughput == setting
    assert setting.label in (exported / "README.md").read_text()


def test_a_sweep_is_served_once_and_timed_again_as_a_whole(
    space: Space, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = tmp_path / "home" / "sweeps" / "s"
    sweep.mkdir(parents=True)
    teacher = prepare_sweep(space, sweep)
    assert not all_served(space, sweep, teacher)
    serve_finalists(space, sweep, teacher, "cpu")
    messages = capsys.readouterr().err
    assert "shortlist 30: allows" in messages
    assert "this device does not compute in fp16" in messages
    assert "combinations of shape, beams, precision and shortlist are skipped" in messages
    assert all_served(space, sweep, teacher)

    selection = load_selection(sweep)
    assert {student.serving.beams for student in selection.students if student.serving} <= {1, 2}
    assert "a b2-p1" in {student.key for student in selection.students}
    for student in selection.students:
        assert student.metrics["speedup"] == pytest.approx(
            selection.teacher.costs["latency_ms"] / student.metrics["latency_ms"]
        )
        assert "speedup_same_serving" in student.metrics
    assert {s.test is not None for s in selection.students if s.key in selection.front_keys} == {True}
    assert selection.teacher.interval == selection.student("a b2-p1").interval, "the student is the teacher"
    summary = summary_record(selection)
    assert {f["key"] for f in summary["finalists"]} == {"a"}
    assert "finalists as served" in format_summary(selection, [], [])
    header, rows = result_tables(selection)[1]
    assert {"speed-up (teacher served the same way)", "serving"} <= set(header)
    assert len(rows) == len(selection.students)

    monkeypatch.setattr(export, "write_mlmodel", lambda folder: (folder / "MLmodel").write_text("x"))
    exported = export.export_student(selection, str(selection.chosen_keys["any"]))
    serving = CheckpointMetadata.read_from(exported).serving
    assert serving is not None
    assert serving.config == selection.student(str(selection.chosen_keys["any"])).serving

    before = (sweep / LATENCY_FILE).read_bytes()
    serve_finalists(space, sweep, teacher, "cpu")
    assert (sweep / LATENCY_FILE).read_bytes() == before
    bulk = {"bulk": {"rows_per_s": "1%"}}
    more = space.model_copy(
        update={"serving": space.serving.model_copy(update={"beams": [1, 3]}), "budgets": {**space.budgets, **bulk}}
    )
    change_sweep(sweep, budgets=more.budgets)
    monkeypatch.setattr(throughput, "CPU_BATCH_TOKENS", (20, 40, 60))
    assert not all_served(more, sweep, teacher)
    serve_finalists(more, sweep, teacher, "cpu")
    assert all_served(more, sweep, teacher)
    session = read_session(sweep)
    assert session is not None
    # The baseline has the teacher's own two beams. Other timings with two beams depend on the speed of int8
    timed = [session.baseline, *(s.config for s in session.servings if s.shape == TEACHER_SHAPE)]
    assert {config.beams for config in timed} == {1, 2, 3}
    assert (sweep / LATENCY_FILE).read_bytes() != before

    check_throughput(sweep)
