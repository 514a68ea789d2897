"""Costs of shapes: timed in pairs with the teacher; the cheapest serving only where a budget bounds a latency."""

from dataclasses import replace
from pathlib import Path

import pytest

from raydistill.config.run import Run
from raydistill.config.serving import EngineVariant
from raydistill.evaluation.paired_latency import EXCLUSION_MARGIN
from raydistill.models.teacher import open_teacher
from raydistill.search import shape_latency
from raydistill.search.serving_timing import CostBounds
from raydistill.search.shape_latency import ShapeTask, count_params_m, time_larger_shapes, time_shapes
from raydistill.training.tokenized_data import select_student_tokens
from tests.factories.models import save_tiny
from tests.factories.sweeps import paired_timing
from tests.factories.training import make_run, write_run_workspace

FP32 = [EngineVariant("fp32", "off")]


@pytest.fixture
def task(tmp_path: Path, short_timings: None) -> ShapeTask:
    """A tiny teacher with 2-3 layers, and the students 2-3 and 2-1."""
    return ShapeTask(
        run=Run.model_validate({"name": "r", "teacher": str(save_tiny("bart", tmp_path / "m")), "dataset": "demo"}),
        sizes=["2-3", "2-1"],
        label_folders={},
        source_tokens=5,
        output_tokens=3,
        precision="fp32",
        beams=2,
        threads=1,
        fewest_beams=1,
        variants=[EngineVariant("fp32", "off"), EngineVariant("fp16", "off"), EngineVariant("int8", 10)],
        bounds={"latency_ms": CostBounds(shares=(0.5,)), "latency_ms_b1": CostBounds()},
    )


def test_shapes_are_timed_in_pairs_and_their_cheapest_serving_for_the_bounded_cost(task: ShapeTask) -> None:
    table = time_shapes(task, "cpu", 1)
    assert table.teacher_size == "2-3"
    assert table.costs.keys() == {"2-3", "2-1"}
    assert table.costs["2-1"]["params_m"] < table.costs["2-3"]["params_m"]
    teacher_ms, student_ms = (table.costs[size]["latency_ms"] for size in ("2-3", "2-1"))
    assert table.costs["2-1"]["speedup"] == pytest.approx(teacher_ms / student_ms)
    assert table.engines == {"2-3": "ctranslate2 fp32", "2-1": "ctranslate2 fp32"}
    for size in ("2-3", "2-1"):  # a student may have the size of the teacher
        cheapest = table.cheapest[size]
        assert cheapest.config.beams == 1
        assert cheapest.config.precision in ("fp32", "int8")  # CTranslate2 has no fp16 on a CPU
        assert cheapest.timings.keys() == {"latency_ms"}
        assert cheapest.timings["latency_ms"].bounds == (EXCLUSION_MARGIN * 0.5,)
        assert cheapest.costs["memory_mb"] == pytest.approx(table.costs[size]["memory_mb"] / 4)  # int8


def test_a_shape_with_fewer_units_has_its_own_costs(task: ShapeTask) -> None:
    names = ["2-1", "2-1-ffn0.5-0.25", "2-1-ffn16-8"]
    costs = time_shapes(replace(task, sizes=names, variants=FP32, bounds={}), "cpu", 1).costs
    full, pruned, same = (costs[name]["params_m"] for name in names)
    assert same == pruned
    # Per unit of a layer: 16 weights and a bias before the unit, and 16 weights after it
    assert full - pruned == pytest.approx((2 * (32 - 16) + (32 - 8)) * (16 + 1 + 16) / 1e6)
    config = open_teacher(str(task.run.teacher), task.run.dataset).model.config
    assert count_params_m(config, "2-1-ffn0.5-0.25") == pruned


def test_shapes_with_fewer_tokens_are_timed_with_these_tokens(task: ShapeTask, tmp_path: Path) -> None:
    """The used tokens include those of the label set. A shortlist is made of the tokens that remain."""
    workspace = write_run_workspace(tmp_path)
    student = {"size": "2-1", "vocabulary": "used"}
    run = make_run(workspace, "pl", student=student, dataset={"name": str(workspace), "train_rows": 2})
    names, folders = ["2-1", "2-1-vused", "2-1-v300"], {"pseudo": tmp_path / "labels"}
    table = time_shapes(replace(task, run=run, sizes=names, label_folders=folders), "cpu", 1)
    params = {name: table.costs[name]["params_m"] for name in names}
    teacher = open_teacher(str(workspace / "teacher"), run.dataset)
    width, tokens = teacher.model.config.d_model, teacher.model.config.vocab_size
    assert params["2-1"] - params["2-1-v300"] == pytest.approx((tokens - 300) * width / 1e6)
    assert count_params_m(teacher.model.config, "2-1-v300") == params["2-1-v300"]
    used = select_student_tokens(run, teacher.tokenizer, teacher.model.config, folders)
    assert used is not None
    assert params["2-1"] - params["2-1-vused"] == pytest.approx((tokens - len(used)) * width / 1e6)
    assert "latency_ms" in table.cheapest["2-1-v300"].timings
    assert table.used_tokens == len(used)


@pytest.mark.parametrize(("bound", "timed"), [("100%", False), ("1%", True)])
def test_no_latency_is_compared_with_a_bound_if_a_budget_of_parameters_admits_the_shape(
    task: ShapeTask, bound: str, timed: bool
) -> None:
    task = replace(task, sizes=["2-1"], variants=FP32, weight_budgets={"any": {"params_m": bound}})
    table = time_shapes(task, "cpu", 1)
    assert bool(table.cheapest["2-1"].timings) == timed
    assert table.costs["2-1"]["latency_ms"] > 0


def test_shapes_of_used_tokens_are_timed_again_only_if_there_are_considerably_more(
    task: ShapeTask, tmp_path: Path
) -> None:
    workspace = write_run_workspace(tmp_path)
    run = make_run(workspace, "pl", student={"size": "2-1", "vocabulary": "used"})
    folders = {"pseudo": tmp_path / "labels"}
    task = replace(task, run=run, sizes=["2-1-vused"], variants=FP32, label_folders=folders, bounds={})
    teacher = open_teacher(str(workspace / "teacher"), run.dataset)
    used = select_student_tokens(run, teacher.tokenizer, teacher.model.config, task.label_folders)
    assert used is not None
    assert time_larger_shapes(task, round(len(used) / 1.01), "cpu", 1) is None
    table = time_larger_shapes(task, round(len(used) / 1.03), "cpu", 1)
    assert table is not None
    assert table.used_tokens == len(used)
    assert "latency_ms" in table.costs["2-1-vused"]


def test_of_many_shapes_some_are_timed_and_the_others_predicted(
    task: ShapeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Far from a bound, a prediction decides whether the shape is excluded; near a bound, the shape is timed."""
    monkeypatch.setattr(shape_latency, "MAX_TIMED_SHAPES", 4)
    # Real timings may be noisy, and then predict nothing
    timing = paired_timing(0.7, (0.69, 0.71))
    monkeypatch.setattr(shape_latency, "time_pairs", lambda *_: timing)
    sizes = [f"{size}{units}" for size in ("2-3", "2-1") for units in ("", "-ffn1-0.5", "-ffn1-0.25")]
    far = replace(task, sizes=sizes, variants=FP32, bounds={"latency_ms": CostBounds(shares=(0.001, 100.0))})
    table = time_shapes(far, "cpu", 1)
    assert len(table.predicted) == len(sizes) - 5  # the shape of the teacher is timed too
    assert table.costs.keys() == table.cheapest.keys() == table.engines.keys() == set(sizes)
    assert table.prediction_error == pytest.approx(0.0, abs=1e-9)
    config = open_teacher(str(task.run.teacher), task.run.dataset).model.config
    for name in table.predicted:
        assert table.costs[name]["params_m"] == count_params_m(config, name)
        assert table.costs[name].keys() == table.costs["2-1-ffn1-0.25"].keys()
        assert table.cheapest[name].ratios == pytest.approx({"latency_ms": 0.7})
        assert table.is_infeasible(name, {"tiny": {"latency_ms": "0.1%"}})
        assert not table.is_infeasible(name, {"large": {"latency_ms": "10000%"}})

    monkeypatch.setattr(shape_latency, "MAX_TIMED_SHAPES", 2)
    bounds = {"latency_ms": CostBounds(shares=(0.7 / EXCLUSION_MARGIN,))}
    near = time_shapes(replace(far, sizes=[size for size in sizes if size.startswith("2-1")], bounds=bounds), "cpu", 1)
    assert near.predicted == ()
    assert near.prediction_error is None

    noisy = paired_timing(0.7).model_copy(update={"ratio": None})
    monkeypatch.setattr(shape_latency, "time_pairs", lambda *_: noisy)
    assert time_shapes(replace(far, sizes=sizes[3:]), "cpu", 1).predicted == (), "noisy timings predict nothing"
