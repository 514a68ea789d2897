"""Distributions: encoding of choices, and the requests to a sampler."""

import pytest

from raydistill.config.corners import iter_corners
from raydistill.config.distributions import decode_choice, encode_choice, suggest_params
from tests.factories.spaces import RUN, space_error, write_space


def test_overlapping_cases_are_rejected(tmp_path):
    run = {**RUN, "training": {"learning_rate": {"cases": [{"choice": [0.1]}, {"choice": [0.5]}]}}}
    assert "training.learning_rate: two cases apply at once" in space_error(
        write_space(tmp_path, {"name": "x", "run": run})
    )


@pytest.mark.parametrize("value", ["", "[odd", "{", '"quoted', "plain", 3, None, True, [1, 2], {"a": [1]}, "[1]"])
def test_choice_encoding_round_trip(value):
    assert decode_choice(encode_choice(value)) == value
    assert isinstance(encode_choice(value), str | int | float | bool | None)
    run = {**RUN, "labels": {"choice": [value]}}
    assert list(iter_corners(run)) == [{"labels": value}]


def test_parameters_are_suggested_by_name_and_kind():
    requests: list[tuple] = []

    class Trial:
        def suggest_categorical(self, name, choices):
            requests.append((name, choices))
            return choices[-1]

        def suggest_float(self, name, low, high, *, log=False):
            requests.append((name, low, high, log))
            return high

        def suggest_int(self, name, low, high):
            requests.append((name, low, high))
            return low

    run = {
        **RUN,
        "method": {"choice": ["sft"]},
        "loss": {"temperature": {"uniform": [1, 4]}},
        "training": {"learning_rate": {"log_uniform": [1e-5, 1e-3]}, "epochs": {"int": [1, 9]}},
    }
    params = suggest_params(run, Trial())
    assert params == {"method": "sft", "loss.temperature": 4, "training.learning_rate": 1e-3, "training.epochs": 1}
    assert requests == [
        ("method", ["sft"]),
        ("loss.temperature", 1.0, 4.0, False),
        ("training.learning_rate", 1e-5, 1e-3, True),
        ("training.epochs", 1, 9),
    ]
