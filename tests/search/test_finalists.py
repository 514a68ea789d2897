"""Serving of finalists: which checkpoints with which decodings, and that scores and times are those of serving."""

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydistill.config.run import Run
from raydistill.config.space import DecodingSearch, Search, Space
from raydistill.data.corpus import read_corpus
from raydistill.data.selection import read_part
from raydistill.evaluation.scoring import evaluate
from raydistill.evaluation.serving import benchmark_serving
from raydistill.inference.decoding import BeamSearchParams
from raydistill.inference.engines import open_engine
from raydistill.models.metadata import CheckpointMetadata
from raydistill.results.page import make_tooltips
from raydistill.results.plots import marker_id
from raydistill.results.selection import load_selection, select_finalists
from raydistill.results.served_students import read_served
from raydistill.results.sweep_record import StopReason, SweepTeacher
from raydistill.results.tables import trials_table
from raydistill.search.finalists import (
    PendingServing,
    ServingTask,
    decoding_grid,
    find_unserved,
    find_untested,
    merge_served,
    serve_checkpoint,
    serving_config,
)
from raydistill.search.study import PROPOSALS_FILE, Proposal, ProposalLog
from raydistill.search.sweep_folder import search_stop_reason
from tests.factories.sweeps import (
    change_result,
    change_sweep,
    make_trial,
    served_student,
    sweep_record,
    sweep_teacher,
)
from tests.factories.workspace import make_world

BEAM = BeamSearchParams(4, 1.0, 0, 12, 0, False, None)


def test_the_grid_has_each_decoding_once_the_default_first_and_one_penalty_for_one_beam():
    results = decoding_grid(BEAM, DecodingSearch(beams=[1, 4], length_penalty=[0.6, 1.0]))
    assert [(beam.beams, beam.length_penalty) for beam in results] == [(4, 1.0), (1, 1.0), (4, 0.6)]
    assert all(beam.max_length == 12 for beam in results)
    assert decoding_grid(BEAM, DecodingSearch(beams=[], length_penalty=[])) == [BEAM]


def test_finalists_are_on_a_front_or_chosen(tmp_path: Path):
    """a and b are on the front of latency, c of parameters, d of device-hours, e is chosen, f is neither.

    No budget bounds parameters or device-hours alone, but a later `choose` may.
    """
    budgets = {"both": {"params_m": 2.5, "latency_ms": 55}}
    sweep_record(sweep_teacher(costs={}), budgets=budgets).write(tmp_path / "sweep.json")
    for number, (key, score, latency, params, hours) in enumerate(
        [
            ("a", 10.0, 50.0, 3.0, 2.0),
            ("b", 20.0, 90.0, 4.0, 2.0),
            ("c", 9.0, 60.0, 2.0, 2.0),
            ("d", 8.0, 70.0, 5.0, 1.0),
            ("e", 7.0, 55.0, 2.5, 2.0),
            ("f", 6.0, 70.0, 5.0, 2.0),
        ]
    ):
        folder = make_trial(tmp_path, key, number, score)
        costs = {"latency_ms": latency, "params_m": params, "device_hours": hours}
        change_result(folder, metrics={"rouge2": score, **costs})
        np.savez(folder / "rows.npz", validation=np.full(20, score))
    assert [trial.key for trial in select_finalists(tmp_path)] == ["a", "b", "c", "d", "e"]


def finished_sweep(folder: Path, teacher: Path, data: Path) -> tuple[Space, SweepTeacher]:
    """A space whose sweep has one finished trial and nothing served, and the teacher's record."""
    space = Space.model_validate(
        {"name": "m", "run": {"teacher": str(teacher), "dataset": {"name": str(data)}}, "search": {"trials": 1}}
    )
    record = sweep_teacher(costs={}, decoding=asdict(BEAM), data={"validation": "v", "test": "t"})
    sweep_record(record, decoding=space.search.decoding).write(folder / "sweep.json")
    CheckpointMetadata(decoding=asdict(BEAM)).write_to(make_trial(folder, "a", 0, 10.0) / "best")
    return space, record


MACHINE = {"kind": "cpu", "name": "a", "cores": 2, "threads": 2}
ENGINE = {"engine": "transformers", "precision": "fp32", "version": version("transformers")}


def serve_by_hand(folder: Path, beams: list[BeamSearchParams], hardware: dict | None = None, **changes: object) -> None:
    entries = []
    for beam in beams:
        fields: dict[str, Any] = {
            "costs": {"latency_ms": 5.0 * beam.beams},
            **ENGINE,
            "hardware": hardware or MACHINE,
            **changes,
        }
        entries.append(served_student(beam.beams, beam.length_penalty, 1.0, **fields))
    merge_served(folder, entries)


def test_unserved_checkpoints_are_found_from_the_files(world, tmp_path):
    """After the last trial, after a kill in between, and for a decoding that is added later."""
    space, teacher = finished_sweep(tmp_path, *world)
    student = tmp_path / "trials" / "a"
    assert search_stop_reason(space, tmp_path) == StopReason()
    assert [entry.folder for entry in find_unserved(space, tmp_path, teacher, MACHINE)] == [tmp_path, student]
    beams = decoding_grid(BEAM, space.search.decoding)
    serve_by_hand(tmp_path, beams)
    assert [entry.folder for entry in find_unserved(space, tmp_path, teacher, MACHINE)] == [student]
    serve_by_hand(student, beams)
    assert find_unserved(space, tmp_path, teacher, MACHINE) == []
    assert [entry.key for entry in find_untested(tmp_path, teacher)] == [
        "a b1"
    ]  # equal scores: one beam is the cheapest
    assert find_untested(tmp_path, teacher.model_copy(update={"data": {"validation": "v"}})) == []
    changes = space.model_copy(
        update={"search": Search(trials=1, decoding=DecodingSearch(beams=[3], length_penalty=[]))}
    )
    assert find_unserved(changes, tmp_path, teacher, MACHINE) == []  # three beams need a length penalty
    changes = space.model_copy(update={"search": Search(trials=1, decoding=DecodingSearch(beams=[3]))})
    left = find_unserved(changes, tmp_path, teacher, MACHINE)
    assert [entry.folder for entry in left] == [tmp_path, student]
    assert {beam.beams for entry in left for beam in entry.decodings} == {3}


def test_timings_of_another_machine_or_engine_do_not_count_and_are_kept(world, tmp_path):
    space, teacher = finished_sweep(tmp_path, *world)
    student = tmp_path / "trials" / "a"
    beams = decoding_grid(BEAM, space.search.decoding)
    for folder in (tmp_path, student):
        serve_by_hand(folder, beams)
    other_machine = {**MACHINE, "name": "b"}
    known = {"kind": "cpu", "name": "a"}  # less is known before Ray starts
    assert find_unserved(space, tmp_path, teacher, {}) == find_unserved(space, tmp_path, teacher, known) == []
    assert [entry.decodings for entry in find_unserved(space, tmp_path, teacher, other_machine)] == [beams, beams]
    for folder in (tmp_path, student):
        serve_by_hand(folder, beams, other_machine, costs={"latency_ms": 50.0})
    for machine in (MACHINE, other_machine):
        assert find_unserved(space, tmp_path, teacher, machine) == []
    assert {entry.metrics["latency_ms"] for entry in load_selection(tmp_path).students} == {
        20.0,
        5.0,
        10.0,
    }  # still of the first machine
    served = read_served(tmp_path)
    assert served
    served.model_copy(update={"hardware": other_machine}).write(tmp_path / "served.json")
    assert {entry.metrics["latency_ms"] for entry in load_selection(tmp_path).students} == {50.0}
    serve_by_hand(student, beams, version="0.1")
    assert [entry.folder for entry in find_unserved(space, tmp_path, teacher, MACHINE)] == [student]
    assert len(read_served(student).entries) == 2 * len(beams)


def test_speedup_is_relative_to_the_teachers_own_decoding_and_to_the_same_decoding(world, tmp_path):
    finished_sweep(tmp_path, *world)
    student = tmp_path / "trials" / "a"
    beams = decoding_grid(BEAM, DecodingSearch(beams=[1], length_penalty=[]))
    serve_by_hand(tmp_path, beams)  # 20 ms with its own four beams, 5 ms with one
    serve_by_hand(student, beams, costs={"latency_ms": 2.5})
    results = {entry.decoding.beams: entry.metrics for entry in load_selection(tmp_path).students}
    assert {n: (m["speedup"], m["speedup_same_decoding"]) for n, m in results.items()} == {4: (8, 8), 1: (8, 2)}
    header, rows = trials_table(load_selection(tmp_path).students, [], {}, "rouge2")
    assert [row[header.index("speed-up (same decoding)")] for row in rows] == ["8.00x (8.00x)", "8.00x (2.00x)"]


def test_latency_of_a_size_and_number_of_beams_is_the_median_of_its_students(world, tmp_path):
    """In the table, front, choice and figure: 99.5, 100.0 and 107.0 ms are pooled, and 40 ms of one beam are not."""
    _, record = finished_sweep(tmp_path, *world)
    sweep_record(record, budgets={"fast": {"latency_ms": "50%"}}).write(tmp_path / "sweep.json")
    make_trial(tmp_path, "b", 1, 10.1)
    longer = BeamSearchParams(4, 0.6, 0, 12, 0, False, None)
    served = {
        ("a", BEAM): (20.0, 99.5),
        ("b", BEAM): (20.1, 100.0),
        ("b", longer): (20.3, 107.0),
        ("b", BeamSearchParams(1, 1.0, 0, 12, 0, False, None)): (9.0, 40.0),
    }
    serve_by_hand(tmp_path, [BEAM, longer], costs={"latency_ms": 300.0})
    for (key, beam), (score, ms) in served.items():
        folder = tmp_path / "trials" / key
        serve_by_hand(folder, [beam], metrics={"rouge2": score}, costs={"latency_ms": ms})
        np.savez(folder / f"rows-validation-{serving_config(beam).key}.npz", validation=np.full(20, score))
    results = load_selection(tmp_path)
    assert {entry.key: entry.metrics["latency_ms"] for entry in results.students} == {
        **{key: 100.0 for key in ("a b4-p1", "b b4-p1", "b b4-p0.6")},
        "b b1": 40.0,
    }
    assert results.front_keys == ["b b1", "b b4-p0.6"]
    assert results.chosen_keys == {"fast": "b b4-p0.6"}
    assert {entry.metrics["speedup"] for entry in results.students} == {3.0, 7.5}
    assert results.student("b b4-p0.6").metrics["latency_ms_unpooled"] == 107.0
    assert "latency_ms_unpooled" not in results.student("b b1").metrics
    tooltip = ", ".join(make_tooltips(results)[marker_id("b b4-p0.6")])
    assert "100.0 ms for a batch of 32, 107.0 ms in its own measurement" in tooltip


def test_an_exhausted_search_is_not_started_again_unless_other_budgets_may_admit_more(world, tmp_path):
    space, _ = finished_sweep(tmp_path, *world)
    changes = space.model_copy(update={"search": Search(trials=9)})
    assert search_stop_reason(changes, tmp_path) is None
    change_sweep(tmp_path, stop=StopReason("all tried", exhausted=True))
    assert search_stop_reason(changes, tmp_path) == StopReason("all tried", exhausted=True)
    deleted = ProposalLog(proposals=(Proposal(key="deleted", number=9, params={}),))
    deleted.write(tmp_path / PROPOSALS_FILE)
    assert search_stop_reason(changes, tmp_path) is None, "a trial whose folder was deleted"
    (tmp_path / PROPOSALS_FILE).unlink()
    assert search_stop_reason(changes.model_copy(update={"budgets": {"b": {"params_m": 9}}}), tmp_path) is None
    fewer = Search(trials=9, decoding=DecodingSearch(beams=[1]))
    assert search_stop_reason(changes.model_copy(update={"search": fewer}), tmp_path) is None
    change_sweep(tmp_path, stop=StopReason("one hour is used up"))
    assert search_stop_reason(changes, tmp_path) is None


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def test_serving_times_batches_of_32_and_scores_the_texts_of_an_evaluation(world):
    """8 rows are timed as one padded batch of 32 and as 8 single rows, and the scores are of the 8 rows."""
    teacher, data = world
    run = Run.model_validate({"name": "x", "teacher": str(teacher), "dataset": {"name": str(data)}})
    corpus = read_corpus(run.dataset, "validation")
    engine = open_engine(teacher, "transformers")
    sizes = []

    class Counted:
        def generate(self, texts, beam, **settings):
            sizes.append(len(texts))
            return engine.generate(texts, beam, **settings)

    served = benchmark_serving(Counted(), corpus, "rouge2", BEAM, 32)
    assert sizes == [32, 32, 1, *[1] * 8]  # each batch size starts with a warm-up call
    assert served.timings["latency_ms"].repeats == 1
    assert served.timings["latency_ms_b1"].repeats == 8
    expected = evaluate(engine, corpus, "rouge2", BEAM, max_source_tokens=32)
    assert served.scores.metrics == expected.scores.metrics
    assert np.array_equal(served.scores.row_stats, expected.scores.row_stats)


def test_a_checkpoint_is_served_with_each_decoding_and_row_statistics_are_written(world, tmp_path):
    teacher, data = world
    settings = {"name": str(data), "max_source_tokens": 32, "max_target_tokens": 16}
    run = Run.model_validate({"name": "x", "teacher": str(teacher), "dataset": settings})
    beams = decoding_grid(BEAM, DecodingSearch(beams=[1], length_penalty=[]))
    results = serve_checkpoint(
        ServingTask(PendingServing(tmp_path, str(teacher), beams), run, "bleu", "validation"), "cpu", 1
    )
    assert [entry.decoding.beams for entry in results] == [4, 1]
    four, entry = (served.costs for served in results)
    assert entry["latency_ms"] < four["latency_ms"]
    assert four["latency_ms_low"] <= four["latency_ms"] <= four["latency_ms_high"]
    for served in results:
        assert served.rows == 8
        assert served.hardware["threads"] == 1
        assert served.engine in ("ctranslate2", "transformers")
        assert served.version == version(served.engine)
    for name in ("b4-p1", "b1"):
        with np.load(tmp_path / f"rows-validation-{name}.npz") as rows:
            assert rows["validation"].shape == (8, 10)


def test_a_checkpoint_is_served_on_the_rows_that_are_kept_for_the_choice(world, tmp_path):
    teacher, data = world
    settings = {"name": str(data), "max_source_tokens": 32, "max_target_tokens": 16, "selection_share": 0.5}
    run = Run.model_validate({"name": "x", "teacher": str(teacher), "dataset": settings})
    kept = read_part(run.dataset, "selection")
    assert kept is not None
    assert 0 < len(kept) < 8
    pending = PendingServing(tmp_path, str(teacher), [BEAM])
    [served] = serve_checkpoint(ServingTask(pending, run, "bleu", "validation"), "cpu", 1)
    assert served.rows == len(kept)
