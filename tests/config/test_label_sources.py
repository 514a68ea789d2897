"""Parsing of the `labels` setting."""

import pytest

from raydistill.config.label_sources import parse_labels


@pytest.mark.parametrize("labels", ["original+", "pseudo*", "pseudo*0", "pseudo*-1", "pseudo*inf", "pseudo*x", ""])
def test_invalid_label_source_is_refused(labels):
    expected = "expected original, pseudo, pseudo@TEACHER or the folder of a label set"
    with pytest.raises(ValueError, match=f"invalid label source .*; {expected}"):
        parse_labels(labels)


def test_repeated_label_source_is_refused_with_the_weight_to_use():
    with pytest.raises(ValueError, match=r"pseudo is given twice.*pseudo\*2"):
        parse_labels("pseudo+pseudo")
