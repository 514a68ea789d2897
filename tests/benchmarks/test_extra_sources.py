"""The data of the comparison of extra sources with all originals."""

from pathlib import Path

import pytest

from benchmarks.extra_sources import divide
from raydistill.config.run import Dataset
from raydistill.config.space import read_space
from raydistill.data.corpus import read_corpus
from tests.factories.workspace import write_corpus

SPACES = Path(__file__).parents[2] / "benchmarks" / "spaces"


def test_training_rows_are_divided_and_other_splits_copied(tmp_path):
    data = write_corpus(tmp_path / "all", train=200)
    counts = divide(str(data), tmp_path / "out", 0.3)
    assert counts["train"] + counts["more"] == 200
    assert 40 <= counts["train"] <= 80
    original = read_corpus(Dataset(name=str(data)), "train")
    kept = read_corpus(Dataset(name=str(tmp_path / "out" / "data")), "train")
    rest = read_corpus(Dataset(name=str(tmp_path / "out" / "more.jsonl")), "train", need_targets=False)
    assert not rest.labelled
    assert sorted([*kept.ids, *rest.ids]) == sorted(original.ids)
    test = [read_corpus(Dataset(name=str(folder)), "test") for folder in (data, tmp_path / "out" / "data")]
    assert test[0].fingerprint == test[1].fingerprint


@pytest.mark.parametrize("name", ["extra_multi30k", "all_originals_multi30k", "choose_multi30k"])
def test_spaces_of_the_comparisons_are_valid(name):
    assert read_space(SPACES / f"{name}.yaml").name == name
