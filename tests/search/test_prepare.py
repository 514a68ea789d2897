"""Which sizes a sweep does not train, because no budget admits them even with their cheapest serving."""

from pathlib import Path

import pytest

from raydistill.config.serving import ServingConfig
from raydistill.config.space import Space, make_run, shape_runs
from raydistill.core.errors import UserError
from raydistill.jobs import run_inputs
from raydistill.results.sweep_record import CheapestServing, ShapeTable
from raydistill.search import prepare
from raydistill.search.prepare import (
    PreparedSweep,
    _shape_names,
    check_budgets,
    describe_shapes,
    find_infeasible_sizes,
)
from tests.factories.sweeps import make_space, paired_timing, shape_table, sweep_teacher

COSTS = {"2-3": {"latency_ms": 90.0}, "2-1": {"latency_ms": 50.0}}


def test_a_size_is_infeasible_only_if_its_cheapest_serving_is_above_the_bound_by_a_margin():
    """The interval of 2-3 begins at 0.99 * 45 ms, which is 1.3 times 34.3 ms or 38.1 % of the teacher's 90 ms."""
    shapes = shape_table(COSTS, {"2-3": {"latency_ms": 45.0}, "2-1": {"latency_ms": 30.0}})
    for bound, infeasible in ((45, set()), (35, set()), ("39%", set()), (34, {"2-3"}), ("37%", {"2-3"})):
        space = make_space().model_copy(update={"budgets": {"fast": {"latency_ms": bound}}})
        assert find_infeasible_sizes(space, shapes) == infeasible


def test_a_size_whose_interval_reaches_the_margin_or_is_unknown_is_trained():
    def table(interval: tuple[float, float] | None) -> ShapeTable:
        timing = paired_timing(0.8).model_copy(update={"interval": interval})
        config = ServingConfig(beams=1, length_penalty=1.0)
        serving = CheapestServing(config=config, engine="e", timings={"latency_ms": timing}, costs={})
        return shape_table(COSTS, cheapest={"2-3": serving, "2-1": serving})

    budgets = {"fast": {"latency_ms": "50%"}}
    assert table((0.7, 0.9)).is_infeasible("2-1", budgets)
    assert not table((0.6, 0.9)).is_infeasible("2-1", budgets)
    assert not table(None).is_infeasible("2-1", budgets)


def test_the_refusal_of_unreachable_budgets_names_the_nearest_shape_and_its_figure(capsys):
    costs = {"2-3": {"latency_ms": 90.0, "params_m": 5.0}, "2-1": {"latency_ms": 60.0, "params_m": 4.0}}
    shapes = shape_table(costs)
    budgets = {"small": {"params_m": 2.0}, "fast": {"latency_ms": 40.0, "params_m": 4.5}}
    with pytest.raises(UserError, match=r"the nearest is 2-1 for fast: latency_ms 60 \(50.0% over\)\. Raise a budget"):
        check_budgets(make_space().model_copy(update={"budgets": budgets}), ["2-1", "2-3"], shapes)
    assert capsys.readouterr().err == ""
    budgets["fast"]["latency_ms"] = 60.0
    check_budgets(make_space().model_copy(update={"budgets": budgets}), ["2-1", "2-3"], shapes)
    assert capsys.readouterr().err == "no budget admits 2-3: students of these sizes are not trained\n"


def test_a_shape_timed_with_another_engine_is_reported_and_not_excluded_by_its_latency(capsys):
    """CTranslate2 timed the teacher, but could not be used for 2-1, whose time is of a slower engine."""
    costs = {"2-3": {"latency_ms": 90.0, "params_m": 5.0}, "2-1": {"latency_ms": 300.0, "params_m": 4.0}}
    cheapest = {"2-3": costs["2-3"], "2-1": {"params_m": 4.0}}  # without a comparison of two engines
    table = shape_table(costs, cheapest, engines={"2-3": "ctranslate2 fp32", "2-1": "transformers fp32"})
    describe_shapes(table)
    assert "2-1: timed with transformers fp32 instead of ctranslate2 fp32; these times exclude no size" in (
        capsys.readouterr().err
    )
    assert table.is_infeasible("2-3", {"fast": {"latency_ms": "50%"}})
    assert not table.is_infeasible("2-1", {"fast": {"latency_ms": "50%"}})
    assert table.is_infeasible("2-1", {"small": {"params_m": 3.0}})


def pruned_space(decoder_ffn: dict) -> Space:
    """A space of two sizes with all units or a choice of units of the decoder."""
    student = {"size": {"choice": ["2-3", "2-1"]}, "decoder_ffn": decoder_ffn}
    run = {"teacher": "t", "dataset": "d", "method": "kd", "student": student}
    return Space.model_validate({"name": "s", "run": run, "budgets": {"fast": {"latency_ms": 50}}})


def test_shapes_with_fewer_units_are_infeasible_by_their_own_costs():
    costs = {"2-3": 90.0, "2-3-ffn1-0.25": 60.0, "2-1": 70.0, "2-1-ffn1-0.25": 45.0}
    shapes = shape_table({name: {"latency_ms": value} for name, value in costs.items()})
    space = pruned_space({"choice": [None, 0.25]})
    # The bound is 50 ms, and 65 ms with the margin
    assert find_infeasible_sizes(space, shapes) == {"2-3", "2-1"}


def test_a_trial_has_the_costs_of_its_shape_or_of_a_fit_between_the_ends_of_a_range(tmp_path):
    costs = {"2-3": 90.0, "2-1": 55.0, "2-1-ffn1-0.5": 45.0}
    shapes = shape_table({name: {"latency_ms": value} for name, value in costs.items()}, teacher_size="2-3")
    prepared = PreparedSweep(sweep_teacher(size="2-3"), shapes)
    space = pruned_space({"uniform": [0.5, 1.0]})

    def latency(**student) -> float:
        params = {"student.size": "2-1", **student}
        return prepared.inputs(make_run(space, params, "r"), 0, params).costs["latency_ms"]

    assert latency(**{"student.decoder_ffn": 0.5}) == 45.0
    assert latency(**{"student.decoder_ffn": 0.75}) == pytest.approx(50.0)
    assert latency(**{"student.decoder_ffn": 1.0}) == 55.0
    assert latency(**{"student.size": "2-3", "student.decoder_ffn": 1.0}) == 90.0


def test_the_teachers_shape_is_timed_first_and_then_the_others_from_large_to_small():
    assert _shape_names(shape_runs(pruned_space({"choice": [None, 0.5, 0.25]})), "6-6") == [
        *("6-6", "2-3", "2-3-ffn1-0.5", "2-3-ffn1-0.25", "2-1", "2-1-ffn1-0.5", "2-1-ffn1-0.25")
    ]


@pytest.mark.parametrize("vocabulary", [None, "used"])
def test_unreachable_budgets_are_refused_before_any_label_or_cache_is_made(
    vocabulary: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The functions of the jobs fail, so the refusal can only come before them."""
    student = {"size": {"choice": ["2-3", "2-1"]}, "vocabulary": vocabulary}
    run = {"teacher": "t", "dataset": "d", "method": "pl", "student": student}
    space = Space.model_validate({"name": "s", "run": run, "budgets": {"small": {"params_m": 0.1}}})
    suffix = "-vused" if vocabulary else ""
    costs = {name: {"latency_ms": 90.0, "params_m": 5.0} for name in ("4-4", f"2-3{suffix}", f"2-1{suffix}")}
    table = shape_table(costs, engines=dict.fromkeys(costs, "ctranslate2 fp32"))

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("labels or a cache would be made")

    monkeypatch.setattr(run_inputs, "pseudolabel", fail)
    monkeypatch.setattr(run_inputs, "build_teacher_cache", fail)
    monkeypatch.setattr(prepare, "prepare_shared_inputs", fail)
    monkeypatch.setattr(prepare, "_score_teacher", lambda *_: sweep_teacher())
    monkeypatch.setattr(prepare, "run_exclusive", lambda *_, **__: table)
    with pytest.raises(UserError, match="no size of the space fits any of its budgets"):
        prepare.prepare(space, tmp_path, "cpu")


def test_shapes_of_another_session_keep_their_ratio_to_the_teacher():
    """2-1 takes half of the teacher's 100 ms in the second session: 45 of the 90 ms that the first session measured."""
    first = shape_table(COSTS | {"2-1-vused": {"latency_ms": 40.0, "params_m": 1.0}}, used_tokens=900)
    second = shape_table(
        {"2-3": {"latency_ms": 100.0}, "2-1-vused": {"latency_ms": 50.0, "params_m": 2.0, "speedup": 2.0}},
        used_tokens=1000,
    )
    merged = first.with_shapes_of(second)
    assert merged.costs["2-1-vused"] == pytest.approx({"latency_ms": 45.0, "params_m": 2.0, "speedup": 2.0})
    assert merged.used_tokens == 1000
    assert merged.costs["2-1"] == first.costs["2-1"]
    assert merged.teacher_costs == first.teacher_costs
    assert merged.cheapest_costs("2-1-vused") == pytest.approx({"latency_ms": 45.0, "params_m": 2.0, "speedup": 2.0})
