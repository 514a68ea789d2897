"""Runs and spaces out of YAML: what is accepted, every corner, and errors that say where."""

import json
import math
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from raydistill.config.corners import iter_corners, resolve_point
from raydistill.config.distributions import decode_choice, encode_choice, suggest_params
from raydistill.config.loader import apply_overrides, read_yaml
from raydistill.config.run import Loss, Run, Training
from raydistill.config.schema import json_schema
from raydistill.config.space import (
    Space,
    check_bounds,
    make_run,
    read_space,
    sampler_params,
)
from raydistill.config.validation import validate
from raydistill.core.errors import UserError

SPACES = Path(__file__).parents[2] / "search_spaces"
BASE = {"teacher": "demo", "dataset": "demo"}


def write(tmp_path, text):
    path = tmp_path / "space.yaml"
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(text, sort_keys=False))
    return path


def refusal(path, *changes):
    with pytest.raises(UserError) as caught:
        read_space(path, list(changes))
    return str(caught.value)


# Corners and points


def test_corners_are_all_combinations_of_choices_and_range_ends():
    run = {**BASE, "method": {"choice": ["sft", "kd"]}, "training": {"learning_rate": {"log_uniform": [1e-4, 1e-3]}}}
    assert list(iter_corners(run)) == [
        {"method": "sft", "training.learning_rate": 1e-4},
        {"method": "sft", "training.learning_rate": 1e-3},
        {"method": "kd", "training.learning_rate": 1e-4},
        {"method": "kd", "training.learning_rate": 1e-3},
    ]


def test_a_distribution_with_when_has_corners_only_where_it_holds():
    run = {
        **BASE,
        "loss": {"alpha_hidden": {"choice": [1, 3], "when": {"method": "kd"}}},  # before what it depends on
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


def test_when_can_name_a_fixed_value_of_the_run():
    run = {**BASE, "method": "kd", "loss": {"alpha_hidden": {"choice": [1], "when": {"method": "kd"}}}}
    assert list(iter_corners(run)) == [{"loss.alpha_hidden": 1}]
    assert list(iter_corners({**run, "method": "sft"})) == [{}]


CASES = {
    **BASE,
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


def test_cases_give_one_key_a_distribution_of_its_own_per_condition():
    assert list(iter_corners(CASES)) == [
        {"method": "sft", "training.learning_rate": 0.1},
        {"method": "sft", "training.learning_rate": 0.2},
        {"method": "kd", "training.learning_rate": 0.5},
    ]
    # A sampler models the two apart, so they have names of their own.
    names = sampler_params(CASES, {"method": "kd", "training.learning_rate": 0.5})
    assert names == {"method": "kd", "training.learning_rate@1": 0.5}


def test_cases_that_hold_at_once_are_refused(tmp_path):
    run = {**CASES, "training": {"learning_rate": {"cases": [{"choice": [0.1]}, {"choice": [0.5]}]}}}
    assert "training.learning_rate: two cases hold at once" in refusal(write(tmp_path, {"name": "x", "run": run}))


def test_when_may_depend_on_what_itself_depends():
    run = {
        **BASE,
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


def test_too_many_corners_are_drawn_from_and_every_one_lies_in_the_space():
    run = {**BASE, "training": {f"x{i}": {"int": [0, 1]} for i in range(10)}}
    found = list(iter_corners(run, limit=50))
    assert len(found) == 100
    assert all(set(c.values()) <= {0, 1} and len(c) == 10 for c in found)
    assert len(list(iter_corners(run, limit=1024))) >= 1024


def test_a_point_takes_what_it_says_and_the_first_or_lowest_for_the_rest():
    assert resolve_point(CASES, {"method": "kd"}) == {"method": "kd", "training.learning_rate": 0.5}
    assert resolve_point(CASES, {"training.learning_rate": 0.15}) == {"method": "sft", "training.learning_rate": 0.15}


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"method": "pl"}, "method 'pl' is none of"),
        ({"training.learning_rate": 0.3}, "0.3 is not within [0.1, 0.2]"),
        ({"training.learning_rat": 0.15}, "training.learning_rat is no distribution"),
    ],
)
def test_a_point_outside_the_space_is_refused(point, message, tmp_path):
    path = write(tmp_path, {"name": "x", "run": CASES, "points": [point]})
    assert message in refusal(path)
    assert str(path) in refusal(path)


@pytest.mark.parametrize("value", ["", "[odd", "{", '"quoted', "plain", 3, None, True, [1, 2], {"a": [1]}, "[1]"])
def test_a_choice_survives_the_samplers_scalars(value):
    assert decode_choice(encode_choice(value)) == value
    assert isinstance(encode_choice(value), str | int | float | bool | None)
    run = {**BASE, "labels": {"choice": [value]}}
    assert list(iter_corners(run)) == [{"labels": value}]


def test_a_trials_run_has_the_chosen_values_and_the_defaults_of_what_does_not_apply():
    run = {
        **BASE,
        "method": {"choice": ["sft", "kd"]},
        "loss": {"alpha_hidden": {"choice": [7], "when": {"method": "kd"}}},
    }
    space = Space(name="x", run=run)
    made = [make_run(space, chosen, "trial") for chosen in iter_corners(run)]
    assert [(r.name, r.method, r.loss.alpha_hidden) for r in made] == [("trial", "sft", 3.0), ("trial", "kd", 7.0)]


def test_every_choice_is_asked_for_by_its_name_and_kind():
    asked: list[tuple] = []

    class Trial:
        def suggest_categorical(self, name, choices):
            asked.append((name, choices))
            return choices[-1]

        def suggest_float(self, name, low, high, *, log=False):
            asked.append((name, low, high, log))
            return high

        def suggest_int(self, name, low, high):
            asked.append((name, low, high))
            return low

    run = {
        **BASE,
        "method": {"choice": ["sft"]},
        "loss": {"temperature": {"uniform": [1, 4]}},
        "training": {"learning_rate": {"log_uniform": [1e-5, 1e-3]}, "epochs": {"int": [1, 9]}},
    }
    chosen = suggest_params(run, Trial())
    assert chosen == {"method": "sft", "loss.temperature": 4, "training.learning_rate": 1e-3, "training.epochs": 1}
    assert asked == [
        ("method", ["sft"]),
        ("loss.temperature", 1.0, 4.0, False),
        ("training.learning_rate", 1e-5, 1e-3, True),
        ("training.epochs", 1, 9),
    ]


# Errors

HEAD = "name: x\nrun:\n  teacher: demo\n  dataset: demo\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "  metod: kd\n", ":5: metod: unknown key; did you mean 'method'?"),
        (HEAD + "  training:\n    learning_rat: 1\n", ":6: training.learning_rat: unknown key; did you mean '"),
        (HEAD + "serach: {}\n", ":5: serach: unknown key; did you mean 'search'?"),
        (HEAD + "search: {sampler: anneal}\n", ":5: search.sampler: "),
        (HEAD + "  loss:\n    alpha_hidden: -1\n", ":6: loss.alpha_hidden: input should be greater than or equal to 0"),
        (HEAD + "  loss: {alpha_data: -0.5}\n", ":5: loss.alpha_data: "),
        (HEAD + "  loss:\n    alpha_logits: {choice: [1, -1]}\n", "alpha_logits: input should be greater"),
        (HEAD + "  loss:\n    temperature: {uniform: [0, 2]}\n", "temperature: input should be greater than 0"),
        (HEAD + "  training: {learning_rate: .inf}\n", ":5: training.learning_rate: input should be a finite number"),
        (HEAD + "  training: {epochs: .nan}\n", ":5: training.epochs: "),
        (HEAD + "  student: {size: 12x3}\n", ":5: student.size: size '12x3' is not of the form"),
        (HEAD + "  method: {choice: []}\n", ":5: method: choice: "),
        (HEAD + "  training: {epochs: {int: [5, 2]}}\n", ":5: training.epochs: int [5, 2]: the lower end"),
        (HEAD + "  training: {epochs: {int: [1, 2], uniform: [1, 2]}}\n", "exactly one of choice, uniform"),
        (HEAD + "  training: {learning_rate: {log_uniform: [0, 1]}}\n", "the lower end must be above 0"),
        (HEAD + "  method: {choice: [kd], wen: {labels: original}}\n", ":5: method: wen: unknown key; did you mean"),
        (HEAD + "  method: {choice: [kd], when: {lables: original}}\n", ":5: method: when names 'lables'"),
        (HEAD + "  method: {choice: [a], when: {labels: a}}\n  labels: {choice: [a], when: {method: a}}\n", "circle"),
        (HEAD + "  method: {choice: [kd], when: {method: kd}}\n", "space.yaml: when: method depend"),
        (HEAD + "  method: {choice: [sft, kd]}\nsearch: {sampler: grid}\n  \n", None),
        (HEAD + "  training: {epochs: {int: [1, 2]}}\nsearch: {sampler: grid}\n", ":6: search.sampler: grid needs"),
        (HEAD + "  method: kd\n  loss: {alpha_logits: 0, alpha_hidden: {choice: [0, 1]}}\n", "is method sft (for"),
        (HEAD + "  teacher: other\n", ":5: duplicate key teacher"),
        (HEAD + "  method: !!python/object:os.system kd\n", ":5: not valid YAML: could not determine a constructor"),
        (HEAD + "  method: !!python/object/apply:os.system [ls]\n", ":5: not valid YAML"),
        (HEAD + "  method: [\n", "not valid YAML"),
        (HEAD + "  ? [a]\n  : b\n", ":5: a key must be a scalar"),
        ("- a\n- b\n", "expected a mapping of keys to values, got list"),
        ("", "expected a mapping of keys to values, got NoneType"),
        ("name: ../up\nrun: {teacher: demo, dataset: demo}\n", ":1: name: "),
        (HEAD + "budgets: {fast: {latency: 3}}\n", "budget fast: cannot bound 'latency'; known: latency_ms"),
        (HEAD + "budgets: {fast: {latency_ms: -3}}\n", "latency_ms is -3.0; expected a number above 0"),
        (HEAD + "budgets: {fast: {latency_ms: half}}\n", "latency_ms is 'half'"),
        (HEAD + 'budgets: {fast: {latency_ms: "nan%"}}\n', "latency_ms is 'nan%'"),
        (HEAD + 'budgets: {fast: {latency_ms: "inf%"}}\n', "latency_ms is 'inf%', which bounds nothing"),
        (HEAD + "budgets: {fast: {latency_ms: .inf}}\n", "latency_ms"),
        (HEAD + "  start: {form: bart, encoder_layers: 1, decoder_layers: 1}\n", "a sweep is of a teacher"),
        (HEAD + "  training: {batch_size: 4, accumulation: 8}\n", "batch_size 4 cannot be split"),
        (HEAD + "  student: {size: 2-1, copied: {decoder: [0, 1]}}\n", "copied.decoder lists 2"),
        (HEAD + "  decoding: {beams: {choice: [1, 4]}}\n", ":5: decoding.beams: is one for all trials"),
        (HEAD + "  evaluation: {metric: {choice: [rouge2, bleu]}}\n", "evaluation.metric: is one for all trials"),
        (
            "name: s\nrun:\n  teacher: {choice: [a, b]}\n  dataset: {name: d, validation_rows: 5}\n",
            ":3: teacher: is one for all trials",
        ),
        (
            "name: s\nrun:\n  teacher: a\n  dataset: {name: d, validation_rows: {choice: [5, 9]}}\n",
            "dataset.validation_rows: is one for all trials",
        ),
        (
            "name: s\nrun:\n  teacher: a\n  dataset: {name: d, train_rows: {choice: [5, 9]}}\n",
            "dataset.train_rows: is one for all trials",
        ),
        (
            "name: s\nrun:\n  start: {form: bart, encoder_layers: 1, decoder_layers: 1}\n  dataset: d\n",
            ":3: start: a sweep is of a teacher's students; make a teacher first",
        ),
        (HEAD + "budgets: {a/b: {latency_ms: 3}, a-b: {latency_ms: 4}}\n", "are one alias in MLflow, a-b; rename one"),
        (HEAD + "  labels: original*1e15\n", "with a weight above 0 and up to 100"),
        (HEAD + "  training: {epochs: 1.0e+300}\n", "epochs"),
    ],
)  # fmt: skip
def test_an_error_names_file_line_and_key(text, message, tmp_path):
    path = write(tmp_path, text)
    if message is None:
        read_space(path)
        return
    found = refusal(path)
    assert found.startswith(str(path))
    assert message in found


@pytest.mark.parametrize("bound", [True, 0, -1, math.nan, math.inf, "50 per cent", "-5%"])
def test_a_bound_is_a_positive_number_or_a_share(bound):
    with pytest.raises(ValueError, match="budget fast: latency_ms is "):
        check_bounds("fast", {"latency_ms": bound})


def test_all_errors_are_told_at_once(tmp_path):
    path = write(tmp_path, HEAD + "  loss: {alpha_data: -1}\n  training: {seed: x}\n")
    lines = refusal(path).splitlines()
    assert [line.removeprefix(f"{path}:").split(":")[:2] for line in lines] == [
        ["5", " loss.alpha_data"],
        ["6", " training.seed"],
    ]


def test_a_missing_file_is_named_with_its_neighbour(tmp_path):
    write(tmp_path, HEAD)
    with pytest.raises(UserError, match=r"spaec\.yaml: no such file; did you mean .*space\.yaml"):
        read_space(tmp_path / "spaec.yaml")


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "space.yaml").write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(UserError, match=r"space\.yaml: cannot be read as UTF-8"):
        read_space(tmp_path / "space.yaml")


# --set


def test_set_changes_a_value_as_yaml_and_leaves_the_rest(tmp_path):
    path = write(tmp_path, HEAD + "search: {trials: 3, seed: 1}\n")
    space = read_space(path, ["search.trials=9", "run.training.batch_size=4", "run.method={choice: [sft, kd]}"])
    assert (space.search.trials, space.search.seed) == (9, 1)
    assert space.run["training"] == {"batch_size": 4}
    assert [c["method"] for c in iter_corners(space.run)] == ["sft", "kd"]


def test_set_goes_into_a_data_set_that_was_given_by_name(tmp_path):
    assert apply_overrides({"dataset": "demo"}, ["dataset.train_rows=7"]) == {
        "dataset": {"name": "demo", "train_rows": 7}
    }


def test_set_does_not_change_the_data_it_was_given():
    data = {"a": {"b": 1}}
    assert apply_overrides(data, ["a.b=2", "c=x=y"]) == {"a": {"b": 2}, "c": "x=y"}
    assert data == {"a": {"b": 1}}


@pytest.mark.parametrize("setting", ["search.trials", "=3", "a..b=3", "a=[1", "a=2020-99-99", ".=1"])
def test_a_setting_that_cannot_be_read_is_quoted(setting):
    with pytest.raises(UserError) as caught:
        apply_overrides({}, [setting])
    assert str(caught.value).startswith(f"--set {setting}: ")


def test_an_unknown_key_by_set_names_the_file(tmp_path):
    path = write(tmp_path, HEAD)
    assert refusal(path, "run.trainin.epochs=1").startswith(str(path))
    assert "did you mean 'training'?" in refusal(path, "run.trainin.epochs=1")


# Runs


@pytest.mark.parametrize("name", ["alpha_data", "alpha_logits", "alpha_hidden"])
@pytest.mark.parametrize("value", [-1, -1e-9, math.inf, math.nan, "much"])
def test_coefficients_are_finite_and_not_negative(name, value):
    with pytest.raises(ValidationError):
        Loss.model_validate({name: value})


def test_a_run_cannot_be_changed():
    with pytest.raises(ValidationError):
        Training().epochs = 3


def test_the_papers_defaults():
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
def test_labels_follow_the_method(method, labels, source):
    assert Run(name="x", teacher="t", dataset={"name": "d"}, method=method, labels=labels).resolved_labels == source


# The shipped spaces and their schema


@pytest.mark.parametrize("path", sorted(SPACES.glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_space_is_right_and_fits_the_schema(path):
    read_space(path)
    jsonschema.validate(yaml.safe_load(path.read_text()), json_schema())


def test_the_schema_file_is_the_models_own():
    assert json.loads((SPACES / "schema.json").read_text()) == json_schema(), "run `make schema`"


@pytest.mark.parametrize(
    "changes",
    [
        {"search": {"trials": 0}},
        {"surch": {}},
        {"run": {**BASE, "metod": "kd"}},
        {"run": {**BASE, "training": {"learning_rate": {"uniform": [1, 2], "wen": {}}}}},
        {"run": {**BASE, "loss": {"alpha_hidden": -1}}},
    ],
)
def test_the_schema_refuses_what_the_models_refuse(changes):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"name": "x", "run": BASE} | changes, json_schema())


# Anything at all

WORDS = ["name", "run", "dataset", "method", "size", "loss", "training", "search", "points", "budgets", "labels", "odd"]
KINDS = ["choice", "uniform", "log_uniform", "int", "when", "cases", "alpha_hidden", "epochs", "a.b", ".", ""]
KEYS = st.sampled_from([*WORDS, *KINDS, 0, True, None])
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.dates()
    | st.binary(max_size=3)
    | st.sampled_from(["demo", "kd", "2-1", "50%", "[", '{"a'])
)
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=15
)


def only_user_errors(path):
    try:
        read_space(path)
    except UserError as error:
        if str(path) not in str(error):
            raise AssertionError("the file is not named") from error


FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(TREES, TREES, TREES)
@example({"choice": [{1: 2, "a": 3}]}, None, None)
@example({"choice": [["x", {None: 1}]]}, [{"method": {1: 2, "b": 3}}], None)
def test_no_structure_raises_anything_but_a_user_error(tmp_path, value, other, whole):
    for data in (
        whole,
        {"name": "x", "run": value, "points": other},
        {"name": "x", "run": {**BASE, "method": value, "training": other}},
        {"name": "x", "run": {**BASE, "labels": {"choice": value}}, "points": [{"labels": other}], "budgets": whole},
        {"name": "x", "run": {**BASE, "labels": {"choice": ["a"], "when": value}, "loss": {"cases": other}}},
    ):
        only_user_errors(write(tmp_path, yaml.safe_dump(data)))


@FUZZ
@given(st.text(alphabet="ab:{}[]&*!|>-?,#%@'\"\n \t\x00é1.", max_size=40))
@example("&a [*a]")
@example("a: &a {b: *a}")
@example("run: &a {choice: *a}\nname: x")
@example("? {a: b}\n: c")
@example("<<: 3")
@example("a: 0x")
@example("a: " + "[" * 3000)
def test_no_text_raises_anything_but_a_user_error(tmp_path, text):
    path = tmp_path / "space.yaml"
    path.write_text(text, encoding="utf-8")
    only_user_errors(path)


def test_a_run_file_is_checked_the_same_way(tmp_path):
    path = write(tmp_path, "name: x\nteacher: demo\ndataset: demo\ntraining:\n  epoch: 3\n")
    data, lines = read_yaml(path)
    with pytest.raises(UserError, match=r"space\.yaml:5: training\.epoch: unknown key; did you mean 'epochs'\?"):
        validate(Run, data, path, lines)


def test_paths_in_labels_and_choices_are_made_absolute(tmp_path, monkeypatch):
    from raydistill.config.run_paths import make_paths_absolute

    monkeypatch.chdir(tmp_path)
    for name in ("set", "teacher"):
        (tmp_path / name).mkdir()
    run = {
        "teacher": {"choice": ["teacher", "bart"]},
        "labels": {"cases": [{"choice": ["original+set*0.5", "pseudo+pseudo@teacher"], "when": {"method": "sft"}}]},
        "student": {"copy_from": "teacher", "size": "6-3"},
    }
    found = make_paths_absolute(run)
    assert found["teacher"] == {"choice": [f"{tmp_path}/teacher", "bart"]}
    assert found["labels"]["cases"][0]["choice"] == [
        f"original+{tmp_path}/set*0.5",
        f"pseudo+pseudo@{tmp_path}/teacher",
    ]
    assert found["student"] == {"copy_from": f"{tmp_path}/teacher", "size": "6-3"}
