"""The keys of --set: completed, or corrected by a suggestion."""

import pytest

from raydistill.config.run import Run
from raydistill.config.setting_keys import complete_overrides, key_tree
from raydistill.config.space import read_space, space_keys
from raydistill.core.errors import UserError
from tests.factories.spaces import HEAD, space_error, write_space

RUN_KEYS = key_tree(Run)


@pytest.mark.parametrize(
    ("override", "completed"),
    [
        ("search.trials=4", "search.trials=4"),
        ("run.training.epochs=2", "run.training.epochs=2"),
        ("training.epochs=2", "run.training.epochs=2"),
        ("teacher=bart", "run.teacher=bart"),
        ("name=other", "name=other"),
        ("budgets.fast.latency_ms=9", "budgets.fast.latency_ms=9"),
        ("run.method.choice=[sft]", "run.method.choice=[sft]"),
        ("run.dataset.columns.source=body", "run.dataset.columns.source=body"),
        ("no equals", "no equals"),  # reported by `apply_overrides`
    ],
)
def test_keys_of_a_space_may_lack_the_prefix_of_the_run(override, completed):
    assert complete_overrides([override], space_keys(), "x.yaml") == [completed]


def test_keys_of_a_run_may_have_the_prefix_of_a_space():
    assert complete_overrides(["run.training.epochs=2", "method=kd"], RUN_KEYS, "x.yaml") == [
        "training.epochs=2",
        "method=kd",
    ]


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("epochs=2", "did you mean 'run.training.epochs'?"),
        ("trials=2", "did you mean 'search.trials'?"),
        ("beams=2", "did you mean 'run.decoding.beams' or 'serving.beams'?"),
        ("run.trainin.epochs=1", "did you mean 'run.training.epochs'?"),
        ("learning_rat=1", "did you mean 'run.training.learning_rate'?"),
        ("zzz=1", "known keys: name, description, run, search"),
    ],
)
def test_an_unknown_key_is_corrected_by_a_suggestion(override, hint):
    with pytest.raises(UserError) as caught:
        complete_overrides([override], space_keys(), "x.yaml")
    assert str(caught.value).startswith(f"x.yaml: --set {override}: unknown key; ")
    assert hint in str(caught.value)


def test_a_suggestion_for_a_run_has_no_prefix():
    with pytest.raises(UserError, match=r"did you mean 'training\.epochs'\?"):
        complete_overrides(["epochs=2"], RUN_KEYS, "x.yaml")


def test_an_override_without_the_prefix_changes_the_run(tmp_path):
    space = read_space(write_space(tmp_path, HEAD), ["training.epochs=2", "method={choice: [sft, kd]}"])
    assert space.run["training"] == {"epochs": 2}
    assert space.run["method"] == {"choice": ["sft", "kd"]}


@pytest.mark.parametrize("kind", ["loguniform", "log-uniform", "logUniform"])
def test_a_misspelt_distribution_is_corrected(tmp_path, kind):
    path = write_space(tmp_path, HEAD + f"  training:\n    learning_rate: {{{kind}: [1.0e-4, 1.0e-3]}}\n")
    assert f"learning_rate: unknown distribution '{kind}'; did you mean 'log_uniform'?" in space_error(path)


@pytest.mark.parametrize("line", ["method: [sft, kd]", "training: {learning_rate: [0.001, 0.002]}"])
def test_a_list_in_place_of_a_value_suggests_a_choice(tmp_path, line):
    path = write_space(tmp_path, HEAD + f"  {line}\n")
    values = line.partition("[")[2].partition("]")[0].replace("sft", "'sft'").replace("kd", "'kd'")
    assert f"a space searches several values with {{choice: [{values}]}}" in space_error(path)
