"""Reading cached states: memory mappings, and parts that are missing or damaged."""

import mmap
import shutil
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from raydistill.core.errors import UserError
from raydistill.teacher_cache import reader
from raydistill.teacher_cache.builder import build_cache
from raydistill.teacher_cache.reader import open_encoder_states
from tests.factories.teacher_cache import cache_examples, cache_layout


@pytest.fixture
def layout(teacher, tmp_path):
    layout = cache_layout(tmp_path, cache_examples())
    build_cache(layout, teacher)
    return layout


def test_number_of_mapped_parts_is_bounded(layout, monkeypatch):
    """The bound keeps a process within Linux's limit of mappings; the values do not depend on it."""
    rows = [8, 0, 5, 3]
    states = open_encoder_states(layout)

    def count_mappings():
        return Path("/proc/self/maps").read_text().count(f"{layout.encoder_store}/")

    expected = states.read_padded(rows)
    assert count_mappings() == len({int(states.part_numbers[row]) for row in rows}) > 2
    reader.map_part.cache_clear()
    monkeypatch.setattr(reader, "map_part", lru_cache(2)(reader.map_part.__wrapped__))
    for _ in range(2):
        assert torch.equal(states.read_padded(rows), expected)
        assert count_mappings() == 2


def test_read_ahead_covers_the_pages_of_each_row_and_no_others(layout, monkeypatch):
    calls = []
    monkeypatch.setattr(reader, "_madvise", lambda *arguments: calls.append(arguments))
    states = open_encoder_states(layout)
    states.read_ahead([8, 0])
    assert len(calls) == 2
    for row, (address, num_bytes, advice) in zip([8, 0], calls, strict=True):
        values = torch.from_numpy(states._read_row(row))
        start = values.data_ptr()
        assert address % mmap.PAGESIZE == 0
        assert start - mmap.PAGESIZE < address <= start
        assert address + num_bytes == start + values.nbytes
        assert advice == mmap.MADV_WILLNEED


def test_the_kernel_accepts_the_advice(layout, monkeypatch):
    libc, results = reader._libc(), []
    monkeypatch.setattr(
        reader, "_libc", lambda: SimpleNamespace(madvise=lambda *arguments: results.append(libc.madvise(*arguments)))
    )
    states = open_encoder_states(layout)
    states.read_ahead([8, 0, 5])
    assert results == [0, 0, 0]


def test_part_that_is_deleted_while_a_run_reads_it_is_reported(layout):
    states = open_encoder_states(layout)
    shutil.rmtree(layout.encoder_store)
    with pytest.raises(UserError, match="damaged or missing"):
        states.read_flat([0])


@pytest.mark.parametrize("fault", ["truncated", "missing"])
def test_damaged_part_is_reported_with_the_folder_to_delete(fault, layout):
    part = next(layout.encoder_array.glob("*.bin"))
    part.unlink() if fault == "missing" else part.write_bytes(part.read_bytes()[:-4])
    with pytest.raises(UserError, match=f"damaged: {part.name} .* Delete {layout.encoder_array} and run"):
        open_encoder_states(layout)
