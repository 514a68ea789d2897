"""Enumeration of corners, and points of a space."""

import pytest

from raydistill.config.corners import iter_corners, resolve_point
from raydistill.config.space import sampler_params
from tests.factories.spaces import RUN, space_error, write_space


def test_corners_are_all_combinations_of_choices_and_range_bounds():
    run = {**RUN, "method": {"choice": ["sft", "kd"]}, "training": {"learning_rate": {"log_uniform": [1e-4, 1e-3]}}}
    assert list(iter_corners(run)) == [
        {"method": "sft", "training.learning_rate": 1e-4},
        {"method": "sft", "training.learning_rate": 1e-3},
        {"method": "kd", "training.learning_rate": 1e-4},
        {"method": "kd", "training.learning_rate": 1e-3},
    ]


def test_corners_contain_a_parameter_only_where_its_condition_is_true():
    run = {
        **RUN,
        "loss": {"alpha_hidden": {"choice": [1, 3], "when": {"method": "kd"}}},  # listed before `method`
        "method": {"choice": ["sft", "kd", "pl"]},
        "training": {"epochs": {"int": [2, 2], "when": {"method": ["sft", "pl"]}}},
    }
    assert sorted(map(str, iter_corners(run))) == sorted(
        map(
            str,
            [
                {"method": "sft", "training.epochs": 2},
                {"method": "kd", "loss.alpha_hidden": 1},
                {"method": "kd", "loss.alpha_hidden": 3},
                {"method": "pl", "training.epochs": 2},
            ],
        )
    )


def test_condition_on_a_fixed_value_of_the_run():
    run = {**RUN, "method": "kd", "loss": {"alpha_hidden": {"choice": [1], "when": {"method": "kd"}}}}
    assert list(iter_corners(run)) == [{"loss.alpha_hidden": 1}]
    assert list(iter_corners({**run, "method": "sft"})) == [{}]


CASES = {
    **RUN,
    "method": {"choice": ["sft", "kd"]},
    "training": {
        "learning_rate": {
            "cases": [
                {"uniform": [0.1, 0.2], "when": {"method": "sft"}},
                {"choice": [0.5], "when": {"method": "kd"}},
            ]
        }
    },
}


def test_cases_give_a_key_one_distribution_per_condition():
    assert list(iter_corners(CASES)) == [
        {"method": "sft", "training.learning_rate": 0.1},
        {"method": "sft", "training.learning_rate": 0.2},
        {"method": "kd", "training.learning_rate": 0.5},
    ]
    # The sampler models the cases separately, so they have different names.
    params = sampler_params(CASES, {"method": "kd", "training.learning_rate": 0.5})
    assert params == {"method": "kd", "training.learning_rate@1": 0.5}


def test_conditions_may_be_chained():
    run = {
        **RUN,
        "loss": {
            "normalize_hidden": {"choice": [True, False], "when": {"loss.alpha_hidden": 3}},
            "alpha_hidden": {"choice": [1, 3], "when": {"method": "kd"}},
        },
        "method": {"choice": ["sft", "kd"]},
    }
    assert list(iter_corners(run)) == [
        {"method": "sft"},
        {"method": "kd", "loss.alpha_hidden": 1},
        {"method": "kd", "loss.alpha_hidden": 3, "loss.normalize_hidden": True},
        {"method": "kd", "loss.alpha_hidden": 3, "loss.normalize_hidden": False},
    ]


def test_corners_above_the_limit_are_sampled():
    run = {**RUN, "training": {f"x{i}": {"int": [0, 1]} for i in range(10)}}
    corners = list(iter_corners(run, limit=50))
    assert len(corners) == 100
    assert all(set(c.values()) <= {0, 1} and len(c) == 10 for c in corners)
    assert len(list(iter_corners(run, limit=1024))) >= 1024


def test_point_is_completed_with_first_choices_and_lower_bounds():
    assert resolve_point(CASES, {"method": "kd"}) == {"method": "kd", "training.learning_rate": 0.5}
    assert resolve_point(CASES, {"training.learning_rate": 0.15}) == {"method": "sft", "training.learning_rate": 0.15}


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"method": "pl"}, "method 'pl' is not one of"),
        ({"training.learning_rate": 0.3}, "0.3 is not within [0.1, 0.2]"),
        ({"training.learning_rat": 0.15}, "training.learning_rat is not an active parameter"),
    ],
)
def test_point_outside_the_space_is_rejected(point, message, tmp_path):
    path = write_space(tmp_path, {"name": "x", "run": CASES, "points": [point]})
    assert message in space_error(path)
    assert str(path) in space_error(path)
