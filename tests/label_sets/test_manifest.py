"""Manifests of label sets, those that users write by hand included."""

import pytest
from pydantic import ValidationError

from raydistill.label_sets.manifest import LABEL_SET, LabelManifest
from tests.factories.label_sets import pseudolabel_manifest


def test_a_manifest_by_hand_needs_only_its_rows_and_keeps_notes() -> None:
    manifest = LabelManifest.parse({"rows": 3, "note": "from the translation team"})
    assert (manifest.kind, manifest.rows, manifest.teacher_name) == (LABEL_SET, 3, None)
    assert manifest.to_json()["note"] == "from the translation team"
    assert LabelManifest.parse({"rows": 3, "teacher": {"name": "big"}}).teacher_name == "big"
    assert LabelManifest.parse({"rows": 3, "teacher": "big"}).teacher_name is None


@pytest.mark.parametrize("rows", [-1, "3", 1.5, None])
def test_wrong_numbers_of_rows_are_refused(rows: object) -> None:
    with pytest.raises((ValueError, ValidationError), match="rows"):
        LabelManifest.parse({"rows": rows})


def test_the_teacher_of_a_pseudo_label_set_is_named() -> None:
    manifest = pseudolabel_manifest()
    assert manifest.teacher_name == manifest.teacher.name
