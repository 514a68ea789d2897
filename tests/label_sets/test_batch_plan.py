"""Batch plans: every row once, batches within the limits, and the same plan for a resumed job."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydistill.core.errors import UserError
from raydistill.core.files import SCHEMA_VERSION
from raydistill.data.corpus import Row
from raydistill.label_sets.batch_plan import make_plan, open_plan
from tests.factories.kills import check_synced_before_publication, record_syncs_and_renames


def rows_of_lengths(lengths):
    return [Row(("f", i), f"r{i}", "x" * n, f"t{i}") for i, n in enumerate(lengths)]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60),
    window=st.integers(1, 25),
    chars=st.integers(1, 150),
    max_rows=st.integers(1, 8),
)
def test_every_row_is_planned_once_within_the_limits(tmp_path_factory, lengths, window, chars, max_rows):
    rows = rows_of_lengths(lengths)
    folder = tmp_path_factory.mktemp("plan")
    plan = make_plan(iter(rows), folder, window_rows=window, batch_chars=chars, batch_rows=max_rows)
    batches = [plan.read_batch(n) for n in range(len(plan))]
    assert sorted(row_id for b in batches for row_id in b["ids"]) == sorted(row.id for row in rows)
    by_id = {row.id: row for row in rows}
    for batch in batches:
        sizes = [len(source) for source in batch["sources"]]
        assert sizes == sorted(sizes, reverse=True)
        assert len(sizes) <= max_rows
        assert sum(sizes) <= chars or len(sizes) == 1
        assert [by_id[i].target for i in batch["ids"]] == batch["targets"]
    assert plan.batch_rows == [len(b["ids"]) for b in batches]
    assert plan.batch_chars == [sum(map(len, b["sources"])) for b in batches]
    restored = []
    for number in range(plan.num_windows):
        ids, order = plan.read_order(number)
        in_window = [batches[n] for n in plan.batches_in_window(number)]
        assert [row_id for batch in in_window for row_id in batch["ids"]] == ids.to_pylist()
        targets = [target for batch in in_window for target in batch["targets"]]
        restored += [(ids[i].as_py(), targets[i]) for i in order]
    assert restored == [(row.id, row.target) for row in rows]
    assert open_plan(folder) == plan


def test_batches_hold_rows_of_similar_length_within_a_window(tmp_path):
    lengths = [random.Random(1).randint(1, 100) for _ in range(200)]
    plan = make_plan(iter(rows_of_lengths(lengths)), tmp_path, window_rows=100, batch_chars=500, batch_rows=10)
    for window in range(2):
        sizes = [len(s) for n in plan.batches_in_window(window) for s in plan.read_batch(n)["sources"]]
        assert sizes == sorted(lengths[100 * window : 100 * window + 100], reverse=True)


def test_incomplete_plan_is_replaced(tmp_path):
    make_plan(iter(rows_of_lengths([5, 6, 7])), tmp_path / "plan", window_rows=1)
    (tmp_path / "plan" / "manifest.json").unlink()
    assert open_plan(tmp_path / "plan") is None
    plan = make_plan(iter(rows_of_lengths([5])), tmp_path / "plan", window_rows=1)
    assert sorted(p.name for p in (tmp_path / "plan").iterdir()) == ["manifest.json", "window-00000.parquet"]
    assert len(plan) == 1


def test_every_window_is_synced_before_the_plan_is_published(tmp_path, monkeypatch):
    events = record_syncs_and_renames(monkeypatch)
    make_plan(iter(rows_of_lengths([5, 6, 7])), tmp_path / "plan", window_rows=2)
    assert len(list((tmp_path / "plan").glob("window-*.parquet"))) == 2
    check_synced_before_publication(events, tmp_path / "plan")


def test_characters_beyond_max_source_chars_are_not_counted(tmp_path):
    plan = make_plan(iter(rows_of_lengths([1000, 2000, 5, 3000])), tmp_path, batch_chars=60, max_source_chars=20)
    assert plan.batch_rows == [3, 1]
    assert plan.batch_chars == [60, 5]
    assert [len(source) for source in plan.read_batch(0)["sources"]] == [1000, 2000, 3000]


def test_plan_of_another_schema_version_is_refused_with_the_remedy(tmp_path):
    make_plan(iter(rows_of_lengths([5])), tmp_path / "plan")
    path = tmp_path / "plan" / "manifest.json"
    record = json.loads(path.read_text())
    assert record.pop("schema") == SCHEMA_VERSION
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"manifest.json: schema version 1, .* Move .*/plan away or delete it"):
        open_plan(tmp_path / "plan")
