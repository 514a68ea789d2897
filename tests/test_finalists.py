"""Serving finalists: which, with which decodings, and that what is written and timed is what would be served."""

import json
from pathlib import Path

import numpy as np
import pytest

from raydistill.cluster.finalists import decodings, serve_checkpoint
from raydistill.config.files import write_json_atomic
from raydistill.config.run import Run
from raydistill.config.space import DecodingSearch
from raydistill.data.corpus import read_corpus
from raydistill.evaluation.checkpoint import evaluate
from raydistill.evaluation.serving import serve
from raydistill.model.decoding import Beam
from raydistill.model.generate import open_engine
from raydistill.results.records import finalists
from tests.test_tracking import make_trial
from tests.world import make_world

BEAM = Beam(4, 1.0, 0, 12, 0, False, None)


def test_every_decoding_once_the_own_first_and_no_penalty_for_one_beam():
    found = decodings(BEAM, DecodingSearch(beams=[1, 4], length_penalty=[0.6, 1.0]))
    assert [(beam.beams, beam.length_penalty) for beam in found] == [(4, 1.0), (1, 1.0), (4, 0.6)]
    assert all(beam.max_length == 12 for beam in found)
    assert decodings(BEAM, DecodingSearch(beams=[], length_penalty=[])) == [BEAM]


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
    assert [trial.key for trial in finalists(tmp_path)] == ["a", "b", "c", "d", "e"]


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

    served = serve(Counted(), corpus.sources, corpus.targets, "rouge2", BEAM, 32)
    assert sizes == [32, 32, 1, *[1] * 8]  # each kind begins with a call that is not timed
    assert served.timings["latency_ms"].repeats == 1
    assert served.timings["latency_ms_b1"].repeats == 8
    wanted = evaluate(engine, corpus.sources, corpus.targets, "rouge2", BEAM, max_source_tokens=32)
    assert served.scored.metrics == wanted.scored.metrics
    assert np.array_equal(served.scored.rows, wanted.scored.rows)


def test_a_checkpoint_is_served_with_each_decoding_and_its_rows_are_kept(world, tmp_path):
    teacher, data = world
    settings = {"name": str(data), "max_source_tokens": 32, "max_target_tokens": 16}
    run = Run.model_validate({"name": "x", "teacher": str(teacher), "dataset": settings})
    beams = decodings(BEAM, DecodingSearch(beams=[1], length_penalty=[]))
    found = serve_checkpoint(tmp_path, str(teacher), run, "bleu", beams, "validation", "cpu", 1)
    assert [one["beams"] for one in found["decodings"]] == [4, 1]
    four, one = (decoding["costs"] for decoding in found["decodings"])
    assert one["latency_ms"] < four["latency_ms"]
    assert four["latency_ms_low"] <= four["latency_ms"] <= four["latency_ms_high"]
    assert found["rows"] == 8
    assert found["hardware"]["threads"] == 1
    for name in ("b4-p1", "b1"):
        with np.load(tmp_path / f"rows-validation-{name}.npz") as kept:
            assert kept["validation"].shape == (8, 10)
