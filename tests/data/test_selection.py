"""The division of validation rows: disjoint, stable, and for the rows that a run reads."""

import json

import pytest

from raydistill.config.run import Columns, Dataset
from raydistill.config.space import Space, make_run
from raydistill.core.errors import UserError
from raydistill.data.corpus import Corpus, split_names
from raydistill.data.selection import divide_validation, read_part, selection_split


def make_corpus(ids, columns_id="id"):
    texts = [f"text {i}" for i in ids]
    return Corpus("d", "validation", list(ids), texts, [f"target {i}" for i in ids], Columns(source="s", id=columns_id))


def write_folder(folder, **splits):
    for split, ids in splits.items():
        rows = [json.dumps({"id": str(i), "source": f"source {i}", "target": f"target {i}"}) for i in ids]
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return str(folder)


def test_parts_are_disjoint_complete_and_in_order():
    corpus = make_corpus([str(i) for i in range(1000)])
    parts = divide_validation(corpus, 0.3)
    assert sorted([*parts.search.ids, *parts.selection.ids], key=int) == corpus.ids
    for part in (parts.search, parts.selection):
        assert [int(i) for i in part.ids] == sorted(int(i) for i in part.ids)
        assert part.sources == [f"text {i}" for i in part.ids]
        assert part.targets == [f"target {i}" for i in part.ids]
    assert len(parts.selection) == pytest.approx(300, abs=60)  # four standard deviations
    assert (parts.search.split, parts.selection.split) == ("validation", "selection")
    assert len({corpus.fingerprint, parts.search.fingerprint, parts.selection.fingerprint}) == 3


def test_part_of_a_row_depends_on_its_id_only():
    ids = [str(i) for i in range(200)]
    selection = set(divide_validation(make_corpus(ids), 0.5).selection.ids)
    later = divide_validation(make_corpus(["new", *reversed(ids), "another"]), 0.5).selection.ids
    assert {i for i in later if i in ids} == selection
    smaller = set(divide_validation(make_corpus(ids), 0.2).selection.ids)
    assert smaller < selection


def test_rows_without_ids_are_divided_by_content():
    """A row that is inserted at the start changes all row numbers, but not the part of any row."""
    texts = [f"text {i}" for i in range(100)]

    def selected(rows):
        corpus = Corpus("d", "validation", [str(i) for i in range(len(rows))], rows, rows, Columns(source="s"))
        return set(divide_validation(corpus, 0.5).selection.sources)

    assert selected(["first", *texts]) - {"first"} == selected(texts)


def test_run_reads_the_parts_of_its_validation_split(tmp_path):
    name = write_folder(tmp_path, train=range(5), validation=range(100), test=range(3))
    whole = Dataset(name=name)
    assert len(read_part(whole, "validation")) == 100
    assert read_part(whole, "selection") is None
    assert selection_split(whole) == "validation"
    divided = Dataset(name=name, selection_share=0.5, validation_rows=60)
    search, selection = read_part(divided, "validation"), read_part(divided, "selection")
    assert sorted(map(int, [*search.ids, *selection.ids])) == list(range(60))
    assert selection_split(divided) == "selection"
    assert len(read_part(divided, "train")) == 5
    assert len(read_part(Dataset(name=name, selection_share=0), "validation")) == 100


def test_named_split_leaves_the_validation_split_whole(tmp_path):
    name = write_folder(tmp_path, train=range(5), validation=range(20), selection=range(100, 130))
    dataset = Dataset(name=name, selection_split="selection")
    assert split_names(dataset) == ["train", "validation", "selection"]
    assert len(read_part(dataset, "validation")) == 20
    selection = read_part(dataset, "selection")
    assert selection.ids == [str(i) for i in range(100, 130)]
    assert selection.split == "selection"
    with pytest.raises(UserError, match="no split 'other'; available: train, validation"):
        read_part(Dataset(name=name, selection_split="other"), "selection")


def test_too_few_rows_for_two_parts_are_an_error():
    with pytest.raises(UserError, match="too few for a part for the search and a part for the choice"):
        divide_validation(make_corpus(["1"]), 0.5)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_choice_on_rows_of_another_purpose_is_refused(split):
    with pytest.raises(ValueError, match="name a split that is not used"):
        Dataset(name="d", selection_split=split)
    with pytest.raises(ValueError, match="either selection_share or selection_split"):
        Dataset(name="d", selection_split="held_out", selection_share=0.5)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, (0.5, None)),
        ({"selection_share": 0}, (0, None)),
        ({"selection_share": 0.2}, (0.2, None)),
        ({"selection_split": "held_out"}, (None, "held_out")),
    ],
)
def test_trials_of_a_sweep_keep_the_rows_that_the_space_says(keys, expected):
    space = Space.model_validate({"name": "s", "run": {"teacher": "t", "dataset": {"name": "d", **keys}}})
    dataset = make_run(space, {}, "s").dataset
    assert (dataset.selection_share, dataset.selection_split) == expected
