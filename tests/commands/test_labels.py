"""`raydistill labels` as a user runs it."""

from pathlib import Path

import pytest

from raydistill.core.errors import UserError
from raydistill.labels import _choose_metric, _format_quality
from tests.factories.label_sets import pseudolabel_manifest
from tests.factories.workspace import command


def test_a_negative_number_of_rows_is_refused_by_its_option(tmp_path):
    done = command(tmp_path / "outputs", "labels", "describe", "demo-train", "--rows", "-1")
    assert done.returncode == 2
    assert "'--rows'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_metric_of_the_user_that_a_label_set_names_is_not_run():
    manifest = pseudolabel_manifest(metric="my_metrics:f", quality={"my_metrics:f": 12.345})
    assert _format_quality(manifest) == "my_metrics:f 12.35"
    with pytest.raises(UserError, match="is not run: give --metric my_metrics:f to run it, or another metric"):
        _choose_metric(Path("labels"), manifest, None)
    with pytest.raises(UserError, match="cannot be imported"):
        _choose_metric(Path("labels"), manifest, "my_metrics:f")
    assert _choose_metric(Path("labels"), manifest, "chrf++") == "chrf++"
    assert _choose_metric(Path("labels"), pseudolabel_manifest(), None) == "rouge2"
