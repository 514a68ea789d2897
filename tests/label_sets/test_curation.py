"""Curation: measures against hand-calculated values, the rules, and curated sets derived from complete ones."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from raydistill.config.label_sources import LabelSource
from raydistill.config.run import Curation, Dataset
from raydistill.core.errors import UserError
from raydistill.data.corpus import Row
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
    read_pseudolabel_manifest,
)
from raydistill.label_sets.manifest import LabelManifest
from raydistill.label_sets.mixing import select_targets
from raydistill.labels import find_label_set
from raydistill.pseudolabel import parse_curation
from tests.factories.label_sets import pseudolabel_manifest, write_labels
from tests.factories.models import save_tiny


def test_measures_match_hand_calculated_values():
    assert trigram_repetition("a b c a b c a b c") == pytest.approx(1 - 3 / 7)  # trigrams abc bca cab abc bca cab abc
    assert trigram_repetition("a b c d e") == 0
    assert trigram_repetition("a b") == 0
    assert copy_rate("the dog runs home", "a dog runs home now") == 0.5  # "the dog runs" is new, "dog runs home" is not
    assert copy_rate("too short", "too short") == 0
    assert length_ratio("a b c", "a b") == 1.5


SOURCE = "the old man sees a red bicycle and the old man is glad"
ORIGINAL = "old man sees red bicycle"


def curation_row(*texts, original=ORIGINAL, other=""):
    return CurationRow(
        Row(("f", 1), "r", SOURCE, original), [Candidate(text, -float(i)) for i, text in enumerate(texts)], other
    )


def apply(rules, *texts, **kw):
    [(ranked, violated)] = apply_rules([curation_row(*texts, **kw)], Curation.model_validate(rules))
    return [candidate.target for candidate in ranked], violated


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
        # The source has 54 characters.
        ({"min_source_ratio": 0.5}, "x" * 26, "min_source_ratio"),
        ({"min_source_ratio": 0.5, "max_source_ratio": 0.5}, " " + "x" * 27, ""),
        ({"max_source_ratio": 0.5}, "x" * 28, "max_source_ratio"),
        ({"target_language": "en"}, "the old man reads a letter from his brother", ""),
        ({"target_language": "en"}, "der alte Mann liest einen Brief von seinem Bruder", "target_language"),
        ({"source_language": "en"}, "any label", ""),
        ({"source_language": "de"}, "any label", "source_language"),
    ],
)
def test_rule_drops_a_violating_label_and_is_named(rules, text, reason):
    assert apply(rules, text)[1] == reason


def test_min_score_drops_labels_that_the_teacher_is_unsure_of():
    """The candidates of a row have the scores 0, -1 and -2."""
    row = curation_row("first", "second", "third")
    for limit, reason in ((-0.5, ""), (0.0, "")):
        assert apply_rules([row], Curation(min_score=limit))[0].violated_rule == reason
    unsure = row._replace(candidates=row.candidates[1:])
    assert apply_rules([unsure], Curation(min_score=-0.5))[0].violated_rule == "min_score"
    assert apply_rules([unsure], Curation(min_score=-1.0))[0].candidates[0].target == "second"


def test_max_reverse_loss_takes_the_first_candidate_from_which_the_source_is_likely():
    """A stand-in for the model: a loss of one nat for each character that the label lacks."""

    def losses(labels, sources):
        return [float(len(source) - len(label)) for label, source in zip(labels, sources, strict=True)]

    row = curation_row("short", "x" * 50, "y" * 52)
    rules = Curation(reverse_model="m", max_reverse_loss=4)
    [(candidates, rule)] = apply_rules([row], rules, losses)
    assert ([candidate.target for candidate in candidates], rule) == (["x" * 50, "short", "y" * 52], "")
    assert apply_rules([row], Curation(reverse_model="m", max_reverse_loss=1), losses)[0].violated_rule == (
        "max_reverse_loss"
    )


def test_choose_chrf_finds_inflected_words_that_share_no_bigram_of_words():
    texts = ["a cat", "old men saw reddish bicycles", "bicycle"]
    assert apply({"choose": "chrf"}, *texts)[0][0] == texts[1]
    assert apply({"choose": "rouge2"}, *texts)[0][0] == texts[0]  # every ROUGE-2 is 0


def test_choose_rouge2_orders_candidates_by_similarity_to_the_original():
    texts = ["a cat", "old man sees a dog", "old man sees red bicycle"]
    assert apply({"choose": "rouge2"}, *texts) == ([texts[2], texts[1], texts[0]], "")
    assert apply({}, *texts) == (texts, "")


def test_first_candidate_that_passes_becomes_the_label():
    assert apply({"max_repetition": 0.1}, "ha ha ha ha ha", "fine words here", "more") == (
        ["fine words here", "ha ha ha ha ha", "more"],
        "",
    )
    assert apply({"max_repetition": 0.1}, "ha ha ha ha", "ho ho ho ho")[1] == "max_repetition"


def test_min_agreement_drops_labels_that_differ_from_another_teacher():
    rules = {"agree_with": "other-set", "min_agreement": 50}
    assert apply(rules, "a red bicycle", other="a red bicycle")[1] == ""
    assert apply(rules, "a red bicycle", other="the last train")[1] == "min_agreement"


@pytest.mark.parametrize(
    "rules",
    [
        {"agree_with": "x"},
        {"reverse_model": "x"},
        {"max_reverse_loss": 2},
        {"min_length_ratio": 2, "max_length_ratio": 1},
        {"min_rouge2": -1},
        {"unknown": 1},
        {"min_score": 1},
        {"min_source_ratio": 2, "max_source_ratio": 1},
    ],
)
def test_contradictory_or_unknown_rules_are_refused(rules):
    with pytest.raises(ValidationError):
        Curation.model_validate(rules)


def test_invalid_keep_options_are_named():
    assert parse_curation(["min_rouge2=20", "choose=rouge2"]) == Curation(min_rouge2=20, choose="rouge2")
    for option, message in (("nonsense=1", "one of choose"), ("min_rouge2", "RULE=VALUE"), ("max_copy_rate=2", "less")):
        with pytest.raises(UserError, match=message):
            parse_curation([option])


@pytest.fixture
def source_set(tmp_path):
    """Four rows of data and a label set of them with two candidates per row."""
    rows = [{"id": f"r{i}", "source": f"{SOURCE} {i}", "target": f"{ORIGINAL} {i}"} for i in range(4)]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [
        ("nothing similar", "old man sees red bicycle 0"),
        ("old man sees red bicycle 1", "x"),
        ("", "y"),
        ("z", "w"),
    ]
    rows = [(f"r{i}", [Candidate(a, -1.0), Candidate(b, -2.0)]) for i, (a, b) in enumerate(texts)]
    folder = tmp_path / "labels" / "some-train-0123"
    write_labels(folder, rows, pseudolabel_manifest(rows=4, device_hours=1.5))
    return Dataset(name=str(data)), folder


def derive(source_set, **rules):
    data, folder = source_set
    return curate(folder, data, "train", Curation.model_validate(rules), "rouge2")


def test_curated_set_is_written_next_to_the_source_set_and_counts_dropped_rows(source_set):
    output_dir = derive(source_set, choose="rouge2", min_rouge2=50)
    curated = read_label_set(output_dir)
    assert curated.targets == {"r0": "old man sees red bicycle 0", "r1": "old man sees red bicycle 1"}
    assert curated.dropped_ids == {"r2", "r3"}
    assert curated.manifest.rows == 2
    assert curated.manifest.dropped == {"empty": 1, "min_rouge2": 1}
    assert curated.manifest.quality["rouge2"] == 100
    assert curated.manifest.source_label_set == "some-train-0123"
    assert dict(read_candidates(output_dir))["r0"] == [
        Candidate("old man sees red bicycle 0", -2.0),
        Candidate("nothing similar", -1.0),
    ]
    assert len(read_label_set(source_set[1]).targets) == 4
    rows, targets = select_targets(["r0", "r1", "r2", "r3"], ["o"] * 4, [LabelSource("pseudo")], {"pseudo": curated})
    assert (rows, targets) == ([0, 1], list(curated.targets.values()))
    assert derive(source_set, choose="rouge2", min_rouge2=50) == output_dir  # complete, so not derived again
    assert derive(source_set, min_rouge2=50) != output_dir


def test_other_data_missing_originals_and_rules_that_drop_all_rows_are_refused(source_set, tmp_path):
    _, folder = source_set
    with pytest.raises(UserError, match="drop every row"):
        derive(source_set, min_rouge2=50, max_copy_rate=0.0, max_length_ratio=0.1)
    assert [p.name for p in folder.parent.glob("[!.]*")] == [folder.name]
    assert not list(folder.parent.glob(".*.tmp"))
    bare = tmp_path / "bare.jsonl"
    bare.write_text("".join(json.dumps({"id": f"r{i}", "source": "s"}) + "\n" for i in range(4)))
    with pytest.raises(UserError, match="has no targets"):
        curate(folder, Dataset(name=str(bare)), "train", Curation(min_rouge2=1), "rouge2")
    bare.write_text(json.dumps({"id": "other", "source": "s"}) + "\n")
    with pytest.raises(UserError, match="expected row 'other', got 'r0': this label set was made for other data"):
        curate(folder, Dataset(name=str(bare)), "train", Curation(max_copy_rate=0.5), "rouge2")


def test_check_curation_refuses_impossible_rules_before_labelling(source_set, tmp_path):
    _, folder = source_set
    check_curation(Curation(min_rouge2=1, agree_with=str(folder), min_agreement=1), labelled=True)
    check_curation(Curation(max_copy_rate=0.5), labelled=False)
    rules_without_reference = {"min_score": -2, "max_source_ratio": 3, "source_language": "en", "target_language": "de"}
    check_curation(Curation.model_validate(rules_without_reference), labelled=False)
    for code, hint in (("xx", "known codes: "), ("de_DE", "did you mean 'de'?")):
        with pytest.raises(UserError, match=f"no language '{code}'; .*{re.escape(hint)}"):
            check_curation(Curation(target_language=code), labelled=False)
    for rules in ({"min_rouge2": 1}, {"choose": "rouge2"}, {"choose": "chrf"}, {"max_length_ratio": 2}):
        with pytest.raises(UserError, match="the data has no targets"):
            check_curation(Curation.model_validate(rules), labelled=False)
    with pytest.raises(UserError, match="nowhere: no complete label set"):
        check_curation(Curation(agree_with=str(tmp_path / "nowhere"), min_agreement=1), labelled=True)


def write_other(folder, texts, **manifest):
    """Write the label set of another teacher: a label per row, from r0."""
    rows = [(f"r{i}", [Candidate(text, 0.0)]) for i, text in enumerate(texts)]
    write_labels(folder, rows, LabelManifest.model_validate({"rows": len(texts), **manifest}))
    return str(folder)


def test_agreement_is_compared_by_row_and_the_other_set_may_have_more_rows(source_set, tmp_path):
    same = ["nothing similar", "z", "", "no", "beyond the data"]
    output_dir = derive(source_set, agree_with=write_other(tmp_path / "other", same), min_agreement=50)
    assert read_label_set(output_dir).targets == {"r0": "nothing similar"}
    assert read_label_set(output_dir).manifest.dropped == {"min_agreement": 2, "empty": 1}
    with pytest.raises(UserError, match="short: no label for row 'r2' in the order of the data"):
        derive(source_set, agree_with=write_other(tmp_path / "short", same[:2]), min_agreement=50)


def test_key_of_a_curated_set_depends_on_the_other_set_and_the_metric(source_set, tmp_path):
    texts = ["nothing similar"] * 4
    first = derive(source_set, agree_with=write_other(tmp_path / "a", texts, note="first"), min_agreement=50)
    assert derive(source_set, agree_with=write_other(tmp_path / "b", texts, note="first"), min_agreement=50) == first
    (tmp_path / "b").rename(tmp_path / "renamed")
    assert derive(source_set, agree_with=write_other(tmp_path / "b", texts, note="second"), min_agreement=50) != first
    data, folder = source_set
    rules = Curation(agree_with=str(tmp_path / "a"), min_agreement=50)
    other = curate(folder, data, "train", rules, "bleu")
    assert other != first
    manifest = read_pseudolabel_manifest(other)
    assert (manifest.metric, list(manifest.quality)) == ("bleu", ["bleu"])


def test_concurrent_curations_write_the_set_once(source_set, monkeypatch):
    written = []
    real_writer = pq.ParquetWriter

    def record_path(path, schema):
        written.append(path.name)
        return real_writer(path, schema)

    monkeypatch.setattr(pq, "ParquetWriter", record_path)
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: derive(source_set, max_copy_rate=0.9), range(4)))
    assert len(set(folders)) == 1
    assert sorted(written) == ["part-00000.parquet"]
    assert len(read_label_set(folders[0]).targets) == 4


def test_compare_label_sets_reports_common_rows_equal_labels_and_scores(source_set, tmp_path):
    _, folder = source_set
    other = [(f"r{i}", [Candidate(text, 0.0)]) for i, text in enumerate(["nothing similar", "a b c", "d", "z", "more"])]
    write_labels(tmp_path / "labels" / "other", other, LabelManifest(rows=5))
    comparison = compare_label_sets(folder, tmp_path / "labels" / "other", "rouge2")
    assert (comparison["rows"], comparison["only_first"], comparison["only_second"], comparison["equal"]) == (
        4,
        0,
        1,
        0.5,
    )
    assert comparison["rouge2"] == 25  # one bigram text equal; one word alone has no bigram
    write_labels(tmp_path / "labels" / "apart", [("q", [Candidate("a", 0.0)])], LabelManifest(rows=1))
    with pytest.raises(UserError, match="no row id in common"):
        compare_label_sets(folder, tmp_path / "labels" / "apart", "rouge2")


def test_find_label_set_accepts_folder_name_or_prefix(source_set):
    _, folder = source_set
    root = folder.parent
    assert (
        find_label_set(str(folder), None)
        == find_label_set("some-train-0123", root)
        == find_label_set("some", root)
        == folder
    )
    with pytest.raises(UserError, match=r"no such label set .*some-train-0123"):
        find_label_set("other", root)


def test_prefix_of_a_set_and_of_its_curated_sets_is_the_set(source_set):
    _, folder = source_set
    root = folder.parent
    first = derive(source_set, max_copy_rate=0.9)
    assert find_label_set("some-train", root) == folder
    assert find_label_set("some-train-curated", root) == first
    second = derive(source_set, max_copy_rate=0.8)
    assert find_label_set("some", root) == folder
    with pytest.raises(UserError, match="several label sets match") as error:
        find_label_set("some-train-curated", root)
    assert first.name in str(error.value)
    assert second.name in str(error.value)
    write_labels(root / "some-test-4567", manifest=pseudolabel_manifest())
    with pytest.raises(UserError, match=r"several label sets match .*some-test-4567, some-train-0123$"):
        find_label_set("some", root)


def test_reverse_model_is_part_of_the_key_by_its_content(source_set, tmp_path):
    """The model gives every row some loss: a high limit keeps all rows, and a low one drops all."""
    model = save_tiny("bart", tmp_path / "reverse")
    first = derive(source_set, reverse_model=str(model), max_reverse_loss=1000)
    assert read_label_set(first).targets["r2"] == "y"  # the first candidate is empty
    assert read_label_set(first).manifest.dropped == {}
    model.rename(tmp_path / "renamed")
    assert derive(source_set, reverse_model=str(tmp_path / "renamed"), max_reverse_loss=1000) == first
    with pytest.raises(UserError, match=r"drop every row \({'max_reverse_loss': 3, 'empty': 1}\)"):
        derive(source_set, reverse_model=str(tmp_path / "renamed"), max_reverse_loss=0.001)
    with pytest.raises(UserError, match=r"nowhere"):
        check_curation(Curation(reverse_model=str(tmp_path / "nowhere"), max_reverse_loss=2), labelled=False)
