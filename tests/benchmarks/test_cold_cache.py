"""The benchmark of a cold cache: its simulated disk, and that no row is read from memory."""

import argparse

import pytest

from benchmarks import cold_cache
from benchmarks.cold_cache import DISK, Measurement, SimulatedDisk, measured_steps
from raydistill.data.batching import epoch_batches
from tests.factories.clock import FakeClock


@pytest.mark.parametrize(("rows", "steps", "expected"), [(1024, 50, 15), (1000, 50, 15), (4096, 60, 60), (128, 5, 1)])
def test_steps_of_the_disk_read_no_row_twice(rows, steps, expected):
    options = argparse.Namespace(rows=rows, batch=64, steps=steps)
    assert measured_steps(options, DISK) == expected
    assert measured_steps(options, "0.5") == steps
    batches = epoch_batches([1] * rows, 64, 0, 0)[: expected + 1]  # the first step is not measured
    read = [row for batch in batches for row in batch]
    assert len(batches) == expected + 1
    assert len(set(read)) == len(read)


def test_a_store_of_one_step_is_refused():
    with pytest.raises(SystemExit, match="more than 64 rows"):
        measured_steps(argparse.Namespace(rows=64, batch=64, steps=5), DISK)


def test_transfers_are_queued_in_the_order_of_the_requests(monkeypatch):
    clock = FakeClock(now=0.0)
    monkeypatch.setattr(cold_cache, "time", clock)
    disk = SimulatedDisk(10.0)
    for row in (7, 8, 7):
        disk.request(0, row, 20)  # two seconds each; a row that is queued is not queued again
    disk.wait(0, [7])
    assert clock.now == 2
    disk.wait(0, [8])
    assert clock.now == 4
    disk.wait(0, [])
    disk.request(0, 7, 20)  # the row did not stay in memory
    disk.wait(0, [7])
    assert clock.now == 6


def test_table_has_the_rate_of_the_reads():
    """30 MB in 60 ms are 0.5 GB/s."""
    measurement = Measurement("int8", DISK, 20.0, True, 30.0, 15, 60.0, 0.5, 0.0)
    assert measurement.gbps == 0.5
    row = cold_cache.as_markdown([measurement]).splitlines()[-1]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        *("int8", "disk", "20", "30.0", "yes", "15", "60.0", "0.50", "50.0%", ""),
    ]
