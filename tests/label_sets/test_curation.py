"""Curation: the measures worked out by hand, the rules, and curated sets made of whole ones."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from pydantic import ValidationError

from raydistill.config.label_sources import LabelSource
from raydistill.config.run import Curation, Dataset
from raydistill.core.errors import UserError
from raydistill.data.corpus import Row
from raydistill.evaluation.metrics import ScoreAccumulator, rouge2_rows
from raydistill.label_sets import curation
from raydistill.label_sets.curation import (
    CurationRow,
    apply_rules,
    check_curation,
    compare_label_sets,
    copy_rate,
    curate,
    length_ratio,
    trigram_repetition,
)
from raydistill.label_sets.label_set import (
    Candidate,
    read_candidates,
    read_label_set,
    read_manifest,
    select_targets,
    write_label_set,
)
from raydistill.labels import find_label_set
from raydistill.pseudolabel import parse_curation


def test_measures_by_hand():
    assert trigram_repetition("a b c a b c a b c") == pytest.approx(1 - 3 / 7)  # trigrams abc bca cab abc bca cab abc
    assert trigram_repetition("a b c d e") == 0
    assert trigram_repetition("a b") == 0
    assert copy_rate("the dog runs home", "a dog runs home now") == 0.5  # "the dog runs" is new, "dog runs home" is not
    assert copy_rate("too short", "too short") == 0
    assert length_ratio("a b c", "a b") == 1.5


SOURCE = "the old man sees a red bicycle and the old man is glad"
ORIGINAL = "old man sees red bicycle"


def pair(*texts, original=ORIGINAL, other=""):
    return CurationRow(
        Row(("f", 1), "r", SOURCE, original), [Candidate(text, -float(i)) for i, text in enumerate(texts)], other
    )


def judged(rules, *texts, **kw):
    [(ranked, reason)] = apply_rules([pair(*texts, **kw)], Curation.model_validate(rules), rouge2_rows)
    return [candidate.target for candidate in ranked], reason


@pytest.mark.parametrize(
    ("rules", "text", "reason"),
    [
        ({}, "  ", "empty"),
        ({}, "anything at all", ""),
        ({"min_rouge2": 30}, "no word of it here", "min_rouge2"),
        ({"min_rouge2": 30}, "old man sees red cars", ""),
        ({"max_length_ratio": 1.0}, "one two three four five six", "max_length_ratio"),
        ({"min_length_ratio": 0.5}, "one two", "min_length_ratio"),
        ({"min_length_ratio": 0.4, "max_length_ratio": 0.4}, "one two", ""),
        ({"max_repetition": 0.1}, "ha ha ha ha ha", "max_repetition"),
        ({"max_copy_rate": 0.9}, "the old man sees a red", "max_copy_rate"),
        ({"max_copy_rate": 0.9}, "the old man saw a red", ""),
    ],
)
def test_a_rule_drops_what_breaks_it_and_says_which(rules, text, reason):
    assert judged(rules, text)[1] == reason


def test_the_nearest_to_the_original_is_chosen_and_the_others_stay_behind_it():
    texts = ["a cat", "old man sees a dog", "old man sees red bicycle"]
    assert judged({"choose": "rouge2"}, *texts) == ([texts[2], texts[1], texts[0]], "")
    assert judged({}, *texts) == (texts, "")


def test_the_best_candidate_that_passes_is_taken_before_the_row_is_given_up():
    assert judged({"max_repetition": 0.1}, "ha ha ha ha ha", "fine words here", "more") == (
        ["fine words here", "ha ha ha ha ha", "more"],
        "",
    )
    assert judged({"max_repetition": 0.1}, "ha ha ha ha", "ho ho ho ho")[1] == "max_repetition"


def test_agreement_with_another_teacher_is_a_rule():
    rules = {"agree_with": "there", "min_agreement": 50}
    assert judged(rules, "a red bicycle", other="a red bicycle")[1] == ""
    assert judged(rules, "a red bicycle", other="the last train")[1] == "min_agreement"


@pytest.mark.parametrize(
    "rules", [{"agree_with": "x"}, {"min_length_ratio": 2, "max_length_ratio": 1}, {"min_rouge2": -1}, {"what": 1}]
)
def test_rules_that_cannot_be_meant_are_refused(rules):
    with pytest.raises(ValidationError):
        Curation.model_validate(rules)


def test_rules_from_the_command_line_name_what_is_wrong():
    assert parse_curation(["min_rouge2=20", "choose=rouge2"]) == Curation(min_rouge2=20, choose="rouge2")
    for option, message in (("nonsense=1", "one of choose"), ("min_rouge2", "RULE=VALUE"), ("max_copy_rate=2", "less")):
        with pytest.raises(UserError, match=message):
            parse_curation([option])


@pytest.fixture
def world(tmp_path):
    """Four rows of data and what a teacher wrote for them, two candidates each."""
    rows = [{"id": f"r{i}", "source": f"{SOURCE} {i}", "target": f"{ORIGINAL} {i}"} for i in range(4)]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [
        ("nothing alike", "old man sees red bicycle 0"),
        ("old man sees red bicycle 1", "x"),
        ("", "y"),
        ("z", "w"),
    ]
    manifest = {"teacher": {"fingerprint": "t"}, "rows": 4, "empty": 1, "device_hours": 1.5, "metric": "rouge2"}
    written = [(f"r{i}", [Candidate(a, -1.0), Candidate(b, -2.0)]) for i, (a, b) in enumerate(texts)]
    write_label_set(tmp_path / "labels" / "some-train-0123", written, lambda: manifest)
    return Dataset(name=str(data)), tmp_path / "labels" / "some-train-0123"


def make(world, **rules):
    data, folder = world
    return curate(folder, data, "train", Curation.model_validate(rules), rouge2_rows, ScoreAccumulator("rouge2"))


def test_a_curated_set_stands_beside_the_whole_one_and_counts_what_it_dropped(world):
    made = make(world, choose="rouge2", min_rouge2=50)
    found = read_label_set(made)
    assert found.targets == {"r0": "old man sees red bicycle 0", "r1": "old man sees red bicycle 1"}
    assert found.dropped_ids == {"r2", "r3"}
    assert found.manifest["rows"] == 2
    assert found.manifest["dropped"] == {"empty": 1, "min_rouge2": 1}
    assert found.manifest["quality"]["rouge2"] == 100
    assert found.manifest["of"] == "some-train-0123"
    assert dict(read_candidates(made))["r0"] == [
        Candidate("old man sees red bicycle 0", -2.0),
        Candidate("nothing alike", -1.0),
    ]
    assert len(read_label_set(world[1]).targets) == 4
    rows, targets = select_targets(["r0", "r1", "r2", "r3"], ["o"] * 4, [LabelSource("pseudo")], {"pseudo": found})
    assert (rows, targets) == ([0, 1], list(found.targets.values()))
    assert make(world, choose="rouge2", min_rouge2=50) == made  # found, not made again
    assert make(world, min_rouge2=50) != made


def test_other_data_no_originals_and_nothing_left_are_refused(world, tmp_path):
    _, folder = world
    with pytest.raises(UserError, match="keep no row"):
        make(world, min_rouge2=50, max_copy_rate=0.0, max_length_ratio=0.1)
    assert [p.name for p in folder.parent.glob("[!.]*")] == [folder.name]
    assert not list(folder.parent.glob(".*.making"))
    bare = tmp_path / "bare.jsonl"
    bare.write_text("".join(json.dumps({"id": f"r{i}", "source": "s"}) + "\n" for i in range(4)))
    with pytest.raises(UserError, match="has no targets"):
        curate(
            folder, Dataset(name=str(bare)), "train", Curation(min_rouge2=1), rouge2_rows, ScoreAccumulator("rouge2")
        )
    bare.write_text(json.dumps({"id": "other", "source": "s"}) + "\n")
    with pytest.raises(UserError, match="expected row 'other' and found 'r0': this label set was made for other data"):
        curate(
            folder,
            Dataset(name=str(bare)),
            "train",
            Curation(max_copy_rate=0.5),
            rouge2_rows,
            ScoreAccumulator("rouge2"),
        )


def test_what_cannot_work_is_known_before_a_teacher_starts(world, tmp_path):
    _, folder = world
    check_curation(Curation(min_rouge2=1, agree_with=str(folder), min_agreement=1), labelled=True)
    check_curation(Curation(max_copy_rate=0.5), labelled=False)
    for rules in ({"min_rouge2": 1}, {"choose": "rouge2"}, {"max_length_ratio": 2}):
        with pytest.raises(UserError, match="the data has no targets"):
            check_curation(Curation.model_validate(rules), labelled=False)
    with pytest.raises(UserError, match="nowhere: no finished label set here"):
        check_curation(Curation(agree_with=str(tmp_path / "nowhere"), min_agreement=1), labelled=True)


def another(folder, texts, **manifest):
    """Another teacher's set with a text per row, r0 first."""
    rows = [(f"r{i}", [Candidate(text, 0.0)]) for i, text in enumerate(texts)]
    write_label_set(folder, rows, lambda: {"rows": len(texts), **manifest})
    return str(folder)


def test_another_teacher_is_asked_row_by_row_and_its_set_may_cover_more(world, tmp_path):
    same = ["nothing alike", "z", "", "no", "beyond the data"]
    made = make(world, agree_with=another(tmp_path / "other", same), min_agreement=50)
    assert read_label_set(made).targets == {"r0": "nothing alike"}
    assert read_label_set(made).manifest["dropped"] == {"min_agreement": 2, "empty": 1}
    with pytest.raises(UserError, match="short: row 'r2' has no label there"):
        make(world, agree_with=another(tmp_path / "short", same[:2]), min_agreement=50)


def test_a_curated_set_is_named_by_what_it_agrees_with_and_by_its_metric(world, tmp_path):
    texts = ["nothing alike"] * 4
    first = make(world, agree_with=another(tmp_path / "a", texts, made="once"), min_agreement=50)
    assert make(world, agree_with=another(tmp_path / "b", texts, made="once"), min_agreement=50) == first
    (tmp_path / "b").rename(tmp_path / "gone")
    assert make(world, agree_with=another(tmp_path / "b", texts, made="again"), min_agreement=50) != first
    data, folder = world
    rules = Curation(agree_with=str(tmp_path / "a"), min_agreement=50)
    other = curate(folder, data, "train", rules, rouge2_rows, ScoreAccumulator("bleu"))
    assert other != first
    assert (read_manifest(other)["metric"], list(read_manifest(other)["quality"])) == ("bleu", ["bleu"])


def test_several_who_curate_at_once_make_the_set_once(world, monkeypatch):
    made = []
    real = curation._write_curated_set
    monkeypatch.setattr(curation, "_write_curated_set", lambda *args: made.append(args) or real(*args))
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: make(world, max_copy_rate=0.9), range(4)))
    assert len(set(folders)) == len(made) == 1
    assert len(read_label_set(folders[0]).targets) == 4


def test_agreement_of_two_sets(world, tmp_path):
    _, folder = world
    other = [(f"r{i}", [Candidate(text, 0.0)]) for i, text in enumerate(["nothing alike", "a b c", "d", "z", "more"])]
    write_label_set(tmp_path / "labels" / "other", other, lambda: {"rows": 5})
    found = compare_label_sets(folder, tmp_path / "labels" / "other", ScoreAccumulator("rouge2"))
    assert (found["rows"], found["only_first"], found["only_second"], found["equal"]) == (4, 0, 1, 0.5)
    assert found["rouge2"] == 25  # one bigram text equal; one word alone has no bigram
    write_label_set(tmp_path / "labels" / "apart", [("q", [Candidate("a", 0.0)])], lambda: {"rows": 1})
    with pytest.raises(UserError, match="no row id in common"):
        compare_label_sets(folder, tmp_path / "labels" / "apart", ScoreAccumulator("rouge2"))


def test_a_set_is_found_by_folder_name_or_beginning(world):
    _, folder = world
    root = folder.parent
    assert (
        find_label_set(str(folder), None)
        == find_label_set("some-train-0123", root)
        == find_label_set("some", root)
        == folder
    )
    with pytest.raises(UserError, match=r"no such label set .*some-train-0123"):
        find_label_set("other", root)
