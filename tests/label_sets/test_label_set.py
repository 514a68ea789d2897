"""Label sets on disk: complete or absent, in the order of the data, and refused with a remedy if damaged."""

import json
import os
import sys
from subprocess import PIPE, Popen

import pyarrow.parquet as pq
import pytest

from raydistill.config.label_sources import LabelSource
from raydistill.core.artifact import is_complete
from raydistill.core.errors import UserError
from raydistill.core.files import SCHEMA_VERSION
from raydistill.label_sets import label_set
from raydistill.label_sets.label_set import (
    Candidate,
    label_set_key,
    list_label_sets,
    read_candidates,
    read_label_set,
    write_label_set,
)
from raydistill.label_sets.manifest import LabelManifest
from raydistill.label_sets.mixing import select_targets
from raydistill.labels import app, find_label_set
from tests.factories.kills import check_synced_before_publication, kill_at_every_step, record_syncs_and_renames
from tests.factories.label_sets import LABEL_ROWS, pseudolabel_manifest, write_labels, write_manifest_by_hand

LINES = [
    {"id": "a", "target": "Ein Hund.", "rank": 0, "score": -0.5},
    {"id": "a", "target": "Zwei Hunde.", "rank": 1, "score": -0.75},
    {"id": "b", "target": "Über Öl – schön.", "rank": 0, "score": -1.25},
    {"id": "c", "target": "", "rank": 0, "score": -2.0},
]


def test_written_set_is_read_back_with_the_best_candidates_as_targets(tmp_path):
    write_labels(tmp_path / "set")
    labels = read_label_set(tmp_path / "set")
    assert labels.targets == {"a": "Ein Hund.", "b": "Über Öl – schön.", "c": ""}
    size = (tmp_path / "set" / "part-00000.parquet").stat().st_size
    assert labels.manifest == LabelManifest(rows=3, files={"part-00000.parquet": size})
    assert pq.read_table(tmp_path / "set" / "part-00000.parquet").to_pylist() == LINES
    assert list(read_candidates(tmp_path / "set")) == LABEL_ROWS
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["manifest.json", "part-00000.parquet", "set"]


def test_every_part_is_synced_before_the_set_is_published(tmp_path, monkeypatch):
    monkeypatch.setattr(label_set, "PART_ROWS", 2)
    events = record_syncs_and_renames(monkeypatch)
    write_labels(tmp_path / "set", [*LABEL_ROWS, ("d", "empty")])
    names = ["dropped.parquet", "manifest.json", "part-00000.parquet", "part-00001.parquet"]
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == names
    check_synced_before_publication(events, tmp_path / "set")


def test_rows_are_divided_over_parts_without_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(label_set, "PART_ROWS", 3)
    rows = [(str(i), [Candidate(f"text {i}", 0.0)]) for i in range(7)]
    write_labels(tmp_path / "set", iter(rows), LabelManifest(rows=7))
    assert len(list((tmp_path / "set").glob("part-*.parquet"))) == 3
    assert read_label_set(tmp_path / "set").targets == {str(i): f"text {i}" for i in range(7)}


def test_failed_write_leaves_no_files_and_keeps_an_existing_folder(tmp_path):
    def rows_until_failure():
        yield LABEL_ROWS[0]
        raise RuntimeError("the teacher failed")

    with pytest.raises(RuntimeError, match="the teacher failed"):
        write_labels(tmp_path / "set", rows_until_failure())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "set").mkdir()  # left by a machine whose upload was interrupted, for example
    (tmp_path / "set" / "part-00000.parquet").write_text("incomplete")
    with pytest.raises(RuntimeError, match="the teacher failed"):
        write_labels(tmp_path / "set", rows_until_failure(), LabelManifest(rows=1))
    assert (tmp_path / "set" / "part-00000.parquet").read_text() == "incomplete"
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_complete_set_is_not_overwritten(tmp_path):
    write_labels(tmp_path / "set")
    before = {path: path.stat().st_ino for path in (tmp_path / "set").iterdir()}
    write_labels(tmp_path / "set", LABEL_ROWS[:1], LabelManifest(rows=1))
    assert {path: path.stat().st_ino for path in (tmp_path / "set").iterdir()} == before


def test_manifest_is_written_after_all_parts(tmp_path, monkeypatch):
    files_before_part = []
    real = pq.ParquetWriter

    def watched(path, schema):
        files_before_part.append(sorted(p.name for p in path.parent.iterdir()))
        return real(path, schema)

    monkeypatch.setattr(pq, "ParquetWriter", watched)
    monkeypatch.setattr(label_set, "PART_ROWS", 2)
    write_labels(tmp_path / "set")
    assert files_before_part == [[], ["part-00000.parquet"]]
    assert is_complete(tmp_path / "set")


def test_part_is_written_in_row_groups_of_the_buffer_size(tmp_path, monkeypatch):
    monkeypatch.setattr(label_set, "WRITE_BUFFER_ROWS", 2)
    monkeypatch.setattr(label_set, "PART_ROWS", 5)
    write_labels(
        tmp_path / "set",
        [row for i in range(4) for row in ((f"d{i}", "empty"), (f"{i}", LABEL_ROWS[0][1]))],
        LabelManifest(rows=4),
    )
    groups = {path.name: pq.ParquetFile(path).metadata for path in (tmp_path / "set").glob("*.parquet")}
    assert {name: [m.row_group(i).num_rows for i in range(m.num_row_groups)] for name, m in groups.items()} == {
        "part-00000.parquet": [2, 2, 1],
        "part-00001.parquet": [2, 1],
        "dropped.parquet": [2, 2],
    }
    assert read_label_set(tmp_path / "set").targets == {str(i): "Ein Hund." for i in range(4)}


KILLED = """
import os, pathlib, sys, time
from raydistill.label_sets import label_set as labels
from raydistill.label_sets.manifest import LabelManifest

labels.WRITE_BUFFER_ROWS, labels.PART_ROWS = 2, 4
def wait(*_):
    print("waiting", flush=True)
    time.sleep(600)

def rows():
    for i in range(9):
        yield str(i), [labels.Candidate(f"text {i}", 0.0)]
    if sys.argv[2] == "rows":
        wait()

os.rename = wait
labels.write_label_set(pathlib.Path(sys.argv[1]), rows(), lambda: LabelManifest(rows=9))
"""


@pytest.mark.parametrize("folder_exists", [False, True])
def test_a_kill_at_any_step_leaves_the_complete_set_or_none(tmp_path, monkeypatch, folder_exists):
    monkeypatch.setattr(label_set, "PART_ROWS", 2)
    folder = tmp_path / "labels" / "set"
    folder.parent.mkdir()

    def prepare():
        if folder_exists:
            folder.mkdir()
            (folder / "part-00000.parquet").write_text("incomplete")

    def content(folder):
        if not is_complete(folder):
            return None
        labels = read_label_set(folder)
        return labels.targets, labels.dropped_ids

    def rows():
        for row in [*LABEL_ROWS, ("d", "empty")]:
            os.utime(folder.parent)  # a step, so that a kill occurs before every row, too
            yield row

    def write():
        write_labels(folder, rows())

    contents = kill_at_every_step(write, prepare, folder, content)
    complete = ({"a": "Ein Hund.", "b": "Über Öl – schön.", "c": ""}, {"d"})
    # Steps: the temporary folder, four rows, fsync of three files and a folder, five for the manifest, the rename. Then
    # the fsync of the parent folder and the unlink of what is left; after an incomplete folder also the second rename
    # and the deletion of a manifest, a file and a folder. The last value is that without a kill.
    assert contents == [None] * 15 + [complete] * (7 if folder_exists else 3)
    write()
    assert [path.name for path in folder.parent.iterdir()] == ["set"]


@pytest.mark.parametrize("moment", ["rows", "rename"])
def test_killed_writer_leaves_no_complete_set_and_the_next_writer_removes_what_is_left(tmp_path, moment):
    """SIGKILL before the manifest is written, and after that before the folder is renamed."""
    with Popen([sys.executable, "-c", KILLED, str(tmp_path / "set"), moment], stdout=PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"waiting\n"
        writer.kill()
    [left] = tmp_path.iterdir()
    assert len(list(left.glob("part-*"))) >= 2
    assert (left / "manifest.json").is_file() == (moment == "rename")
    assert list_label_sets(tmp_path) == ([], [])
    with pytest.raises(UserError, match=r"no such label set .*: none"):
        find_label_set("set", tmp_path)
    write_labels(tmp_path / "set")
    assert list(tmp_path.iterdir()) == [tmp_path / "set"]
    assert list(read_label_set(tmp_path / "set").targets) == ["a", "b", "c"]


def test_folder_without_manifest_is_incomplete(tmp_path):
    write_labels(tmp_path / "set")
    (tmp_path / "set" / "manifest.json").unlink()
    assert not is_complete(tmp_path / "set")
    with pytest.raises(UserError, match=r"set: no complete label set .*`raydistill pseudolabel`"):
        read_label_set(tmp_path / "set")


@pytest.mark.parametrize("damage", ["part", "no parts", "manifest", "manifest without rows", "manifest is a list"])
def test_damaged_set_is_refused_by_name(tmp_path, damage):
    folder = tmp_path / "set"
    write_labels(folder)
    part, manifest = folder / "part-00000.parquet", folder / "manifest.json"
    if damage == "part":
        part.write_bytes(part.read_bytes()[:-20])
    elif damage == "no parts":
        part.unlink()
    else:
        no_rows = json.dumps({"schema": SCHEMA_VERSION, "teacher": "t"})
        texts = {"manifest": "{", "manifest without rows": no_rows, "manifest is a list": "[3]"}
        manifest.write_text(texts[damage])
    with pytest.raises(UserError, match=r"/set(/manifest\.json)?: .*(damaged|make the label set again)"):
        read_label_set(folder)


def test_row_count_that_differs_from_the_manifest_is_refused_with_both_numbers(tmp_path):
    write_labels(tmp_path / "set", LABEL_ROWS, LabelManifest(rows=4))
    with pytest.raises(UserError, match="counts 4 rows but the parts hold 3"):
        read_label_set(tmp_path / "set")


def test_key_depends_on_teacher_data_and_decoding():
    keys = {
        label_set_key("t", "d", {"beams": 4}),
        label_set_key("u", "d", {"beams": 4}),
        label_set_key("t", "e", {"beams": 4}),
        label_set_key("t", "d", {"beams": 5}),
    }
    assert len(keys) == 4
    assert label_set_key("t", "d", {"a": 1, "b": 2}) == label_set_key("t", "d", {"b": 2, "a": 1})


def test_unknown_manifest_keys_are_kept(tmp_path):
    write_labels(tmp_path / "x", LABEL_ROWS, LabelManifest.model_validate({"rows": 3, "made": "elsewhere"}))
    assert json.loads((tmp_path / "x" / "manifest.json").read_text())["made"] == "elsewhere"


def test_set_whose_manifest_was_written_by_hand_is_readable(tmp_path):
    write_labels(tmp_path / "x")
    write_manifest_by_hand(tmp_path / "x", rows=3)
    labels = read_label_set(tmp_path / "x")
    assert labels.targets == {"a": "Ein Hund.", "b": "Über Öl – schön.", "c": ""}
    assert labels.manifest == LabelManifest(rows=3)


def test_manifest_may_count_the_written_rows(tmp_path):
    count = []

    def rows():
        for row in LABEL_ROWS:
            count.append(row)
            yield row

    write_label_set(tmp_path / "set", rows(), lambda: LabelManifest(rows=len(count)))
    assert read_label_set(tmp_path / "set").manifest.rows == 3


def test_dropped_rows_have_a_reason_and_are_not_missing_rows(tmp_path):
    write_labels(tmp_path / "set", [("b", "min_rouge2"), LABEL_ROWS[0], ("c", "empty")], LabelManifest(rows=1))
    labels = read_label_set(tmp_path / "set")
    assert labels.dropped_ids == {"b", "c"}
    assert label_set.read_dropped(tmp_path / "set") == [("b", "min_rouge2"), ("c", "empty")]
    sources, label_sets = [LabelSource("pseudo")], {"pseudo": labels}
    assert select_targets(["b", "a", "c"], ["x"] * 3, sources, label_sets) == ([1], ["Ein Hund."])
    with pytest.raises(UserError, match=r"1 of 2 training rows have no pseudo-label \(first: 'd'\)"):
        select_targets(["a", "d"], ["x", "y"], sources, label_sets)


def test_duplicate_row_and_missing_rank_are_damage(tmp_path):
    write_labels(tmp_path / "set", [*LABEL_ROWS, LABEL_ROWS[0]], LabelManifest(rows=4))
    with pytest.raises(UserError, match="counts 4 rows but the parts hold 3"):
        read_label_set(tmp_path / "set")
    lines = pq.read_table(tmp_path / "set" / "part-00000.parquet")
    pq.write_table(lines.slice(1), tmp_path / "set" / "part-00000.parquet")
    write_manifest_by_hand(tmp_path / "set", rows=3)
    with pytest.raises(UserError, match="row 'a' does not have each candidate once"):
        read_label_set(tmp_path / "set")


def test_complete_sets_are_listed_and_unreadable_ones_are_reported(tmp_path):
    for name in ("b", "a", "broken"):
        write_labels(tmp_path / name, LABEL_ROWS, pseudolabel_manifest())
    (tmp_path / "broken" / "manifest.json").write_text("{")
    (tmp_path / "unfinished").mkdir()
    write_labels(tmp_path / "foreign")
    write_manifest_by_hand(tmp_path / "foreign", teacher={"name": "t"}, rows=3, metric="bleu")
    label_sets, errors = list_label_sets(tmp_path)
    assert [folder.name for folder, _ in label_sets] == ["a", "b"]
    assert [str(error).partition(":")[0] for error in errors] == [
        str(tmp_path / name) for name in ("broken/manifest.json", "foreign")
    ]
    assert list_label_sets(tmp_path / "nothing") == ([], [])


@pytest.mark.parametrize("command", ["list", "describe SET", "compare SET SET", "curate SET --keep max_copy_rate=0.5"])
def test_commands_report_the_keys_that_a_foreign_manifest_lacks(tmp_path, capsys, monkeypatch, command):
    folder = tmp_path / "labels" / "foreign"
    write_labels(folder, LABEL_ROWS)
    write_manifest_by_hand(folder, rows=3)
    words = command.replace("SET", str(folder)).split()
    monkeypatch.setattr(sys, "argv", ["raydistill", *words, "--root", str(folder.parent)])
    if command == "list":
        app(standalone_mode=False)
        assert f"skipped: {folder}: manifest.json lacks device_hours, teacher, " in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match=r"foreign: manifest.json lacks .*metric.* `raydistill pseudolabel`"):
            app(standalone_mode=False)
    assert len(read_label_set(folder).targets) == 3  # it can be trained on


@pytest.mark.parametrize("old", [{"rows": 3}, {"schema": 1, "rows": 3}])
def test_set_of_another_schema_version_is_refused_with_the_remedy(tmp_path, old):
    folder = tmp_path / "set"
    write_labels(folder)
    assert json.loads((folder / "manifest.json").read_text())["schema"] == SCHEMA_VERSION
    (folder / "manifest.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match=r"set/manifest.json: schema version 1, .* Move .*/set away or delete it"):
        read_label_set(folder)
