"""Selection of training targets: label sources, weights, and the rows that have labels."""

from pathlib import Path

import pytest

from raydistill.config.label_sources import LabelSource, parse_labels
from raydistill.core.errors import UserError
from raydistill.label_sets.label_set import LabelSet
from raydistill.label_sets.manifest import LabelManifest
from raydistill.label_sets.mixing import select_targets

IDS, ORIGINALS = ["a", "b", "c"], ["one", "two", "three"]


def label_set(**targets):
    targets = targets or {"c": "DREI", "a": "EINS", "b": "ZWEI", "z": "not of this data"}
    return LabelSet(Path("set"), LabelManifest(rows=len(targets)), targets)


def select(ids, originals, source, labels):
    """`select_targets` with one label set for every source that needs one."""
    parts = parse_labels(source)
    return select_targets(ids, originals, parts, {part.spec: labels for part in parts} if labels else {})


def test_original_labels_are_the_targets_of_the_corpus():
    assert select(IDS, ORIGINALS, "original", None) == ([0, 1, 2], ORIGINALS)
    assert select(IDS, ORIGINALS, "original", label_set()) == ([0, 1, 2], ORIGINALS)


@pytest.mark.parametrize("labels", ["pseudo", "some/folder"])
def test_pseudo_labels_are_matched_by_id_not_by_position(labels):
    assert select(IDS, ORIGINALS, labels, label_set()) == ([0, 1, 2], ["EINS", "ZWEI", "DREI"])


def test_original_and_pseudo_give_two_examples_per_source():
    rows, targets = select(IDS, ORIGINALS, "original+pseudo", label_set())
    assert rows == [0, 1, 2, 0, 1, 2]
    assert targets == ["one", "two", "three", "EINS", "ZWEI", "DREI"]


def test_rows_with_empty_pseudo_labels_keep_their_original_targets():
    labels = label_set(a="EINS", b=" \n", c="DREI")
    assert select(IDS, ORIGINALS, "pseudo", labels) == ([0, 2], ["EINS", "DREI"])
    assert select(IDS, ORIGINALS, "original+pseudo", labels)[0] == [0, 1, 2, 0, 2]


def test_only_empty_pseudo_labels_are_refused():
    with pytest.raises(UserError, match="every pseudo-label is empty or was dropped"):
        select(IDS, ORIGINALS, "pseudo", label_set(a="", b="", c=""))


def test_rows_without_a_pseudo_label_are_refused_with_their_count():
    with pytest.raises(UserError, match=r"2 of 3 training rows have no pseudo-label \(first: 'b'\)"):
        select(IDS, ORIGINALS, "pseudo", label_set(a="EINS"))


def test_pseudo_labels_without_a_set_are_refused():
    with pytest.raises(UserError, match="needs a label set"):
        select(IDS, ORIGINALS, "original+pseudo", None)


def test_labels_of_several_teachers_and_originals_are_combined_with_weights():
    """Orig+PL+PL of the paper, and weights: the number of times that an epoch reads a source."""
    other = label_set(a="UNO", b="DOS", c="TRES")
    parts = parse_labels("original*2 + pseudo + sets/other")
    assert [(p.spec, p.other_teacher) for p in parse_labels("pseudo+pseudo@pegasus")] == [
        ("pseudo", None),
        ("pseudo@pegasus", "pegasus"),
    ]
    assert parts == [LabelSource("original", 2.0), LabelSource("pseudo", 1.0), LabelSource("sets/other", 1.0)]
    rows, targets = select_targets(IDS, ORIGINALS, parts, {"pseudo": label_set(), "sets/other": other})
    assert rows == [0, 0, 1, 1, 2, 2, 0, 1, 2, 0, 1, 2]
    assert targets[:6] == ["one", "one", "two", "two", "three", "three"]
    assert targets[6:] == ["EINS", "ZWEI", "DREI", "UNO", "DOS", "TRES"]


def test_weight_below_one_selects_a_fixed_share_of_the_rows():
    ids = [f"row {i}" for i in range(4000)]
    rows, _ = select_targets(ids, ids, parse_labels("original*0.25"), {})
    assert len(set(rows)) == len(rows)
    assert len(rows) == pytest.approx(1000, abs=100)  # a binomial's 95 % interval is +-54
    again, _ = select_targets(ids[::-1], ids[::-1], parse_labels("original*0.25"), {})
    assert {ids[i] for i in rows} == {ids[::-1][i] for i in again}
    more, _ = select_targets(ids, ids, parse_labels("original*1.25"), {})
    assert len(more) == 4000 + len(rows)


def test_halves_of_two_sources_are_drawn_independently():
    ids = [f"row {i}" for i in range(1000)]
    rows, _ = select(ids, ids, "original*0.5+pseudo*0.5", label_set(**dict.fromkeys(ids, "x")))
    assert len(set(rows)) == pytest.approx(750, abs=40)  # 1 - 0.5 x 0.5; a binomial's 95 % interval is +-27
