"""Timings, their table, the background load and the memory of an engine."""

import hashlib
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raydistill.cluster.start import FORWARDED_ENV
from raydistill.core import artifact
from raydistill.core.errors import UserError
from raydistill.core.machine import reset_peak_rss, rss_mb
from raydistill.evaluation import latency
from raydistill.evaluation.latency import Repetition, Timing
from raydistill.inference.decoding import EngineOptions, Workload
from raydistill.inference.engines import open_engine
from raydistill.models import families, loading
from tests.factories.clock import FakeClock
from tests.factories.models import save_tiny


@pytest.fixture
def clock(monkeypatch):
    clock = FakeClock(now=0.0)
    monkeypatch.setattr(latency, "time", clock)
    return clock


def test_time_calls_reports_the_median_without_warmup(clock):
    waits = iter([0.25, 0.0625, 0.125, 0.03125])
    timing = latency.time_calls(lambda: clock.sleep(next(waits)), Repetition(3, warmup=1, min_seconds=0))
    assert timing == Timing(median_ms=62.5, low_ms=31.25, high_ms=125.0, repeats=3)


def test_time_calls_repeats_until_the_minimum_time(clock):
    timing = latency.time_calls(lambda: clock.sleep(0.125), Repetition(1, warmup=0, min_seconds=0.6))
    assert timing.repeats == 5


def test_the_limit_of_the_environment_shortens_timings(monkeypatch, clock):
    monkeypatch.setenv(latency.TIMING_LIMIT_ENV, "0.6")
    timing = latency.time_calls(lambda: clock.sleep(0.125), Repetition(1, warmup=0, min_seconds=30))
    assert timing.repeats == 5
    assert latency.limit_seconds(0.01) == 0.01
    monkeypatch.setenv(latency.TIMING_LIMIT_ENV, "short")
    with pytest.raises(UserError, match="RAYDISTILL_TIMING_SECONDS=short: expected a number"):
        latency.limit_seconds(1.0)


def test_the_limit_of_the_environment_reaches_the_workers_of_a_running_cluster():
    assert latency.TIMING_LIMIT_ENV in FORWARDED_ENV


@pytest.mark.slow
@pytest.mark.parametrize("engine_name", ["ctranslate2", "transformers"])
def test_more_output_tokens_take_longer(engine_name, tmp_path):
    folder = save_tiny("marian", tmp_path / "m")
    engine = open_engine(folder, engine_name, EngineOptions(cache_dir=tmp_path / "cache", allow_fallback=False))
    short, long = (
        latency.measure(engine, Workload(10, n, batch=4, beams=2), Repetition(min_seconds=0)) for n in (2, 40)
    )
    assert long.low_ms > 2 * short.low_ms
    assert long.background_cores is not None


def measurement(architecture="bart 2-1 d_model=8", engine="ctranslate2", precision="fp32", threads=1, **changes):
    workload = Workload(**{"beams": 4, "batch": 32, "source_tokens": 20, "output_tokens": 10, **changes})
    return latency.measurement_key(latency.hardware("cpu", threads), architecture, engine, precision, workload)


def test_entry_name_depends_on_every_condition():
    variants = [measurement(**{name: 1}) for name in ("beams", "batch", "source_tokens", "output_tokens")]
    variants += [
        measurement(precision="int8"),
        measurement(engine="transformers"),
        measurement("bart 2-2 d_model=8"),
        measurement(threads=2),
    ]
    variants += [{**measurement(), "name": "another CPU"}]
    assert len({latency.entry_name(key) for key in [measurement(), *variants]}) == 10
    assert latency.entry_name(dict(reversed(measurement().items()))) == latency.entry_name(measurement())
    assert latency.entry_name(measurement()).startswith("bart 2-1 ctranslate2 ")


ROWS: list[Any] = [None, 3, "text", [], {"timing": {"median_ms": 3.0}}]
TABLES: list[Any] = [None, [], 3, *({latency.entry_name(measurement()): row} for row in ROWS)]


def test_table_returns_recorded_timings(tmp_path):
    table, timing = tmp_path / "deep" / "latency.json", Timing(12.5, 11.0, 14.0, 5, background_cores=0.1)
    assert latency.lookup(table, measurement()) is None
    latency.record(table, measurement(), timing)
    latency.record(table, measurement(beams=1), Timing(1, 1, 1, 1))
    assert latency.lookup(table, measurement()) == timing
    assert latency.lookup(table, measurement(beams=1)) == Timing(1, 1, 1, 1)
    assert latency.lookup(table, measurement(beams=2)) is None


@pytest.mark.parametrize("timings", ["truncated", *TABLES])
def test_damaged_table_is_an_error_and_is_not_overwritten(timings, tmp_path):
    table = tmp_path / "latency.json"
    latency.record(table, measurement(), Timing(12.5, 11.0, 14.0, 5))
    damaged = json.dumps({"schema": 2, "timings": timings}).encode()
    if timings == "truncated":
        damaged = table.read_bytes()[:20]
    table.write_bytes(damaged)
    for access in (
        lambda: latency.lookup(table, measurement()),
        lambda: latency.record(table, measurement(), Timing(1, 1, 1, 1)),
    ):
        with pytest.raises(UserError, match=rf"{table}: damaged: .*Delete latency\.json.* to measure the latencies"):
            access()
    assert table.read_bytes() == damaged


def test_table_of_another_schema_version_is_an_error_with_a_remedy(tmp_path):
    table = tmp_path / "latency.json"
    table.write_text(json.dumps({"bart 2-1 ctranslate2 0123456789ab": {"median_ms": 3.0}}))
    for access in (
        lambda: latency.lookup(table, measurement()),
        lambda: latency.record(table, measurement(), Timing(1, 1, 1, 1)),
    ):
        with pytest.raises(UserError, match=r"latency\.json: schema version 1, .* reads 2\. Delete latency\.json"):
            access()


def test_table_entry_records_conditions_host_and_time(tmp_path):
    table = tmp_path / "latency.json"
    latency.record(table, measurement(), Timing(12.5, 11.0, 14.0, 5, background_cores=1.25))
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
    table.write_text(json.dumps({"schema": 2, "timings": {latency.entry_name(measurement()): entry}}))
    timing = latency.lookup(table, measurement())
    assert timing == Timing(12.5, 11.0, 14.0, 5, 40.0)
    assert not timing.noisy


def test_background_load_is_the_cpu_time_of_others_on_the_own_cores(monkeypatch, clock):
    """In two seconds, cores 0 and 2 are busy for 3.5 seconds, of which this process used 2."""

    def busy(seconds):
        return SimpleNamespace(user=seconds, nice=0.0, system=0.0, steal=0.0, idle=7.0)

    cores = [busy(100.0), busy(100.0), busy(100.0)]
    monkeypatch.setattr(latency, "available_cores", lambda: {0, 2})
    monkeypatch.setattr(latency, "psutil", SimpleNamespace(cpu_times=lambda percpu: cores))
    load = latency.BackgroundLoad()
    clock.now, clock.cpu_seconds = 2.0, 2.0
    cores[:] = [
        SimpleNamespace(user=101.0, nice=0.25, system=0.25, steal=0.5, idle=99.0),
        busy(900.0),  # not a core of this process
        busy(101.5),
    ]
    assert load.mean_cores() == 0.75
    clock.cpu_seconds = 4.0  # ticks of the system are coarser than the process's own clock
    assert load.mean_cores() == 0.0


@pytest.mark.slow
def test_background_load_of_real_processes():
    """This process keeps two cores busy for a second; then another process keeps one busy."""

    def own_work():
        threads = [threading.Thread(target=hashlib.pbkdf2_hmac, args=("sha256", b"", b"", 500_000)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def load_during(work):
        load = latency.BackgroundLoad()
        work()
        return load.mean_cores()

    quiet = min(load_during(own_work) for _ in range(3))
    worker = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        busy = min(load_during(lambda: time.sleep(0.5)) for _ in range(3))
    finally:
        worker.kill()
        worker.wait()
    assert busy > 0.5
    if os.getloadavg()[0] < 1:  # otherwise other processes of this machine are busy, too
        assert quiet < 0.5


def test_timing_is_noisy_above_the_limit_of_background_load():
    assert not Timing(1, 1, 1, 1).noisy
    assert not Timing(1, 1, 1, 1, background_cores=latency.MAX_BACKGROUND_CORES).noisy
    assert Timing(1, 1, 1, 1, background_cores=1.0).noisy


def _record_many(table: Path, worker: int) -> None:
    for i in range(20):
        latency.record(table, measurement(beams=worker, batch=i), Timing(worker, worker, worker, i))


def test_a_lock_of_the_table_that_is_not_released_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "LOCK_TIMEOUT_S", 0.1)
    table = tmp_path / "latency.json"
    with artifact.lock(table), pytest.raises(artifact.LockHeld, match=r"latency\.json: in use by process"):
        latency.record(table, measurement(), Timing(1, 1, 1, 1))


def test_concurrent_processes_record_all_timings(tmp_path):
    table = tmp_path / "latency.json"
    workers = [multiprocessing.Process(target=_record_many, args=(table, n)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(latency.lookup(table, measurement(beams=n, batch=i)) for n in range(3) for i in range(20))


def test_hardware_describes_the_machine():
    machine = latency.hardware("cpu", 2)
    assert (machine["kind"], machine["threads"]) == ("cpu", 2)
    assert machine["name"]
    assert int(machine["cores"]) >= 1


def test_peak_memory_includes_freed_blocks_and_current_memory_does_not():
    before = rss_mb()
    assert before is not None
    reset_peak_rss()
    block = b"x" * 40_000_000
    during = rss_mb()
    del block
    peak = rss_mb(peak=True)
    after = rss_mb()
    assert during is not None
    assert peak is not None
    assert after is not None
    # Other threads of this process may allocate or free some memory meanwhile
    assert during - before > 35
    assert peak - before > 35
    assert after < during - 35


def test_peak_memory_of_an_engine_includes_its_weights(tmp_path):
    folder = save_tiny("bart", tmp_path / "m", d_model=256, ffn_dim=2048, decoder_layers=6)
    before = latency.used_memory_mb("cpu")
    engine = open_engine(folder, "transformers")
    timing = latency.measure(engine, Workload(10, 5, batch=32, beams=2), Repetition(min_seconds=0), before)
    weights = families.weights_mb(loading.load_config(folder))
    assert weights > 30
    assert timing.peak_mb is not None
    assert weights < timing.peak_mb < 10 * weights
