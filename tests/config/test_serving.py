"""Serving configurations: names, order of exactness, and the grid of a space."""

import pytest
from pydantic import ValidationError

from raydistill.config.serving import EngineVariant, Serving, ServingConfig

OWN = ServingConfig(beams=4, length_penalty=1.0)


def test_the_grid_has_each_decoding_once_the_own_first_and_one_penalty_for_one_beam() -> None:
    decodings = Serving(beams=[1, 4], length_penalty=[0.6, 1.0]).decodings(OWN)
    assert [config.key for config in decodings] == ["b4-p1", "b1", "b4-p0.6"]
    assert Serving(beams=[], length_penalty=[]).decodings(OWN) == [OWN]


def test_precision_and_shortlist_are_named_in_key_and_label_unless_fp32_and_off() -> None:
    config = OWN.with_variant(EngineVariant("int8", 4000))
    assert (config.key, config.label) == ("b4-p1-int8-s4000", "4 beams, length penalty 1, int8, shortlist 4000")
    assert ServingConfig(beams=1, length_penalty=0.6, precision="bf16", shortlist="source").key == "b1-bf16-ssource"
    assert ServingConfig.model_validate_json(config.model_dump_json()) == config


def test_yaml_off_and_default_precisions_by_device() -> None:
    serving = Serving.model_validate({"shortlist": [False, 4000]})  # YAML reads `off` as false
    assert serving.named_shortlists == [4000]
    cpu = [EngineVariant(p, s) for p in ("fp32", "int8") for s in ("off", 4000)]
    assert serving.variants("cpu") == cpu
    assert {variant.precision for variant in serving.variants("cuda")} == {"bf16", "int8_float16"}


@pytest.mark.parametrize(
    "wrong",
    [{"shortlist": [0]}, {"shortlist": [True]}, {"precision": []}, {"precision": ["int4"]}, {"beams": [0]}],
)
def test_invalid_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Serving.model_validate(wrong)


@pytest.mark.parametrize(
    ("exact", "other", "expected"),
    [
        (("fp32", "off"), ("int8", 4000), True),
        (("fp32", 4000), ("int8", "off"), False),
        (("bf16", 4000), ("bf16", 2000), True),
        (("bf16", "source"), ("bf16", 2000), False),
        (("bf16", 2000), ("bf16", "source"), False),
        (("int8", "off"), ("int8_float16", "off"), False),
    ],
)
def test_exactness_is_a_partial_order_of_precision_and_vocabulary(exact, other, expected) -> None:
    assert EngineVariant(*exact).is_as_exact_as(EngineVariant(*other)) is expected
