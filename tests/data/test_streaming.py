"""Reading a split row by row: the checks and the fingerprint of `read_corpus`, without holding the rows."""

import json

import pytest

from raydistill.config.run import Dataset
from raydistill.core.errors import UserError
from raydistill.data.corpus import read_corpus
from raydistill.data.streaming import scan_split, usable_rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Dataset(name=str(path))


def test_scan_counts_and_fingerprints_a_split_as_read_corpus(tmp_path):
    pairs = [{"id": f"r{i}", "source": f"text {i}", "target": f"title {i}"} for i in range(20)]
    data = write_rows(tmp_path / "train.jsonl", pairs)
    whole, scan = read_corpus(data, "train"), scan_split(data, "train")
    assert (scan.rows, scan.fingerprint, scan.labelled, scan.skipped) == (20, whole.fingerprint, True, 0)
    again = list(usable_rows(data, "train", scan))
    assert [(r.id, r.source, r.target) for r in again] == [(p["id"], p["source"], p["target"]) for p in pairs]
    first = data.model_copy(update={"train_rows": 7})
    assert scan_split(first, "train").fingerprint == read_corpus(first, "train").fingerprint
    assert len(list(usable_rows(first, "train", scan_split(first, "train")))) == 7


def test_one_row_without_a_target_makes_the_split_unlabelled(tmp_path):
    data = write_rows(tmp_path / "train.jsonl", [{"source": "a", "target": "b"}, {"source": "c", "target": ""}])
    scan = scan_split(data, "train")
    assert not scan.labelled
    assert scan.fingerprint == read_corpus(data, "train", need_targets=False).fingerprint
    assert [row.target for row in usable_rows(data, "train", scan)] == ["", ""]


def test_duplicate_ids_are_refused_with_both_locations(tmp_path):
    rows = [{"id": "a", "source": "x"}, {"id": "b", "source": "y"}, {"id": "a", "source": "z"}]
    with pytest.raises(
        UserError, match=r"1 rows whose id is not unique.*\n.*jsonl:3: duplicate id 'a', first seen at .*jsonl:1"
    ):
        scan_split(write_rows(tmp_path / "train.jsonl", rows), "train")


def test_ids_must_be_unique_over_all_files_of_a_split(tmp_path):
    for n in (1, 2):
        write_rows(tmp_path / f"train-0000{n}.jsonl", [{"id": "same", "source": "x"}])
    with pytest.raises(
        UserError, match=r"train-00002.jsonl:1: duplicate id 'same', first seen at .*train-00001.jsonl:1"
    ):
        scan_split(Dataset(name=str(tmp_path)), "train")


def test_bad_rows_stop_a_scan_unless_they_are_skipped_and_counted(tmp_path):
    data = write_rows(tmp_path / "train.jsonl", [{"source": "x"}, {"source": 3}, {"source": " "}])
    with pytest.raises(UserError, match=r"2 rows that cannot be used"):
        scan_split(data, "train")
    skipping = data.model_copy(update={"skip_bad_rows": True})
    assert (scan_split(skipping, "train").rows, scan_split(skipping, "train").skipped) == (1, 2)


def test_data_that_changes_between_scan_and_reading_is_refused(tmp_path):
    data = write_rows(tmp_path / "train.jsonl", [{"source": "x"}, {"source": "y"}])
    scan = scan_split(data, "train")
    write_rows(tmp_path / "train.jsonl", [{"source": "x"}, {"source": "Y"}])
    with pytest.raises(UserError, match="changed while it was read"):
        list(usable_rows(data, "train", scan))
