"""Overrides by --set, and YAML files that are missing, not text or malicious."""

import pytest

from raydistill.config.corners import iter_corners
from raydistill.config.loader import apply_overrides
from raydistill.config.space import read_space
from raydistill.core.errors import UserError
from tests.factories.spaces import HEAD, space_error, write_space


def test_missing_file_error_suggests_a_similar_name(tmp_path):
    write_space(tmp_path, HEAD)
    with pytest.raises(UserError, match=r"spaec\.yaml: no such file; did you mean .*space\.yaml"):
        read_space(tmp_path / "spaec.yaml")


def test_file_that_is_not_text_is_rejected(tmp_path):
    (tmp_path / "space.yaml").write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(UserError, match=r"space\.yaml: cannot be read as UTF-8"):
        read_space(tmp_path / "space.yaml")


def test_override_replaces_one_value(tmp_path):
    path = write_space(tmp_path, HEAD + "search: {trials: 3, seed: 1}\n")
    space = read_space(path, ["search.trials=9", "run.training.batch_size=4", "run.method={choice: [sft, kd]}"])
    assert (space.search.trials, space.search.seed) == (9, 1)
    assert space.run["training"] == {"batch_size": 4}
    assert [c["method"] for c in iter_corners(space.run)] == ["sft", "kd"]


def test_override_of_a_key_of_a_data_set_given_by_name():
    assert apply_overrides({"dataset": "demo"}, ["dataset.train_rows=7"]) == {
        "dataset": {"name": "demo", "train_rows": 7}
    }


def test_overrides_do_not_modify_their_input():
    data = {"a": {"b": 1}}
    assert apply_overrides(data, ["a.b=2", "c=x=y"]) == {"a": {"b": 2}, "c": "x=y"}
    assert data == {"a": {"b": 1}}


@pytest.mark.parametrize("override", ["search.trials", "=3", "a..b=3", "a=[1", "a=2020-99-99", ".=1"])
def test_invalid_override_is_quoted(override):
    with pytest.raises(UserError) as caught:
        apply_overrides({}, [override])
    assert str(caught.value).startswith(f"--set {override}: ")


def test_unknown_key_in_an_override_names_the_file(tmp_path):
    path = write_space(tmp_path, HEAD)
    assert space_error(path, "run.trainin.epochs=1").startswith(str(path))
    assert "did you mean 'run.training.epochs'?" in space_error(path, "run.trainin.epochs=1")
