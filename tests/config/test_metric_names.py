"""Names of metrics, and what `evaluation.metric: auto` means."""

import pytest
from pydantic import ValidationError

from raydistill.config.metric_names import (
    BUILT_IN_METRICS,
    MetricChoice,
    is_bertscore,
    is_own_metric,
    parse_bertscore,
)
from raydistill.config.presets import is_translation, resolve_metrics
from raydistill.config.run import Columns, Dataset, Evaluation

BERTSCORES = ["bertscore:FacebookAI/roberta-large:17", "bertscore:a/b@refs/pr/3:9", "bertscore:../models/bert:12"]
WMT = Columns(source="translation.de", target="translation.en")


@pytest.mark.parametrize("name", ["auto", *BUILT_IN_METRICS, "my_metrics:term_recall", "a.b.c:f", *BERTSCORES])
def test_names_of_metrics(name: str) -> None:
    assert Evaluation(metric=name).metric == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chrF++", r"unknown metric 'chrF\+\+'; did you mean 'chrf\+\+'\?"),
        ("meteor_x", "known metrics: rouge1, .* Your own metric has the form module:function"),
        ("my-metrics:f", "unknown metric"),
        ("a:b:c", "unknown metric"),
        ("BERTScore", "named with its model and layer, as bertscore:FacebookAI/roberta-large:17"),
        ("bertscore:a/b:0", "named with its model and layer"),
        ("bertscore:my model:9", "named with its model and layer"),
        ("comet", "COMET needs an environment of its own and runs as a metric module:function"),
        ("comet:Unbabel/wmt22-comet-da", "COMET needs an environment of its own"),
    ],
)
def test_another_name_is_an_error(name: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Evaluation(metric=name)
    with pytest.raises(ValidationError, match=message):
        Evaluation(report=["bleu", name])
    with pytest.raises(ValidationError, match="unknown metric 'auto'"):
        Evaluation(report=["auto"])


@pytest.mark.parametrize(
    ("dataset", "columns", "deciding", "reported", "reason"),
    [
        ({"name": "wmt16_en_ro"}, None, "bleu", (), "the metric of wmt16_en_ro"),
        ({"name": "xsum"}, None, "rouge2", (), "the metric of xsum"),
        ({"name": "mine"}, None, "rouge2", (), "no translation"),
        ({"name": "mine"}, WMT, "chrf++", ("bleu",), "the columns translation.de and translation.en"),
        ({"name": "mine", "columns": WMT}, None, "chrf++", ("bleu",), "the columns translation.de"),
        ({"name": "mine", "languages": ["en", "ro"]}, None, "chrf++", ("bleu",), "the languages en and ro"),
        ({"name": "mine"}, Columns(source="en", target="eng_Latn"), "chrf++", ("bleu",), "the columns en and eng_Latn"),
        ({"name": "mine"}, Columns(source="en", target="en2"), "rouge2", (), "no translation"),
        ({"name": "mine", "languages": ["ro_RO", "ro_RO"]}, None, "rouge2", (), "no translation"),
    ],
)
def test_auto_recognises_translations(dataset, columns, deciding, reported, reason) -> None:
    choice = resolve_metrics(Dataset.model_validate(dataset), columns=columns)
    assert (choice.deciding, choice.reported) == (deciding, reported)
    assert reason in choice.reason
    assert choice.describe().startswith(f"metric: {deciding} (auto: ")


def test_a_requested_metric_decides_and_the_others_are_reported() -> None:
    dataset = Dataset(name="mine", languages=("en", "ro"))
    choice = resolve_metrics(dataset, "bleu", ["chrf++", "bleu", "chrf++"])
    assert choice == MetricChoice("bleu", ("chrf++",))
    assert choice.describe() == "metric: bleu; reported: chrf++"
    assert resolve_metrics(dataset, "auto", ["exact_match"]).reported == ("exact_match", "bleu")


def test_a_metric_of_translations_or_languages_make_a_translation() -> None:
    assert is_translation(Dataset(name="mine"), "chrf")
    assert is_translation(Dataset(name="mine"), "exact_match", WMT)
    assert not is_translation(Dataset(name="mine"), "rouge2")


def test_bertscore_is_no_metric_of_a_user() -> None:
    """A record that names BERTScore starts no code."""
    assert not any(is_own_metric(name) for name in BERTSCORES)
    assert [parse_bertscore(name) for name in BERTSCORES[:2]] == [
        ("FacebookAI/roberta-large", 17),
        ("a/b@refs/pr/3", 9),
    ]
    assert is_own_metric("bertscore:my_function")
    assert not is_bertscore("bertscore:my_function")
