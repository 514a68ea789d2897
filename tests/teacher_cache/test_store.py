"""Stores on disk: parts, manifests, records, and removal."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydistill.core.artifact import LockHeld
from raydistill.core.errors import UserError
from raydistill.core.files import SCHEMA_VERSION
from raydistill.teacher_cache import store
from raydistill.teacher_cache.builder import build_cache
from raydistill.teacher_cache.reader import open_encoder_states
from tests.factories.kills import kill_at_every_step
from tests.factories.teacher_cache import cache_examples, cache_layout


@given(st.lists(st.integers(1, 60), max_size=80))
def test_parts_hold_each_row_once_within_their_tokens(lengths):
    parts = store.plan_parts(lengths)
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    assert all(len(part) == 1 or sum(lengths[row] for row in part) <= store.PART_TOKENS for part in parts)


def test_missing_parts_are_listed_until_the_array_is_finished(tmp_path):
    store.write_part(tmp_path, 3, np.zeros((2, 4), np.float32))
    assert store.missing_parts(tmp_path, 5) == [0, 1, 2, 4]
    store.finish_array(tmp_path, 5, 32)
    assert store.missing_parts(tmp_path, 5) == []


def test_stores_are_listed_by_last_use_and_removed(teacher, tmp_path):
    layout = replace(cache_layout(tmp_path, cache_examples()), names=("bart", "news"))
    build_cache(layout, teacher)
    for folder in (layout.encoder_store, *layout.decoder_stores):
        os.utime(folder / store.ABOUT_FILE, (1, 1))
    open_encoder_states(layout)
    stores = list(store.list_stores(tmp_path))
    assert [info.folder for info in stores] == [layout.decoder_stores[0], layout.encoder_store]  # last used last
    assert [info.arrays for info in stores] == [["layer-00", "layer-02"], ["states"]]
    assert sum(info.size_bytes for info in stores) == sum(layout.array_sizes.values())
    assert (stores[0].record.teacher, stores[0].record.data) == ("bart", "news")
    store.remove(stores[1])
    assert layout.is_incomplete()
    assert [info.folder for info in store.list_stores(tmp_path)] == layout.decoder_stores


def test_a_kill_at_any_step_of_a_removal_leaves_a_whole_store_or_none(tmp_path):
    layout = cache_layout(tmp_path / "cache", cache_examples(2), encoder=False, layers=[0])
    [array] = layout.array_sizes

    def prepare():
        layout.prepare()
        store.write_part(array, 0, np.zeros((3, 16), np.float32))
        store.finish_array(array, 1, 192)

    def remove():
        for info in store.list_stores(layout.root):
            store.remove(info)

    def content(folder):
        names = [info.folder.name for info in store.list_stores(layout.root)]
        assert names in ([], [folder.name])
        return bool(names and store.open_array(array).files["part-000000.bin"])

    layout.root.mkdir()
    states = kill_at_every_step(remove, prepare, array.parent, content)
    # Steps: three for the lock, the rename. Then its fsync, the deletion of four files and two folders, the end of the
    # lock. The last value is that without a kill.
    assert states == [True] * 4 + [False] * 9


def test_store_that_is_being_built_is_not_removed(teacher, tmp_path):
    layout = cache_layout(tmp_path, cache_examples())
    build_cache(layout, teacher)
    for info in store.list_stores(tmp_path):
        with layout.lock(), pytest.raises(LockHeld, match=f"^{info.folder}: in use by process"):
            store.remove(info)
    assert not layout.is_incomplete()


@pytest.mark.parametrize("file", ["about.json", "states/manifest.json"])
def test_store_of_another_schema_version_is_refused_with_the_remedy(teacher, tmp_path, file):
    layout = cache_layout(tmp_path, cache_examples())
    build_cache(layout, teacher)
    path = layout.encoder_store / file
    record = json.loads(path.read_text())
    assert record.pop("schema") == SCHEMA_VERSION
    path.write_text(json.dumps(record))
    read = {
        "about.json": lambda: list(store.list_stores(tmp_path)),
        "states/manifest.json": lambda: store.read_device_seconds(layout.encoder_array),
    }[file]
    with pytest.raises(UserError, match=f"{path}: schema version 1, .* Move {path.parent} away or delete it"):
        read()


def test_killed_removal_is_finished_by_the_next_build(teacher, tmp_path):
    layout = cache_layout(tmp_path, cache_examples())
    build_cache(layout, teacher)
    layout.encoder_store.rename(tmp_path / f".{layout.encoder_store.name}.0123abcd.old")
    assert [info.folder for info in store.list_stores(tmp_path)] == layout.decoder_stores
    build_cache(layout, teacher)
    assert not layout.is_incomplete()
    assert {path for path in tmp_path.iterdir() if path.is_dir()} == {layout.encoder_store, *layout.decoder_stores}


def test_manifest_lists_the_bytes_of_every_part(teacher, tmp_path):
    layout = cache_layout(tmp_path, cache_examples())
    build_cache(layout, teacher)
    for array, size in layout.array_sizes.items():
        manifest = store.open_array(array)
        assert (manifest.parts, manifest.bytes) == (len(layout.parts), size)
        assert sum(n for name, n in manifest.files.items() if name.endswith(".bin")) == size
    assert store.read_device_seconds(layout.encoder_array) > 0
    assert store.read_device_seconds(layout.encoder_array) == store.open_array(layout.encoder_array).device_seconds


@pytest.mark.parametrize("group", ["x" * 300, "../other", "a/b"])
def test_a_lock_group_that_is_no_file_name_is_refused(tmp_path, group):
    layout = cache_layout(tmp_path, cache_examples())
    layout.prepare()
    path = layout.encoder_store / "about.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "lock_group": group}))
    with pytest.raises(UserError, match=f"{path}: damaged: lock_group: .*invalid lock group"):
        list(store.list_stores(tmp_path))
