"""The table of timings of a benchmark."""

import json
import multiprocessing
import platform
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from benchmarks import latency_table
from raydistill.core import artifact
from raydistill.core.errors import UserError
from raydistill.evaluation import latency
from raydistill.evaluation.latency import Timing
from raydistill.inference.decoding import Workload


def measurement(architecture="bart 2-1 d_model=8", engine="ctranslate2", precision="fp32", threads=1, **changes):
    workload = Workload(**{"beams": 4, "batch": 32, "source_tokens": 20, "output_tokens": 10, **changes})
    return latency_table.measurement_key(latency.hardware("cpu", threads), architecture, engine, precision, workload)


def test_entry_name_depends_on_every_condition():
    variants = [measurement(**{name: 1}) for name in ("beams", "batch", "source_tokens", "output_tokens")]
    variants += [
        measurement(precision="int8"),
        measurement(engine="transformers"),
        measurement("bart 2-2 d_model=8"),
        measurement(threads=2),
    ]
    variants += [{**measurement(), "name": "another CPU"}]
    assert len({latency_table.entry_name(key) for key in [measurement(), *variants]}) == 10
    assert latency_table.entry_name(dict(reversed(measurement().items()))) == latency_table.entry_name(measurement())
    assert latency_table.entry_name(measurement()).startswith("bart 2-1 ctranslate2 ")


ROWS: list[Any] = [None, 3, "text", [], {"timing": {"median_ms": 3.0}}]
TABLES: list[Any] = [None, [], 3, *({latency_table.entry_name(measurement()): row} for row in ROWS)]


def test_table_returns_recorded_timings(tmp_path):
    table, timing = tmp_path / "deep" / "latency.json", Timing(12.5, 11.0, 14.0, 5, background_cores=0.1)
    assert latency_table.lookup(table, measurement()) is None
    latency_table.record(table, measurement(), timing)
    latency_table.record(table, measurement(beams=1), Timing(1, 1, 1, 1))
    assert latency_table.lookup(table, measurement()) == timing
    assert latency_table.lookup(table, measurement(beams=1)) == Timing(1, 1, 1, 1)
    assert latency_table.lookup(table, measurement(beams=2)) is None


@pytest.mark.parametrize("timings", ["truncated", *TABLES])
def test_damaged_table_is_an_error_and_is_not_overwritten(timings, tmp_path):
    table = tmp_path / "latency.json"
    latency_table.record(table, measurement(), Timing(12.5, 11.0, 14.0, 5))
    damaged = json.dumps({"schema": 2, "timings": timings}).encode()
    if timings == "truncated":
        damaged = table.read_bytes()[:20]
    table.write_bytes(damaged)
    for access in (
        lambda: latency_table.lookup(table, measurement()),
        lambda: latency_table.record(table, measurement(), Timing(1, 1, 1, 1)),
    ):
        with pytest.raises(UserError, match=rf"{table}: damaged: .*Delete latency\.json.* to measure the latencies"):
            access()
    assert table.read_bytes() == damaged


def test_table_of_another_schema_version_is_an_error_with_a_remedy(tmp_path):
    table = tmp_path / "latency.json"
    table.write_text(json.dumps({"bart 2-1 ctranslate2 0123456789ab": {"median_ms": 3.0}}))
    for access in (
        lambda: latency_table.lookup(table, measurement()),
        lambda: latency_table.record(table, measurement(), Timing(1, 1, 1, 1)),
    ):
        with pytest.raises(UserError, match=r"latency\.json: schema version 1, .* reads 2\. Delete latency\.json"):
            access()


def test_table_entry_records_conditions_host_and_time(tmp_path):
    table = tmp_path / "latency.json"
    latency_table.record(table, measurement(), Timing(12.5, 11.0, 14.0, 5, background_cores=1.25))
    [entry] = json.loads(table.read_text())["timings"].values()
    assert (entry["timing"]["median_ms"], entry["timing"]["background_cores"]) == (12.5, 1.25)
    assert entry["host"] == platform.node()
    conditions = entry["measurement"]
    assert conditions["architecture"] == "bart 2-1 d_model=8"
    assert conditions["engine"] == f"ctranslate2 {version('ctranslate2')}"
    assert conditions["name"] == latency.hardware()["name"]
    names = ("precision", "beams", "batch", "source_tokens", "output_tokens")
    assert [conditions[name] for name in names] == ["fp32", 4, 32, 20, 10]
    assert abs(datetime.now(UTC) - datetime.fromisoformat(entry["measured_at"])) < timedelta(minutes=1)


def test_table_entry_without_background_load_is_not_noisy(tmp_path):
    table = tmp_path / "latency.json"
    timing = {"median_ms": 12.5, "low_ms": 11.0, "high_ms": 14.0, "repeats": 5, "peak_mb": 40.0}
    entry = {"timing": timing, "host": "h", "measured_at": "2026-01-01T00:00:00+00:00", "measurement": measurement()}
    table.write_text(json.dumps({"schema": 2, "timings": {latency_table.entry_name(measurement()): entry}}))
    timing = latency_table.lookup(table, measurement())
    assert timing == Timing(12.5, 11.0, 14.0, 5, 40.0)
    assert not timing.noisy


def _record_many(table: Path, worker: int) -> None:
    for i in range(20):
        latency_table.record(table, measurement(beams=worker, batch=i), Timing(worker, worker, worker, i))


def test_a_lock_of_the_table_that_is_not_released_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(latency_table, "LOCK_TIMEOUT_S", 0.1)
    table = tmp_path / "latency.json"
    with artifact.lock(table), pytest.raises(artifact.LockHeld, match=r"latency\.json: in use by process"):
        latency_table.record(table, measurement(), Timing(1, 1, 1, 1))


def test_concurrent_processes_record_all_timings(tmp_path):
    table = tmp_path / "latency.json"
    workers = [multiprocessing.Process(target=_record_many, args=(table, n)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(latency_table.lookup(table, measurement(beams=n, batch=i)) for n in range(3) for i in range(20))
