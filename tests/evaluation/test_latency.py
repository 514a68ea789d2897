"""Timings, their table, the background load and the memory of an engine."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from raydistill.cluster.start import FORWARDED_ENV
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


@pytest.mark.parametrize(
    ("seconds", "best", "tried"),
    [
        ({8: 0.5, 4: 0.25, 2: 0.125, 1: 0.25}, 2, [8, 4, 2, 1]),
        ({8: 0.25, 4: 0.5}, 8, [8, 4]),
        ({8: 0.25, 4: 0.24}, 8, [8, 4]),  # a gain within the noise
        ({6: 1.0, 3: 0.5, 1: 0.25}, 1, [6, 3, 1]),
        ({1: 1.0}, 1, []),
    ],
)
def test_threads_are_halved_until_a_batch_takes_longer(clock, seconds, best, tried):
    opened = []

    def open_with(threads):
        opened.append(threads)
        return SimpleNamespace(make_benchmark_call=lambda workload: lambda: clock.sleep(seconds[threads]))

    assert latency.choose_threads(open_with, Workload(5, 3, 32, 2), max(seconds)) == best
    assert opened == tried


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
