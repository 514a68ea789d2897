"""Costs of shapes that were not measured."""

import pytest

from raydistill.config.shapes import Shape
from raydistill.results.shape_costs import prediction_errors, select_spread_shapes, shape_costs


def linear_costs(encoder: float, decoder: float) -> dict[str, float]:
    """The latency of an invented student: 10 ms, and 4 and 6 ms for all units of encoder and decoder."""
    latency = 10 + 4 * encoder + 6 * decoder
    return {"latency_ms": latency, "params_m": 1 + encoder + 2 * decoder, "speedup": 40 / latency}


CORNERS = {
    "6-3": linear_costs(1, 1),
    "6-3-ffn0.5-1": linear_costs(0.5, 1),
    "6-3-ffn1-0.25": linear_costs(1, 0.25),
    "6-3-ffn0.5-0.25": linear_costs(0.5, 0.25),
    "6-1": {"latency_ms": 99.0, "params_m": 9.0, "speedup": 1.0},
}


def test_measured_costs_are_returned_unchanged():
    assert shape_costs(CORNERS, Shape.parse("6-1")) == CORNERS["6-1"]


def test_costs_between_measured_shapes_are_linear_in_the_units():
    assert shape_costs(CORNERS, Shape("6-3", 0.75, 0.5)) == pytest.approx(linear_costs(0.75, 0.5))
    one_side = {name: CORNERS[name] for name in ("6-3-ffn0.5-1", "6-3-ffn0.5-0.25")}
    assert shape_costs(one_side, Shape("6-3", 0.5, 0.5)) == pytest.approx(linear_costs(0.5, 0.5))


def test_numbers_of_units_are_fitted_apart_from_shares():
    costs = {"6-3": linear_costs(1, 1), "6-3-ffn1-256": linear_costs(1, 0.25), "6-3-ffn1-1024": linear_costs(1, 1)}
    assert shape_costs(costs, Shape("6-3", None, 640)) == pytest.approx(linear_costs(1, 0.625))


def test_costs_are_linear_in_a_number_of_tokens():
    costs = {"6-3": {"ms": 100.0}, "6-3-vused": {"ms": 50.0}, "6-3-v4000": {"ms": 20.0}, "6-3-v8000": {"ms": 30.0}}
    assert shape_costs(costs, Shape("6-3", vocabulary=6000)) == pytest.approx({"ms": 25.0})
    assert shape_costs(costs, Shape("6-3", vocabulary="used")) == {"ms": 50.0}
    assert shape_costs({"6-3": {"ms": 100.0}}, Shape("6-3", vocabulary="used")) == {}


def test_without_a_comparable_shape_there_are_no_costs():
    same_layers = {name: costs for name, costs in CORNERS.items() if name != "6-1"}
    assert shape_costs(same_layers, Shape("6-2", 0.5, 0.5)) == {}
    assert shape_costs({"6-3": CORNERS["6-3"]}, Shape("6-3", None, 512)) == {}


SIZES = ("6-6", "6-3", "6-2", "6-1", "3-3", "2-2", "3-1")
SHAPES = [Shape(size, encoder, decoder) for size in SIZES for encoder in (None, 0.25) for decoder in (None, 0.5)]


def sum_of_parts(shape: Shape) -> float:
    """An invented latency: 5 ms, 1 ms per encoder layer, 7 ms per decoder layer, 2 and 3 ms for all of their units."""
    encoder, decoder = map(int, shape.size.split("-"))
    return 5 + encoder * (1 + 2 * (shape.encoder_ffn or 1)) + decoder * (7 + 3 * (shape.decoder_ffn or 1))


def test_few_measured_shapes_predict_the_others_of_a_space():
    names = [shape.name for shape in SHAPES]
    selected = select_spread_shapes(names, 10)
    assert len(set(selected)) == 10
    measured = {name: {"latency_ms": sum_of_parts(Shape.parse(name))} for name in selected}
    for shape in SHAPES:
        assert shape_costs(measured, shape) == pytest.approx({"latency_ms": sum_of_parts(shape)})
    errors = prediction_errors({name: costs["latency_ms"] for name, costs in measured.items()})
    assert errors.keys() == set(selected)
    assert all(abs(error) < 1e-9 for error in errors.values())


def test_error_of_a_prediction_is_that_of_a_fit_without_the_shape():
    """Three points of a line with the middle one raised by 10: its neighbours predict 30 there instead of 40."""
    errors = prediction_errors({"6-1": 20.0, "6-2": 40.0, "6-3": 40.0})
    assert errors["6-2"] == pytest.approx(30 / 40 - 1)
    assert errors["6-1"] == pytest.approx(40 / 20 - 1)
    assert prediction_errors({"6-1": 20.0, "6-2": 40.0}) == {}


def test_all_shapes_are_selected_where_there_are_no_more():
    assert set(select_spread_shapes(["6-3", "6-1"], 10)) == {"6-3", "6-1"}


def test_selected_shapes_predict_those_of_each_kind_of_tokens():
    """Shapes with all, with used and with a number of tokens are not comparable; each kind has its own fit."""
    shapes = [
        Shape(size, encoder, None, tokens)
        for size in ("12-6", "12-3", "12-1")
        for encoder in (None, 0.5, 0.25)
        for tokens in (None, "used", 30_000, 8_000)
    ]
    selected = select_spread_shapes([shape.name for shape in shapes], 14)
    measured = {name: {"latency_ms": sum_of_parts(Shape.parse(name))} for name in selected}
    assert all(shape_costs(measured, shape) for shape in shapes)
