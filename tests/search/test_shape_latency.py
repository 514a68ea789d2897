"""Costs of shapes: measured once, and again only if other processes disturbed the measurement."""

import json
from dataclasses import replace

import pytest

from raydistill.config.run import Dataset
from raydistill.models.teacher import open_teacher
from raydistill.search.shape_latency import ShapeTiming, count_params_m, time_shape, time_shapes
from raydistill.training.tokenized_data import select_student_tokens
from tests.factories.models import save_tiny
from tests.factories.training import make_run, write_run_workspace

TIMING = ShapeTiming(5, 3, "transformers", "fp32", beams=(1,))


def test_shape_is_timed_once_and_again_only_after_a_noisy_timing(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))
    teacher = open_teacher(str(save_tiny("bart", tmp_path / "m")), Dataset(name="demo"))
    options = {"engine": "transformers", "device": "cpu", "threads": 1}

    def timed(remeasure_noisy=True):
        [shape] = time_shape(teacher, "2-1", replace(TIMING, remeasure_noisy=remeasure_noisy), **options)
        assert shape.engine == "transformers fp32"
        return shape

    assert timed().costs["latency_ms"] < 9e9
    table = tmp_path / "home" / "latency.json"
    for background_cores, again in ((0.2, False), (3.0, True)):
        data = json.loads(table.read_text())
        assert len(data["timings"]) == 2  # batches of 32 and of 1
        for entry in data["timings"].values():
            entry["timing"] |= {"median_ms": 9e9, "background_cores": background_cores}
        table.write_text(json.dumps(data))
        assert timed(remeasure_noisy=False).costs["latency_ms"] == 9e9  # trials of a running sweep keep this timing
        shape = timed()
        assert (shape.costs["latency_ms"] < 9e9) == again
        if not again:
            assert shape.background_cores == 0.2
    assert all(entry["timing"]["median_ms"] < 9e9 for entry in json.loads(table.read_text())["timings"].values())
    # If the expected engine cannot be used, the fallback's timing is not stored
    before = json.loads(table.read_text())
    [fallback] = time_shape(teacher, "2-2", replace(TIMING, engine="ctranslate2"), **options)
    assert fallback.engine == "transformers fp32"
    assert json.loads(table.read_text()) == before


def test_a_pruned_shape_is_timed_apart_from_the_shape_with_all_units(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))
    teacher = open_teacher(str(save_tiny("bart", tmp_path / "m")), Dataset(name="demo"))
    options = {"engine": "transformers", "device": "cpu", "threads": 1}
    [full], [pruned], [same] = (
        time_shape(teacher, name, replace(TIMING, remeasure_noisy=False), **options)
        for name in ("2-1", "2-1-ffn0.5-0.25", "2-1-ffn16-8")
    )
    timings = json.loads((tmp_path / "home" / "latency.json").read_text())["timings"]
    assert len(timings) == 4  # two shapes, batches of 32 and of 1
    assert same == pruned
    # Per unit of a layer: 16 weights and a bias before the unit, and 16 weights after it
    removed = (2 * (32 - 16) + (32 - 8)) * (16 + 1 + 16) / 1e6
    assert full.costs["params_m"] - pruned.costs["params_m"] == pytest.approx(removed)
    assert count_params_m(teacher.model.config, "2-1-ffn0.5-0.25") == pruned.costs["params_m"]


def test_shapes_with_fewer_tokens_are_timed_with_these_tokens(tmp_path, monkeypatch):
    """The used tokens include those of the label set."""
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))
    workspace = write_run_workspace(tmp_path)
    student = {"size": "2-1", "vocabulary": "used"}
    data = {"name": str(workspace), "train_rows": 2}
    run = make_run(workspace, "pl", evaluation={"engine": "transformers"}, student=student, dataset=data)
    names = ["2-1", "2-1-vused", "2-1-v300"]
    folders = {"pseudo": tmp_path / "labels"}
    timed = time_shapes(run, names, TIMING, folders, device="cpu", threads=1)
    params = {name: timed[name][0].costs["params_m"] for name in names}
    teacher = open_teacher(str(workspace / "teacher"), run.dataset)
    width, tokens = teacher.model.config.d_model, teacher.model.config.vocab_size
    assert params["2-1"] - params["2-1-v300"] == pytest.approx((tokens - 300) * width / 1e6)
    assert count_params_m(teacher.model.config, "2-1-v300") == params["2-1-v300"]
    used = select_student_tokens(run, teacher.tokenizer, teacher.model.config, folders)
    assert used is not None
    assert params["2-1"] - params["2-1-vused"] == pytest.approx((tokens - len(used)) * width / 1e6)
    assert len(json.loads((tmp_path / "home" / "latency.json").read_text())["timings"]) == 6
