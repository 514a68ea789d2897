"""Serving finalists: which, with which decodings, and that what is written and timed is what would be served."""

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from raydistill.config.run import Run
from raydistill.config.space import DecodingSearch, Search, Space
from raydistill.core.files import write_json_atomic
from raydistill.data.corpus import read_corpus
from raydistill.evaluation.scoring import evaluate
from raydistill.evaluation.serving import benchmark_serving
from raydistill.inference.decoding import BeamSearchParams
from raydistill.inference.engines import open_engine
from raydistill.results.page import make_tooltips
from raydistill.results.plots import marker_id
from raydistill.results.records import decoding_key
from raydistill.results.selection import load_selection, select_finalists
from raydistill.results.served_students import read_served
from raydistill.results.tables import trials_table
from raydistill.search.finalists import decoding_grid, find_unserved, find_untested, merge_served, serve_checkpoint
from raydistill.search.study import StopReason
from raydistill.search.sweep import search_stop_reason
from tests.factories.sweeps import make_trial
from tests.factories.workspace import make_world

BEAM = BeamSearchParams(4, 1.0, 0, 12, 0, False, None)


def test_every_decoding_once_the_own_first_and_no_penalty_for_one_beam():
    found = decoding_grid(BEAM, DecodingSearch(beams=[1, 4], length_penalty=[0.6, 1.0]))
    assert [(beam.beams, beam.length_penalty) for beam in found] == [(4, 1.0), (1, 1.0), (4, 0.6)]
    assert all(beam.max_length == 12 for beam in found)
    assert decoding_grid(BEAM, DecodingSearch(beams=[], length_penalty=[])) == [BEAM]


def test_finalists_are_on_a_front_or_chosen(tmp_path: Path):
    """a and b are the front of latency, c of parameters, d of device-hours, e is chosen, f is nothing.

    No budget bounds parameters or device-hours alone: that is for a later `choose`.
    """
    info = {"name": "m", "metric": "rouge2", "teacher": {"costs": {}}}
    info["budgets"] = {"both": {"params_m": 2.5, "latency_ms": 55}}
    write_json_atomic(tmp_path / "sweep.json", info)
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
        path = make_trial(tmp_path, key, number, score) / "result.json"
        result = json.loads(path.read_text())
        result["metrics"] |= {"latency_ms": latency, "params_m": params, "gpu_hours": hours}
        write_json_atomic(path, result)
        np.savez(path.parent / "rows.npz", validation=np.full(20, score))
    assert [trial.key for trial in select_finalists(tmp_path)] == ["a", "b", "c", "d", "e"]


def finished_sweep(folder: Path, teacher: Path, data: Path) -> tuple[Space, dict]:
    """A sweep of one finished trial, of which nothing was served, and the teacher's record."""
    space = Space.model_validate(
        {"name": "m", "run": {"teacher": str(teacher), "dataset": {"name": str(data)}}, "search": {"trials": 1}}
    )
    record = {"costs": {}, "decoding": asdict(BEAM), "data": {"validation": "v", "test": "t"}, "metric": "rouge2"}
    info = {"name": "m", "metric": "rouge2", "teacher": record, "budgets": {}}
    write_json_atomic(folder / "sweep.json", {**info, "decoding": space.search.decoding.model_dump()})
    card = make_trial(folder, "a", 0, 10.0) / "best" / "raydistill.json"
    write_json_atomic(card, {"decoding": asdict(BEAM)})
    return space, record


HERE = {"kind": "cpu", "name": "a", "cores": 2, "threads": 2}
BY = {"engine": "transformers fp32", "version": version("transformers")}


def serve_by_hand(folder: Path, beams: list[BeamSearchParams], hardware: dict | None = None, **more: object) -> None:
    entries = [
        {"beams": b.beams, "length_penalty": b.length_penalty, "metrics": {"rouge2": 1.0}, "interval": [0, 2]}
        | {"costs": {"latency_ms": 5.0 * b.beams}, **BY, "hardware": hardware or HERE, **more}
        for b in beams
    ]
    merge_served(folder, entries)


def test_what_is_left_to_serve_is_seen_from_the_files(world, tmp_path):
    """After the last trial, after a kill in between, and for a decoding that was asked for later."""
    space, teacher = finished_sweep(tmp_path, *world)
    student = tmp_path / "trials" / "a"
    assert search_stop_reason(space, tmp_path) == StopReason()
    assert [one.folder for one in find_unserved(space, tmp_path, teacher, HERE)] == [tmp_path, student]
    beams = decoding_grid(BEAM, space.search.decoding)
    serve_by_hand(tmp_path, beams)
    assert [one.folder for one in find_unserved(space, tmp_path, teacher, HERE)] == [student]
    serve_by_hand(student, beams)
    assert find_unserved(space, tmp_path, teacher, HERE) == []
    assert [one.key for one in find_untested(tmp_path, teacher)] == ["a b1"]  # equal scores: one beam is the cheapest
    assert find_untested(tmp_path, {**teacher, "data": {"validation": "v"}}) == []
    more = space.model_copy(update={"search": Search(trials=1, decoding=DecodingSearch(beams=[3], length_penalty=[]))})
    assert find_unserved(more, tmp_path, teacher, HERE) == []  # without a length penalty there is nothing new
    more = space.model_copy(update={"search": Search(trials=1, decoding=DecodingSearch(beams=[3]))})
    left = find_unserved(more, tmp_path, teacher, HERE)
    assert [one.folder for one in left] == [tmp_path, student]
    assert {beam.beams for one in left for beam in one.beams} == {3}


def test_timings_are_of_one_machine_and_engine_and_those_of_others_are_kept(world, tmp_path):
    space, teacher = finished_sweep(tmp_path, *world)
    student = tmp_path / "trials" / "a"
    beams = decoding_grid(BEAM, space.search.decoding)
    for folder in (tmp_path, student):
        serve_by_hand(folder, beams)
    there = {**HERE, "name": "b"}
    known = {"kind": "cpu", "name": "a"}  # before Ray is started, less is known
    assert find_unserved(space, tmp_path, teacher, {}) == find_unserved(space, tmp_path, teacher, known) == []
    assert [one.beams for one in find_unserved(space, tmp_path, teacher, there)] == [beams, beams]
    for folder in (tmp_path, student):
        serve_by_hand(folder, beams, there, costs={"latency_ms": 50.0})
    for machine in (HERE, there):
        assert find_unserved(space, tmp_path, teacher, machine) == []
    assert {one.metrics["latency_ms"] for one in load_selection(tmp_path).students} == {
        20.0,
        5.0,
        10.0,
    }  # still of the first
    served = json.loads((tmp_path / "served.json").read_text())
    write_json_atomic(tmp_path / "served.json", {**served, "hardware": there})
    assert {one.metrics["latency_ms"] for one in load_selection(tmp_path).students} == {50.0}
    serve_by_hand(student, beams, version="0.1")
    assert [one.folder for one in find_unserved(space, tmp_path, teacher, HERE)] == [student]
    assert len(read_served(student)) == 2 * len(beams)


def test_a_speed_up_is_over_the_teachers_own_decoding_and_over_the_same(world, tmp_path):
    finished_sweep(tmp_path, *world)
    student = tmp_path / "trials" / "a"
    beams = decoding_grid(BEAM, DecodingSearch(beams=[1], length_penalty=[]))
    serve_by_hand(tmp_path, beams)  # 20 ms with its own four beams, 5 ms with one
    serve_by_hand(student, beams, costs={"latency_ms": 2.5})
    found = {one.decoding["beams"]: one.metrics for one in load_selection(tmp_path).students}
    assert {n: (m["speedup"], m["speedup_same_decoding"]) for n, m in found.items()} == {4: (8, 8), 1: (8, 2)}
    header, rows = trials_table(load_selection(tmp_path).students, [], {}, "rouge2")
    assert [row[header.index("speed-up (same decoding)")] for row in rows] == ["8.00x (8.00x)", "8.00x (2.00x)"]


def test_students_of_one_shape_and_as_many_beams_are_as_fast_as_their_median(world, tmp_path):
    """Table, front, choice and picture: 100.0 and 99.5 ms are no difference, whatever the length penalty, and 40 is."""
    _, record = finished_sweep(tmp_path, *world)
    info = {"name": "m", "metric": "rouge2", "teacher": record, "budgets": {"fast": {"latency_ms": "50%"}}}
    write_json_atomic(tmp_path / "sweep.json", info)
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
        np.savez(folder / f"rows-validation-{decoding_key(asdict(beam))}.npz", validation=np.full(20, score))
    found = load_selection(tmp_path)
    assert {one.key: one.metrics["latency_ms"] for one in found.students} == {
        **{key: 100.0 for key in ("a b4-p1", "b b4-p1", "b b4-p0.6")},
        "b b1": 40.0,
    }
    assert found.front_keys == ["b b1", "b b4-p0.6"]
    assert found.chosen_keys == {"fast": "b b4-p0.6"}
    assert {one.metrics["speedup"] for one in found.students} == {3.0, 7.5}
    assert found.student("b b4-p0.6").metrics["latency_ms_unpooled"] == 107.0
    assert "latency_ms_unpooled" not in found.student("b b1").metrics
    told = ", ".join(make_tooltips(found)[marker_id("b b4-p0.6")])
    assert "100.0 ms for a batch of 32, 107.0 ms in its own measurement" in told


def test_a_search_that_cannot_go_on_is_not_started_again_unless_other_budgets_may_admit_more(world, tmp_path):
    space, _ = finished_sweep(tmp_path, *world)
    more = space.model_copy(update={"search": Search(trials=9)})
    assert search_stop_reason(more, tmp_path) is None
    info = json.loads((tmp_path / "sweep.json").read_text())
    write_json_atomic(tmp_path / "sweep.json", {**info, "ended": {"why": "all tried", "exhausted": True}})
    assert search_stop_reason(more, tmp_path) == StopReason("all tried", exhausted=True)
    assert search_stop_reason(more.model_copy(update={"budgets": {"b": {"params_m": 9}}}), tmp_path) is None
    fewer = Search(trials=9, decoding=DecodingSearch(beams=[1]))
    assert search_stop_reason(more.model_copy(update={"search": fewer}), tmp_path) is None
    write_json_atomic(tmp_path / "sweep.json", {**info, "ended": {"why": "one hour is used up", "exhausted": False}})
    assert search_stop_reason(more, tmp_path) is None


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def test_batches_have_32_rows_and_the_texts_are_those_of_an_evaluation(world):
    """8 rows: one batch of 32, filled up, and 8 single rows; scores are of the 8."""
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
    assert sizes == [32, 32, 1, *[1] * 8]  # each kind begins with a call that is not timed
    assert served.timings["latency_ms"].repeats == 1
    assert served.timings["latency_ms_b1"].repeats == 8
    wanted = evaluate(engine, corpus, "rouge2", BEAM, max_source_tokens=32)
    assert served.scores.metrics == wanted.scores.metrics
    assert np.array_equal(served.scores.row_stats, wanted.scores.row_stats)


def test_a_checkpoint_is_served_with_each_decoding_and_its_rows_are_kept(world, tmp_path):
    teacher, data = world
    settings = {"name": str(data), "max_source_tokens": 32, "max_target_tokens": 16}
    run = Run.model_validate({"name": "x", "teacher": str(teacher), "dataset": settings})
    beams = decoding_grid(BEAM, DecodingSearch(beams=[1], length_penalty=[]))
    found = serve_checkpoint(tmp_path, str(teacher), run, "bleu", beams, "validation", "cpu", 1)
    assert [one["beams"] for one in found] == [4, 1]
    four, one = (decoding["costs"] for decoding in found)
    assert one["latency_ms"] < four["latency_ms"]
    assert four["latency_ms_low"] <= four["latency_ms"] <= four["latency_ms_high"]
    for served in found:
        assert served["rows"] == 8
        assert served["hardware"]["threads"] == 1
        assert served["engine"].split()[0] in ("ctranslate2", "transformers")
        assert served["version"] == version(served["engine"].split()[0])
    for name in ("b4-p1", "b1"):
        with np.load(tmp_path / f"rows-validation-{name}.npz") as kept:
            assert kept["validation"].shape == (8, 10)
