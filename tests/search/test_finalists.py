"""Serving of finalists: scores are those of serving; the whole step on tiny real models, without Ray."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydistill.config.metric_names import MetricChoice
from raydistill.config.serving import ServingConfig
from raydistill.config.space import Space, corner_runs
from raydistill.data.corpus import read_corpus
from raydistill.data.selection import read_part
from raydistill.evaluation import throughput
from raydistill.evaluation.scoring import evaluate
from raydistill.inference.decoding import BeamSearchParams
from raydistill.inference.engines import open_engine
from raydistill.models.metadata import CheckpointMetadata
from raydistill.results.outputs import outputs_filename, read_outputs, read_texts, texts_filename
from raydistill.results.selection import load_selection
from raydistill.results.serving_latency import LATENCY_FILE, TEACHER_SHAPE, read_session
from raydistill.results.sweep_record import SweepTeacher
from raydistill.results.tables import result_tables
from raydistill.search import finalists, prepare
from raydistill.search.finalists import all_served, score_checkpoint, serve_finalists
from raydistill.search.served_engine import ServedCheckpoint, ServingContext
from raydistill.search.summary import format_summary, summary_record
from raydistill.search.sweep_folder import write_sweep_record
from raydistill.tracking import export
from tests.factories.sweeps import change_result, change_sweep, make_trial
from tests.factories.workspace import make_world

BEAM = BeamSearchParams(4, 1.0, 0, 12, 0, False, None)


def test_scores_are_those_of_an_evaluation_and_row_statistics_are_written(
    context: ServingContext, world, tmp_path: Path
) -> None:
    checkpoint = ServedCheckpoint("a", "2-3", str(world[0]), tmp_path, BEAM)
    configs = [checkpoint.own_config(), ServingConfig(beams=1, length_penalty=1.0, precision="int8")]
    results = score_checkpoint(context, checkpoint, configs, "validation", "cpu", 1)
    assert [(entry.config, entry.engine, entry.precision) for entry in results] == [
        (configs[0], "ctranslate2", "fp32"),
        (configs[1], "ctranslate2", "int8"),
    ]
    assert results[1].memory_mb == pytest.approx(results[0].memory_mb / 4)
    corpus = read_corpus(context.run.dataset, "validation")
    expected = evaluate(open_engine(world[0]), corpus, MetricChoice("bleu"), BEAM, max_source_tokens=32)
    assert results[0].metrics["bleu"] == expected.scores.metrics["bleu"]
    for config in configs:
        with np.load(tmp_path / f"rows-validation-{config.key}.npz") as rows:
            assert rows["validation"].shape == (8, 10)
    assert read_outputs(tmp_path / outputs_filename("validation", configs[0])) == expected.predictions
    assert not (tmp_path / texts_filename("validation")).exists()


def test_the_teachers_scores_come_with_the_texts_that_all_outputs_belong_to(
    context: ServingContext, world, tmp_path: Path
) -> None:
    teacher = ServedCheckpoint(TEACHER_SHAPE, TEACHER_SHAPE, str(world[0]), tmp_path, BEAM)
    config = ServingConfig(beams=1, length_penalty=1.0)
    score_checkpoint(context, teacher, [config], "validation", "cpu", 1)
    corpus = read_corpus(context.run.dataset, "validation")
    texts = read_texts(tmp_path / texts_filename("validation"))
    assert texts is not None
    assert [(row.id, row.source, row.reference) for row in texts] == list(
        zip(corpus.ids, corpus.sources, corpus.targets, strict=True)
    )
    score_checkpoint(context, teacher, [config], "test", "cpu", 1)
    assert not list(tmp_path.glob("*test*.jsonl"))


def test_a_checkpoint_is_served_on_the_rows_that_are_kept_for_the_choice(
    context: ServingContext, world, tmp_path: Path
) -> None:
    dataset = context.run.dataset.model_copy(update={"selection_share": 0.5})
    context = replace(context, run=context.run.model_copy(update={"dataset": dataset}))
    kept = read_part(dataset, "selection")
    assert kept is not None
    assert 0 < len(kept) < 8
    assert context.split == "selection"
    checkpoint = ServedCheckpoint("a", "2-3", str(world[0]), tmp_path, BEAM)
    [served] = score_checkpoint(context, checkpoint, [checkpoint.own_config()], context.split, "cpu", 1)
    assert (served.split, served.rows) == ("selection", len(kept))
    assert (tmp_path / "rows-selection-b4-p1.npz").is_file()


# The whole serving step: shapes, shortlists, first pass, scores, session, choice


def run_here(function: Callable[..., Any], *args: Any, device: str, **_: Any) -> Any:
    """`run_exclusive` in this process, with one thread."""
    return function(*args, device, 1)


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_timings: None) -> Space:
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(prepare, "run_exclusive", run_here)
    monkeypatch.setattr(finalists, "run_exclusive", run_here)
    teacher, data = make_world(tmp_path)
    run = {
        "teacher": str(teacher),
        "dataset": {"name": str(data), "max_source_tokens": 32, "max_target_tokens": 16},
        "student": {"size": "2-3"},
        "training": {"teacher_cache": "off"},
        "decoding": {"beams": 2, "max_length": 12},
    }
    serving = {"beams": [1], "precision": ["fp32", "int8", "fp16"], "shortlist": ["off", 30]}
    budgets = {"slow": {"latency_ms": 1e6}, "any": {"params_m": 100}}
    return Space.model_validate({"name": "s", "run": run, "serving": serving, "budgets": budgets})


def prepare_sweep(space: Space, sweep: Path) -> SweepTeacher:
    """Write sweep.json, and a finished trial whose student is the teacher itself."""
    prepared = prepare.prepare(space, sweep, "cpu")
    write_sweep_record(space, sweep, prepared, "running")
    folder = make_trial(sweep, "a", 0, 10.0)
    change_result(folder, size="2-3", metrics={"rouge2": 10.0, **prepared.shapes.costs["2-3"]})
    [run] = corner_runs(space)
    shutil.copytree(str(run.teacher), folder / "best", dirs_exist_ok=True)
    metadata = CheckpointMetadata(teacher="big", config=run, decoding=prepared.teacher.decoding)
    metadata.write_to(folder / "best")
    return prepared.teacher


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
