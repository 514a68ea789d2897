"""Positions of sizes, numbers and ranges, and a study whose sampler sees them."""

import math
from pathlib import Path

import pytest

from benchmarks.numeric_study import MultivariateStudy, NumericStudy, NumericTrial, choice_positions, sampler_positions
from raydistill.config.corners import iter_corners
from raydistill.config.distributions import suggest_params
from raydistill.config.space import Space
from raydistill.search.study import Proposal

SPACE = Space.model_validate(
    {
        "name": "s",
        "run": {
            "teacher": "t",
            "dataset": "d",
            "method": {"choice": ["sft", "pl"]},
            "student": {"size": {"choice": ["4-4", "4-1", "2-2"]}, "decoder_ffn": {"choice": [None, 0.5, 0.25]}},
            "training": {
                "batch_size": {"int": [8, 11]},
                "learning_rate": {
                    "cases": [
                        {"log_uniform": [1e-4, 1e-2], "when": {"student.size": ["4-4", "2-2"]}},
                        {"log_uniform": [1e-3, 1e-1], "when": {"student.size": "4-1"}},
                    ]
                },
            },
        },
    }
)


def test_layers_are_two_logarithmic_axes_and_shares_are_one():
    assert choice_positions(["4-4", "4-1", "2-2"]) == [(1, 1), (1, 0), (0, 0.5)]
    assert choice_positions([None, 0.5, 0.25]) == [(1,), (0.5,), (0,)]
    assert choice_positions(["6-3", "6-1"]) == [(1,), (0,)]  # the encoders are equal


@pytest.mark.parametrize(
    "choices", [["sft", "pl"], ["[0, 1]", "[0, 3]"], [False, True], [0, 1], ["6-3"], [None, "used"]]
)
def test_other_choices_have_no_positions(choices):
    assert choice_positions(choices) is None


class RecordedTrial:
    """Suggests given values by name."""

    def __init__(self, values):
        self.values = values

    def suggest_categorical(self, name, choices):
        return self.values[name]

    def suggest_float(self, name, low, high, *, log=False):
        assert (low, high, log) == (0, 1, False)
        return self.values[name]


def test_a_range_is_a_position_that_all_cases_share():
    params = {"method": "pl", "student.size": "4-1", "student.decoder_ffn": 0.5, "training.batch_size": 9}
    values = sampler_positions(SPACE.run, {**params, "training.learning_rate": 1e-2})
    assert values == {
        **{"method": "pl", "student.size/0": 1, "student.size/1": 0, "student.decoder_ffn/0": 0.5},
        **{"training.batch_size": 1.5 / 4, "training.learning_rate": pytest.approx(0.5)},
    }
    deep = sampler_positions(SPACE.run, {**params, "student.size": "4-4", "training.learning_rate": 1e-3})
    assert deep["training.learning_rate"] == pytest.approx(0.5)


def test_suggestions_are_the_inverse_of_positions():
    corners = list(iter_corners(SPACE.run))
    assert len(corners) == 2 * 3 * 3 * 2 * 2
    for params in corners:
        trial = NumericTrial(RecordedTrial(sampler_positions(SPACE.run, params)))
        suggested = suggest_params(SPACE.run, trial)
        assert math.isclose(suggested.pop("training.learning_rate"), params.pop("training.learning_rate"))
        assert suggested == params


@pytest.mark.parametrize("study_type", [NumericStudy, MultivariateStudy])
def test_a_study_with_positions_tries_every_combination_once(study_type, tmp_path: Path):
    run = {**SPACE.run, "method": "sft", "training": {"learning_rate": {"choice": [1e-3, 1e-2]}}}
    search = SPACE.search.model_copy(update={"trials": 99, "sampler": "tpe"})
    study = study_type(SPACE.model_copy(update={"run": run, "search": search}), tmp_path)
    tried: list[Proposal] = []
    while (proposal := study.propose(str(len(tried)))) is not None:
        tried.append(proposal)
        score = 100 * proposal.params["training.learning_rate"]
        cost = float(proposal.params["student.size"][-1])
        study.report(str(len(tried) - 1), {"finished": True, "status": "done", "score": score, "latency_ms": cost})
    assert len({proposal.key for proposal in tried}) == len(tried) == 3 * 3 * 2
    again = study_type(study.space, tmp_path)  # finished trials are not in the folder: proposed again, in order
    assert [again.propose(str(i)) for i in range(3)] == tried[:3]
