"""Reading a split row by row, and planning it: nothing lost, nothing twice, the same plan for a resumed job."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydistill.config.run import Dataset
from raydistill.core.errors import UserError
from raydistill.data.corpus import Row, read_corpus
from raydistill.data.streaming import scan, usable_rows
from raydistill.label_sets.batch_plan import make_plan, open_plan


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Dataset(name=str(path))


def rows_of(lengths):
    return [Row(("f", i), f"r{i}", "x" * n, f"t{i}") for i, n in enumerate(lengths)]


# Reading


def test_a_scan_knows_a_corpus_as_reading_it_whole_does(tmp_path):
    pairs = [{"id": f"r{i}", "source": f"text {i}", "target": f"title {i}"} for i in range(20)]
    data = write_rows(tmp_path / "train.jsonl", pairs)
    whole, found = read_corpus(data, "train"), scan(data, "train")
    assert (found.rows, found.fingerprint, found.labelled, found.skipped) == (20, whole.fingerprint, True, 0)
    again = list(usable_rows(data, "train", found))
    assert [(r.id, r.source, r.target) for r in again] == [(p["id"], p["source"], p["target"]) for p in pairs]
    first = data.model_copy(update={"train_rows": 7})
    assert scan(first, "train").fingerprint == read_corpus(first, "train").fingerprint
    assert len(list(usable_rows(first, "train", scan(first, "train")))) == 7


def test_one_row_without_a_target_makes_the_split_unlabelled(tmp_path):
    data = write_rows(tmp_path / "train.jsonl", [{"source": "a", "target": "b"}, {"source": "c", "target": ""}])
    found = scan(data, "train")
    assert not found.labelled
    assert found.fingerprint == read_corpus(data, "train", need_targets=False).fingerprint
    assert [row.target for row in usable_rows(data, "train", found)] == ["", ""]


def test_repeated_ids_are_refused_with_both_rows(tmp_path):
    rows = [{"id": "a", "source": "x"}, {"id": "b", "source": "y"}, {"id": "a", "source": "z"}]
    with pytest.raises(
        UserError, match=r"1 rows whose id is not unique.*\n.*jsonl:3: id 'a' is also that of .*jsonl:1"
    ):
        scan(write_rows(tmp_path / "train.jsonl", rows), "train")


def test_ids_are_unique_over_all_files_of_a_split(tmp_path):
    for n in (1, 2):
        write_rows(tmp_path / f"train-0000{n}.jsonl", [{"id": "same", "source": "x"}])
    with pytest.raises(UserError, match=r"train-00002.jsonl:1: id 'same' is also that of .*train-00001.jsonl:1"):
        scan(Dataset(name=str(tmp_path)), "train")


def test_bad_rows_stop_a_scan_or_are_counted(tmp_path):
    data = write_rows(tmp_path / "train.jsonl", [{"source": "x"}, {"source": 3}, {"source": " "}])
    with pytest.raises(UserError, match=r"2 rows that cannot be used"):
        scan(data, "train")
    skipping = data.model_copy(update={"skip_bad_rows": True})
    assert (scan(skipping, "train").rows, scan(skipping, "train").skipped) == (1, 2)


def test_data_that_changes_while_it_is_read_is_refused(tmp_path):
    data = write_rows(tmp_path / "train.jsonl", [{"source": "x"}, {"source": "y"}])
    found = scan(data, "train")
    write_rows(tmp_path / "train.jsonl", [{"source": "x"}, {"source": "Y"}])
    with pytest.raises(UserError, match="changed while it was read"):
        list(usable_rows(data, "train", found))


# Planning


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60),
    window=st.integers(1, 25),
    chars=st.integers(1, 150),
    most=st.integers(1, 8),
)
def test_every_row_is_planned_once_within_the_limits(tmp_path_factory, lengths, window, chars, most):
    rows = rows_of(lengths)
    folder = tmp_path_factory.mktemp("plan")
    plan = make_plan(iter(rows), folder, window_rows=window, batch_chars=chars, batch_rows=most)
    batches = [plan.read_batch(n) for n in range(len(plan))]
    assert sorted(row_id for b in batches for row_id in b["ids"]) == sorted(row.id for row in rows)
    by_id = {row.id: row for row in rows}
    for batch in batches:
        sizes = [len(source) for source in batch["sources"]]
        assert sizes == sorted(sizes, reverse=True)
        assert len(sizes) <= most
        assert sum(sizes) <= chars or len(sizes) == 1
        assert [by_id[i].target for i in batch["ids"]] == batch["targets"]
    assert plan.rows == [len(b["ids"]) for b in batches]
    assert plan.chars == [sum(map(len, b["sources"])) for b in batches]
    restored = [row for w in range(len(plan.windows)) for row in plan.read_targets(w)]
    assert restored == [(row.id, row.target) for row in rows]
    assert open_plan(folder) == plan


def test_neighbours_in_length_go_together_within_a_window(tmp_path):
    lengths = [random.Random(1).randint(1, 100) for _ in range(200)]
    plan = make_plan(iter(rows_of(lengths)), tmp_path, window_rows=100, batch_chars=500, batch_rows=10)
    for window in range(2):
        sizes = [len(s) for n in plan.batches_of(window) for s in plan.read_batch(n)["sources"]]
        assert sizes == sorted(lengths[100 * window : 100 * window + 100], reverse=True)


def test_a_plan_that_was_not_finished_is_made_anew(tmp_path):
    make_plan(iter(rows_of([5, 6, 7])), tmp_path / "plan", window_rows=1)
    (tmp_path / "plan" / "plan.json").unlink()
    assert open_plan(tmp_path / "plan") is None
    plan = make_plan(iter(rows_of([5])), tmp_path / "plan", window_rows=1)
    assert sorted(p.name for p in (tmp_path / "plan").iterdir()) == ["plan.json", "window-00000.parquet"]
    assert len(plan) == 1


def test_what_a_teacher_does_not_read_of_a_long_source_is_not_counted(tmp_path):
    plan = make_plan(iter(rows_of([1000, 2000, 5, 3000])), tmp_path, batch_chars=60, max_chars=20)
    assert plan.rows == [3, 1]
    assert plan.chars == [60, 5]
    assert [len(source) for source in plan.read_batch(0)["sources"]] == [1000, 2000, 3000]
