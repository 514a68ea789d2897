"""Label sets on disk, and which targets a run trains on."""

import json
import sys
from subprocess import PIPE, Popen

import pyarrow.parquet as pq
import pytest

from raydistill.config.label_sources import LabelSource, parse_labels
from raydistill.core.errors import UserError
from raydistill.label_sets import label_set
from raydistill.label_sets.label_set import (
    Candidate,
    LabelSet,
    is_complete,
    label_set_key,
    list_label_sets,
    read_candidates,
    read_label_set,
    select_targets,
    write_label_set,
)
from raydistill.labels import app, find_label_set
from tests.factories.label_sets import LABEL_ROWS, PSEUDOLABEL_MANIFEST

LINES = [
    {"id": "a", "target": "Ein Hund.", "rank": 0, "score": -0.5},
    {"id": "a", "target": "Zwei Hunde.", "rank": 1, "score": -0.75},
    {"id": "b", "target": "Über Öl – schön.", "rank": 0, "score": -1.25},
    {"id": "c", "target": "", "rank": 0, "score": -2.0},
]
MANIFEST = {"teacher": "t", "rows": 3}


def write(folder, rows=LABEL_ROWS, manifest=MANIFEST):
    write_label_set(folder, rows, lambda: manifest)


def test_what_is_written_is_read_back_and_only_the_best_candidate_is_a_target(tmp_path):
    write(tmp_path / "set", LABEL_ROWS, MANIFEST)
    found = read_label_set(tmp_path / "set")
    assert found.targets == {"a": "Ein Hund.", "b": "Über Öl – schön.", "c": ""}
    assert found.manifest == MANIFEST
    assert pq.read_table(tmp_path / "set" / "part-00000.parquet").to_pylist() == LINES
    assert list(read_candidates(tmp_path / "set")) == LABEL_ROWS
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["manifest.json", "part-00000.parquet", "set"]


def test_many_rows_go_into_parts_and_none_is_lost_between_them(tmp_path, monkeypatch):
    monkeypatch.setattr(label_set, "PART_ROWS", 3)
    rows = [(str(i), [Candidate(f"text {i}", 0.0)]) for i in range(7)]
    write(tmp_path / "set", iter(rows), {"rows": 7})
    assert len(list((tmp_path / "set").glob("part-*.parquet"))) == 3
    assert read_label_set(tmp_path / "set").targets == {str(i): f"text {i}" for i in range(7)}


def test_a_set_that_fails_half_way_leaves_nothing_and_keeps_the_old_one(tmp_path):
    def breaks():
        yield LABEL_ROWS[0]
        raise RuntimeError("the teacher died")

    with pytest.raises(RuntimeError, match="died"):
        write(tmp_path / "set", breaks(), MANIFEST)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "set", LABEL_ROWS, MANIFEST)
    with pytest.raises(RuntimeError, match="died"):
        write(tmp_path / "set", breaks(), {"rows": 1})
    assert read_label_set(tmp_path / "set").manifest == MANIFEST
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_finished_set_is_left_to_those_who_read_it(tmp_path):
    write(tmp_path / "set")
    before = {path: path.stat().st_ino for path in (tmp_path / "set").iterdir()}
    write(tmp_path / "set", LABEL_ROWS[:1], {"rows": 1})
    assert {path: path.stat().st_ino for path in (tmp_path / "set").iterdir()} == before


def test_the_manifest_is_written_after_every_part(tmp_path, monkeypatch):
    seen = []
    real = pq.ParquetWriter

    def watched(path, schema):
        seen.append(sorted(p.name for p in path.parent.iterdir()))
        return real(path, schema)

    monkeypatch.setattr(pq, "ParquetWriter", watched)
    monkeypatch.setattr(label_set, "PART_ROWS", 2)
    write(tmp_path / "set", LABEL_ROWS, MANIFEST)
    assert seen == [[], ["part-00000.parquet"]]
    assert is_complete(tmp_path / "set")


def test_a_part_is_written_bit_by_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(label_set, "WRITE_BUFFER_ROWS", 2)
    monkeypatch.setattr(label_set, "PART_ROWS", 5)
    write(
        tmp_path / "set",
        [row for i in range(4) for row in ((f"d{i}", "empty"), (f"{i}", LABEL_ROWS[0][1]))],
        {"rows": 4},
    )
    groups = {path.name: pq.ParquetFile(path).metadata for path in (tmp_path / "set").glob("*.parquet")}
    assert {name: [m.row_group(i).num_rows for i in range(m.num_row_groups)] for name, m in groups.items()} == {
        "part-00000.parquet": [2, 2, 1],
        "part-00001.parquet": [2, 1],
        "dropped.parquet": [2, 2],
    }
    assert read_label_set(tmp_path / "set").targets == {str(i): "Ein Hund." for i in range(4)}


KILLED = """
import pathlib, sys, time
from raydistill.label_sets import label_set as labels

labels.WRITE_BUFFER_ROWS, labels.PART_ROWS = 2, 4
def here(*_):
    print("here", flush=True)
    time.sleep(600)

def rows():
    for i in range(9):
        yield str(i), [labels.Candidate(f"text {i}", 0.0)]
    if sys.argv[2] == "rows":
        here()

pathlib.Path.rename = here
labels.write_label_set(pathlib.Path(sys.argv[1]), rows(), lambda: {"rows": 9})
"""


@pytest.mark.parametrize("where", ["rows", "rename"])
def test_a_killed_writer_leaves_nothing_to_be_taken_for_a_set_and_the_next_one_clears_up(tmp_path, where):
    """SIGKILL after two parts and before the manifest, and after the manifest and before the folder has its name."""
    with Popen([sys.executable, "-c", KILLED, str(tmp_path / "set"), where], stdout=PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"here\n"
        writer.kill()
    [left] = tmp_path.iterdir()
    assert len(list(left.glob("part-*"))) >= 2
    assert (left / "manifest.json").is_file() == (where == "rename")
    assert list_label_sets(tmp_path) == ([], [])
    with pytest.raises(UserError, match=r"no such label set .*: none"):
        find_label_set("set", tmp_path)
    write(tmp_path / "set")
    assert list(tmp_path.iterdir()) == [tmp_path / "set"]
    assert list(read_label_set(tmp_path / "set").targets) == ["a", "b", "c"]


def test_a_folder_without_a_manifest_is_unfinished(tmp_path):
    write(tmp_path / "set", LABEL_ROWS, MANIFEST)
    (tmp_path / "set" / "manifest.json").unlink()
    assert not is_complete(tmp_path / "set")
    with pytest.raises(UserError, match=r"set: no finished label set .*`raydistill pseudolabel`"):
        read_label_set(tmp_path / "set")


@pytest.mark.parametrize("damage", ["part", "no parts", "manifest", "manifest without rows", "manifest is a list"])
def test_a_damaged_set_is_refused_by_name(tmp_path, damage):
    folder = tmp_path / "set"
    write(folder)
    part, manifest = folder / "part-00000.parquet", folder / "manifest.json"
    if damage == "part":
        part.write_bytes(part.read_bytes()[:-20])
    elif damage == "no parts":
        part.unlink()
    else:
        texts = {"manifest": "{", "manifest without rows": '{"teacher": "t"}', "manifest is a list": "[3]"}
        manifest.write_text(texts[damage])
    with pytest.raises(UserError, match=r"/set(/manifest\.json)?: .*(damaged|make it again)"):
        read_label_set(folder)


def test_a_count_that_does_not_fit_the_manifest_is_refused_with_both_numbers(tmp_path):
    write(tmp_path / "set", LABEL_ROWS, {"rows": 4})
    with pytest.raises(UserError, match="counts 4 rows but the parts hold 3"):
        read_label_set(tmp_path / "set")


def test_another_decoding_teacher_or_text_is_another_set():
    names = {
        label_set_key("t", "d", {"beams": 4}),
        label_set_key("u", "d", {"beams": 4}),
        label_set_key("t", "e", {"beams": 4}),
        label_set_key("t", "d", {"beams": 5}),
    }
    assert len(names) == 4
    assert label_set_key("t", "d", {"a": 1, "b": 2}) == label_set_key("t", "d", {"b": 2, "a": 1})


IDS, ORIGINALS = ["a", "b", "c"], ["one", "two", "three"]


def pseudo(tmp_path, **targets):
    return LabelSet(tmp_path / "set", {}, targets or {"c": "DREI", "a": "EINS", "b": "ZWEI", "z": "not of this data"})


def targets_of(ids, originals, source, found):
    """`select_targets` with one label set for every source that needs one."""
    parts = parse_labels(source)
    return select_targets(ids, originals, parts, {part.spec: found for part in parts} if found else {})


def test_original_labels_are_the_corpus_itself(tmp_path):
    assert targets_of(IDS, ORIGINALS, "original", None) == ([0, 1, 2], ORIGINALS)
    assert targets_of(IDS, ORIGINALS, "original", pseudo(tmp_path)) == ([0, 1, 2], ORIGINALS)


@pytest.mark.parametrize("labels", ["pseudo", "some/folder"])
def test_pseudo_labels_are_matched_by_id_not_by_place(tmp_path, labels):
    assert targets_of(IDS, ORIGINALS, labels, pseudo(tmp_path)) == ([0, 1, 2], ["EINS", "ZWEI", "DREI"])


def test_original_and_pseudo_pair_each_source_twice(tmp_path):
    rows, targets = targets_of(IDS, ORIGINALS, "original+pseudo", pseudo(tmp_path))
    assert rows == [0, 1, 2, 0, 1, 2]
    assert targets == ["one", "two", "three", "EINS", "ZWEI", "DREI"]


def test_empty_pseudo_labels_are_left_out_but_their_originals_stay(tmp_path):
    some = pseudo(tmp_path, a="EINS", b=" \n", c="DREI")
    assert targets_of(IDS, ORIGINALS, "pseudo", some) == ([0, 2], ["EINS", "DREI"])
    assert targets_of(IDS, ORIGINALS, "original+pseudo", some)[0] == [0, 1, 2, 0, 2]


def test_only_empty_pseudo_labels_are_nothing_to_train_on(tmp_path):
    with pytest.raises(UserError, match="every pseudo-label is empty or was dropped"):
        targets_of(IDS, ORIGINALS, "pseudo", pseudo(tmp_path, a="", b="", c=""))


def test_rows_without_a_pseudo_label_are_refused_with_their_number(tmp_path):
    with pytest.raises(UserError, match=r"2 of 3 training rows have no pseudo-label \(first: 'b'\)"):
        targets_of(IDS, ORIGINALS, "pseudo", pseudo(tmp_path, a="EINS"))


def test_pseudo_labels_without_a_set_are_refused():
    with pytest.raises(UserError, match="needs a label set"):
        targets_of(IDS, ORIGINALS, "original+pseudo", None)


def test_several_teachers_labels_stand_beside_the_original_with_weights(tmp_path):
    """The paper's Orig+PL+PL; a weight says how often an epoch reads a source."""
    other = pseudo(tmp_path, a="UNO", b="DOS", c="TRES")
    parts = parse_labels("original*2 + pseudo + sets/other")
    assert [(p.spec, p.other_teacher) for p in parse_labels("pseudo+pseudo@pegasus")] == [
        ("pseudo", None),
        ("pseudo@pegasus", "pegasus"),
    ]
    assert parts == [LabelSource("original", 2.0), LabelSource("pseudo", 1.0), LabelSource("sets/other", 1.0)]
    rows, targets = select_targets(IDS, ORIGINALS, parts, {"pseudo": pseudo(tmp_path), "sets/other": other})
    assert rows == [0, 0, 1, 1, 2, 2, 0, 1, 2, 0, 1, 2]
    assert targets[:6] == ["one", "one", "two", "two", "three", "three"]
    assert targets[6:] == ["EINS", "ZWEI", "DREI", "UNO", "DOS", "TRES"]


def test_a_weight_below_one_takes_a_fixed_share_of_the_rows():
    ids = [f"row {i}" for i in range(4000)]
    rows, _ = select_targets(ids, ids, parse_labels("original*0.25"), {})
    assert len(set(rows)) == len(rows)
    assert len(rows) == pytest.approx(1000, abs=100)  # a binomial's 95 % are within 54
    again, _ = select_targets(ids[::-1], ids[::-1], parse_labels("original*0.25"), {})
    assert {ids[i] for i in rows} == {ids[::-1][i] for i in again}
    more, _ = select_targets(ids, ids, parse_labels("original*1.25"), {})
    assert len(more) == 4000 + len(rows)


def test_halves_of_two_sources_are_not_of_the_same_rows(tmp_path):
    ids = [f"row {i}" for i in range(1000)]
    rows, _ = targets_of(ids, ids, "original*0.5+pseudo*0.5", pseudo(tmp_path, **dict.fromkeys(ids, "x")))
    assert len(set(rows)) == pytest.approx(750, abs=40)  # 1 - 0.5 x 0.5 of them; a binomial's 95 % are within 27


@pytest.mark.parametrize("wrong", ["original+", "pseudo*", "pseudo*0", "pseudo*-1", "pseudo*inf", "pseudo*x", ""])
def test_what_is_no_source_is_said(wrong):
    with pytest.raises(
        ValueError,
        match=r"invalid label source .*; expected original, pseudo, pseudo@TEACHER or the folder of a label set",
    ):
        parse_labels(wrong)
    with pytest.raises(ValueError, match=r"pseudo is given twice.*pseudo\*2"):
        parse_labels("pseudo+pseudo")


def test_the_fingerprint_says_what_students_are_trained_on(tmp_path):
    write(tmp_path / "x", LABEL_ROWS, MANIFEST)
    write(tmp_path / "y", [*LABEL_ROWS[2:], *LABEL_ROWS[:2]], {"rows": 3, "made": "elsewhere"})
    write(tmp_path / "z", [("a", [Candidate("Kein Hund.", -0.5)]), *LABEL_ROWS[1:]], MANIFEST)
    x, y, z = (read_label_set(tmp_path / name).fingerprint for name in "xyz")
    assert x == y != z
    assert json.loads((tmp_path / "y" / "manifest.json").read_text())["made"] == "elsewhere"


def test_the_manifest_may_count_what_was_written(tmp_path):
    count = []

    def rows():
        for row in LABEL_ROWS:
            count.append(row)
            yield row

    write_label_set(tmp_path / "set", rows(), lambda: {"rows": len(count)})
    assert read_label_set(tmp_path / "set").manifest == {"rows": 3}


def test_dropped_rows_are_known_by_reason_and_are_no_gap(tmp_path):
    write(tmp_path / "set", [("b", "min_rouge2"), LABEL_ROWS[0], ("c", "empty")], {"rows": 1})
    found = read_label_set(tmp_path / "set")
    assert found.dropped_ids == {"b", "c"}
    assert label_set.read_dropped(tmp_path / "set") == [("b", "min_rouge2"), ("c", "empty")]
    assert targets_of(["b", "a", "c"], ORIGINALS, "pseudo", found) == ([1], ["Ein Hund."])
    with pytest.raises(UserError, match=r"1 of 2 training rows have no pseudo-label \(first: 'd'\)"):
        targets_of(["a", "d"], ["x", "y"], "pseudo", found)


def test_a_row_that_stands_twice_or_lacks_a_rank_is_damage(tmp_path):
    write(tmp_path / "set", [*LABEL_ROWS, LABEL_ROWS[0]], {"rows": 4})
    with pytest.raises(UserError, match="counts 4 rows but the parts hold 3"):
        read_label_set(tmp_path / "set")
    lines = pq.read_table(tmp_path / "set" / "part-00000.parquet")
    pq.write_table(lines.slice(1), tmp_path / "set" / "part-00000.parquet")
    with pytest.raises(UserError, match="row 'a' does not have its candidates once each"):
        read_label_set(tmp_path / "set")


def test_sets_are_listed_and_what_is_none_is_named(tmp_path):
    for name in ("b", "a", "broken"):
        write(tmp_path / name, LABEL_ROWS, PSEUDOLABEL_MANIFEST)
    (tmp_path / "broken" / "manifest.json").write_text("{")
    (tmp_path / "unfinished").mkdir()
    write(tmp_path / "foreign", LABEL_ROWS, {"teacher": {"name": "t"}, "rows": 3, "metric": "bleu"})
    found, wrong = list_label_sets(tmp_path)
    assert [folder.name for folder, _ in found] == ["a", "b"]
    assert [str(error).partition(":")[0] for error in wrong] == [
        str(tmp_path / name) for name in ("broken/manifest.json", "foreign")
    ]
    assert list_label_sets(tmp_path / "nothing") == ([], [])


@pytest.mark.parametrize("command", ["list", "describe SET", "compare SET SET", "curate SET --keep max_copy_rate=0.5"])
def test_a_foreign_manifest_is_named_and_not_stumbled_over(tmp_path, capsys, monkeypatch, command):
    folder = tmp_path / "labels" / "foreign"
    write(folder, LABEL_ROWS, {"rows": 3})
    words = command.replace("SET", str(folder)).split()
    monkeypatch.setattr(sys, "argv", ["raydistill", *words, "--root", str(folder.parent)])
    if command == "list":
        app(standalone_mode=False)
        assert f"skipped: {folder}: its manifest.json lacks teacher.name, " in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match=r"foreign: its manifest.json lacks .*metric.* `raydistill pseudolabel`"):
            app(standalone_mode=False)
    assert len(read_label_set(folder).targets) == 3  # it can be trained on
