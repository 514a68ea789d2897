"""Validation of spaces: error messages, budgets, trials, and arbitrary input."""

import math

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from raydistill.config.corners import iter_corners
from raydistill.config.space import Space, check_bounds, make_run, read_space, resource_runs
from raydistill.core.errors import UserError
from tests.factories.spaces import HEAD, RUN, space_error, write_space


def test_run_of_a_trial_has_suggested_values_and_defaults_for_inactive_parameters():
    run = {
        **RUN,
        "method": {"choice": ["sft", "kd"]},
        "loss": {"alpha_hidden": {"choice": [7], "when": {"method": "kd"}}},
    }
    space = Space(name="x", run=run)
    runs = [make_run(space, params, "trial") for params in iter_corners(run)]
    assert [(r.name, r.method, r.loss.alpha_hidden) for r in runs] == [("trial", "sft", 3.0), ("trial", "kd", 7.0)]


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
        (HEAD + "  training: {epochs: {int: [5, 2]}}\n", ":5: training.epochs: int [5, 2]: the lower bound"),
        (HEAD + "  training: {epochs: {int: [1, 2], uniform: [1, 2]}}\n", "exactly one of choice, uniform"),
        (HEAD + "  training: {learning_rate: {log_uniform: [0, 1]}}\n", "the lower bound must be above 0"),
        (HEAD + "  method: {choice: [kd], wen: {labels: original}}\n", ":5: method: wen: unknown key; did you mean"),
        (HEAD + "  method: {choice: [kd], when: {lables: original}}\n", ":5: method: when names 'lables'"),
        (
            HEAD + "  method: {choice: [a], when: {labels: a}}\n  labels: {choice: [a], when: {method: a}}\n",
            "when: circular conditions of labels, method",
        ),
        (HEAD + "  method: {choice: [kd], when: {method: kd}}\n", "space.yaml: when: circular conditions of method"),
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
        (HEAD + "  start: {family: bart, encoder_layers: 1, decoder_layers: 1}\n", "a sweep trains students"),
        (HEAD + "  training: {batch_size: 4, accumulation: 8}\n", "batch_size 4 cannot be split"),
        (HEAD + "  student: {size: 2-1, copied: {decoder: [0, 1]}}\n", "copied.decoder lists 2"),
        (HEAD + "  decoding: {beams: {choice: [1, 4]}}\n", ":5: decoding.beams: must be the same for all trials"),
        (HEAD + "  evaluation: {metric: {choice: [rouge2, bleu]}}\n", "evaluation.metric: must be the same"),
        (
            "name: s\nrun:\n  teacher: {choice: [a, b]}\n  dataset: {name: d, validation_rows: 5}\n",
            ":3: teacher: must be the same for all trials",
        ),
        (
            "name: s\nrun:\n  teacher: a\n  dataset: {name: d, validation_rows: {choice: [5, 9]}}\n",
            "dataset.validation_rows: must be the same for all trials",
        ),
        (
            "name: s\nrun:\n  teacher: a\n  dataset: {name: d, train_rows: {choice: [5, 9]}}\n",
            "dataset.train_rows: must be the same for all trials",
        ),
        (
            "name: s\nrun:\n  start: {family: bart, encoder_layers: 1, decoder_layers: 1}\n  dataset: d\n",
            ":3: start: a sweep trains students of a teacher; train a teacher first",
        ),
        (HEAD + "budgets: {a/b: {latency_ms: 3}, a-b: {latency_ms: 4}}\n", "have the same alias in MLflow, a-b"),
        (HEAD + "  labels: original*1e15\n", "with a weight above 0 and up to 100"),
        (HEAD + "  training: {epochs: 1.0e+300}\n", "epochs"),
        (HEAD + "  pseudo: {extra_rows: 5}\n", "give `extra`"),
        (HEAD + "  pseudo: {extra: {choice: [a, b]}}\n", "pseudo.extra: must be the same for all trials"),
        (HEAD + "  pseudo: {extra: {name: {choice: [a, b]}}}\n", "pseudo.extra.name: must be the same for all trials"),
        (HEAD + "  pseudo: {extra: f, extra_rows: {int: [1, 9]}}\n", "pseudo.extra_rows: needs a `choice` of numbers"),
        (HEAD + "  pseudo: {extra: f, extra_rows: {choice: [0, 9]}}\n", None),
    ],
)  # fmt: skip
def test_error_names_file_line_and_key(text, message, tmp_path):
    path = write_space(tmp_path, text)
    if message is None:
        read_space(path)
        return
    error = space_error(path)
    assert error.startswith(str(path))
    assert message in error


@pytest.mark.parametrize("bound", [True, 0, -1, math.nan, math.inf, "50 per cent", "-5%"])
def test_bound_must_be_a_positive_number_or_a_percentage(bound):
    with pytest.raises(ValueError, match="budget fast: latency_ms is "):
        check_bounds("fast", {"latency_ms": bound})


def test_all_errors_are_reported_at_once(tmp_path):
    path = write_space(tmp_path, HEAD + "  loss: {alpha_data: -1}\n  training: {seed: x}\n")
    lines = space_error(path).splitlines()
    assert [line.removeprefix(f"{path}:").split(":")[:2] for line in lines] == [
        ["5", " loss.alpha_data"],
        ["6", " training.seed"],
    ]


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


def assert_only_user_errors(path):
    try:
        read_space(path)
    except UserError as error:
        if str(path) not in str(error):
            raise AssertionError("the file is not named") from error


FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(TREES, TREES, TREES)
@example({"choice": [{1: 2, "a": 3}]}, None, None)
@example({"choice": [["x", {None: 1}]]}, [{"method": {1: 2, "b": 3}}], None)
def test_arbitrary_data_raises_user_errors_only(tmp_path, value, other, whole):
    for data in (
        whole,
        {"name": "x", "run": value, "points": other},
        {"name": "x", "run": {**RUN, "method": value, "training": other}},
        {"name": "x", "run": {**RUN, "labels": {"choice": value}}, "points": [{"labels": other}], "budgets": whole},
        {"name": "x", "run": {**RUN, "labels": {"choice": ["a"], "when": value}, "loss": {"cases": other}}},
    ):
        assert_only_user_errors(write_space(tmp_path, yaml.safe_dump(data)))


@FUZZ
@given(st.text(alphabet="ab:{}[]&*!|>-?,#%@'\"\n \t\x00é1.", max_size=40))
@example("&a [*a]")
@example("a: &a {b: *a}")
@example("run: &a {choice: *a}\nname: x")
@example("? {a: b}\n: c")
@example("<<: 3")
@example("a: 0x")
@example("a: " + "[" * 3000)
def test_arbitrary_text_raises_user_errors_only(tmp_path, text):
    path = tmp_path / "space.yaml"
    path.write_text(text, encoding="utf-8")
    assert_only_user_errors(path)


def test_every_combination_of_resources_is_judged_however_many_other_combinations_there_are() -> None:
    training = {
        "seed": {"choice": list(range(500))},
        "threads": {"choice": [1, 7], "when": {"training.seed": 498}},
        "launcher": {"choice": ["train", "tune"]},
    }
    space = Space.model_validate({"name": "s", "run": {"teacher": "t", "dataset": "d", "training": training}})
    judged = {(run.training.threads, run.training.launcher) for run in resource_runs(space)}
    assert judged == {(1, "train"), (1, "tune"), (7, "train"), (7, "tune")}
