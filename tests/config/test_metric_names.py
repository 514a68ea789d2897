"""Names of metrics, and what `evaluation.metric: auto` means."""

import pytest
from pydantic import ValidationError

from raydistill.config.metric_names import BUILT_IN_METRICS, MetricChoice
from raydistill.config.presets import is_translation, resolve_metrics
from raydistill.config.run import Columns, Dataset, Evaluation

WMT = Columns(source="translation.de", target="translation.en")


@pytest.mark.parametrize("name", ["auto", *BUILT_IN_METRICS, "my_metrics:term_recall", "a.b.c:f"])
def test_names_of_metrics(name: str) -> None:
    assert Evaluation(metric=name).metric == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chrF++", r"unknown metric 'chrF\+\+'; did you mean 'chrf\+\+'\?"),
        ("meteor_x", "known metrics: rouge1, .* Your own metric has the form module:function"),
        ("my-metrics:f", "unknown metric"),
        ("a:b:c", "unknown metric"),
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
