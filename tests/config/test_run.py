"""Validation and defaults of runs."""

import math

import pytest
from pydantic import ValidationError

from raydistill.config.loader import read_yaml
from raydistill.config.run import Curation, ExtraSources, Loss, PseudoLabeling, Run, Training
from raydistill.config.validation import validate
from raydistill.core.errors import UserError
from tests.factories.spaces import write_space


@pytest.mark.parametrize("name", ["alpha_data", "alpha_logits", "alpha_hidden"])
@pytest.mark.parametrize("value", [-1, -1e-9, math.inf, math.nan, "much"])
def test_loss_weights_must_be_finite_and_not_negative(name, value):
    with pytest.raises(ValidationError):
        Loss.model_validate({name: value})


def test_runs_are_immutable():
    with pytest.raises(ValidationError):
        Training().epochs = 3


def test_defaults_are_those_of_the_paper():
    assert Loss().model_dump(include={"alpha_data", "alpha_logits", "alpha_hidden"}) == {
        "alpha_data": 1.0,
        "alpha_logits": 0.8,
        "alpha_hidden": 3.0,
    }
    settings = Training()
    assert (settings.epochs, settings.checks_per_epoch, settings.warmup_steps, settings.gradient_clip) == (5, 4, 500, 1)
    assert (settings.learning_rate, settings.weight_decay, settings.patience) == (3e-4, 0, None)


@pytest.mark.parametrize(
    ("method", "labels", "source"),
    [("sft", "auto", "original"), ("kd", "auto", "original"), ("pl", "auto", "pseudo"), ("kd", "pseudo", "pseudo")],
)
def test_default_labels_depend_on_the_method(method, labels, source):
    assert Run(name="x", teacher="t", dataset={"name": "d"}, method=method, labels=labels).resolved_labels == source


def test_run_file_error_names_line_and_key(tmp_path):
    path = write_space(tmp_path, "name: x\nteacher: demo\ndataset: demo\ntraining:\n  epoch: 3\n")
    data, lines = read_yaml(path)
    with pytest.raises(UserError, match=r"space\.yaml:5: training\.epoch: unknown key; did you mean 'epochs'\?"):
        validate(Run, data, path, lines)


def test_rules_for_texts_without_targets_compare_with_no_other_text():
    rules = {"choose": "rouge2", "min_rouge2": 5, "max_length_ratio": 2, "max_repetition": 0.3}
    pseudo = PseudoLabeling.model_validate({"extra": "f", "n_best": 4, "curation": rules})
    assert pseudo.without_references() == PseudoLabeling(
        extra=ExtraSources(name="f"), n_best=4, curation=Curation(max_repetition=0.3)
    )


@pytest.mark.parametrize(
    ("settings", "reads"),
    [
        ({"method": "pl"}, True),
        ({"method": "kd", "labels": "original+pseudo"}, True),
        ({"method": "kd"}, False),
        ({"method": "pl", "pseudo": {"extra": "f", "extra_rows": 0}}, False),
        ({"method": "pl", "labels": "some/folder"}, False),
        ({"method": "pl", "pseudo": {}}, False),
    ],
)
def test_a_run_reads_extra_texts_only_with_pseudo_labels(settings, reads):
    run = Run.model_validate({"name": "r", "teacher": "t", "dataset": "d", "pseudo": {"extra": "f"}, **settings})
    assert run.reads_extra is reads
