"""Comparisons of two latencies in pairs: when a comparison ends, what it drops, and what it decides."""

import itertools
import random
import subprocess
import sys
import time

import pytest
from pydantic import ValidationError

from raydistill.evaluation import latency, paired_latency
from raydistill.evaluation.latency import MAX_BACKGROUND_CORES
from raydistill.evaluation.paired_latency import (
    Pair,
    PairedTiming,
    StoppingRule,
    compare_pairs,
    may_exclude,
    time_pairs,
)
from raydistill.inference.decoding import EngineOptions, Workload
from raydistill.inference.engines import open_engine
from tests.factories.clock import FakeClock
from tests.factories.models import save_tiny

RULE = StoppingRule(max_seconds=10_000)


def make_pair(ratio, cores=0.0, seconds=1.0):
    return Pair(baseline_ms=(100.0,), student_ms=(100.0 * ratio,), seconds=seconds, background_cores=cores)


def ratios_around(center, spread):
    """Endless pairs whose ratios are between `center` -/+ `spread`."""
    source = random.Random(0)
    return (make_pair(center + source.uniform(-spread, spread)) for _ in itertools.count())


@pytest.fixture
def no_background_load(monkeypatch):
    """Drop no pair, whatever runs on the machine of this test."""
    monkeypatch.setattr(paired_latency, "MAX_BACKGROUND_CORES", 1e9)


@pytest.fixture
def clock(monkeypatch):
    clock = FakeClock(now=0.0)
    for module in (latency, paired_latency):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_clear_ratio_is_decided_after_15_pairs():
    timing = compare_pairs(ratios_around(0.5, 0.2), [0.8], RULE)
    assert (timing.stop_reason, timing.decided(0.8), len(timing.pairs)) == ("bounds_cleared", "below", 15)
    timing = compare_pairs(ratios_around(0.5, 0.2), [0.2], RULE)
    assert (timing.stop_reason, timing.decided(0.2), len(timing.pairs)) == ("bounds_cleared", "above", 15)


def test_a_comparison_continues_until_all_bounds_are_cleared():
    timing = compare_pairs(ratios_around(0.5, 0.2), [0.8, 0.55], RULE)
    assert timing.stop_reason == "bounds_cleared"
    assert (timing.decided(0.8), timing.decided(0.55)) == ("below", "below")
    assert len(timing.pairs) > 15


def test_a_ratio_at_the_bound_is_undecided_when_the_interval_is_precise():
    timing = compare_pairs(ratios_around(0.5, 0.1), [0.5], RULE)
    assert (timing.stop_reason, timing.decided(0.5)) == ("precise", "undecided")
    assert timing.ratio is not None
    assert timing.interval is not None
    assert timing.ratio / 1.02 <= timing.interval[0] <= 0.5 <= timing.interval[1] <= 1.02 * timing.ratio
    shorter = compare_pairs(timing.pairs[:-1], [0.5], RULE)
    assert shorter.interval is not None
    assert shorter.ratio is not None
    assert shorter.interval[0] < shorter.ratio / 1.02 or shorter.interval[1] > 1.02 * shorter.ratio


def test_without_a_bound_a_comparison_continues_until_the_interval_is_precise():
    assert compare_pairs(ratios_around(0.5, 0.001), [], RULE).stop_reason == "precise"
    assert len(compare_pairs(ratios_around(0.5, 0.2), [], RULE).pairs) > 100


def test_the_time_limit_ends_a_comparison_without_a_decision(monkeypatch):
    timing = compare_pairs(ratios_around(0.5, 0.2), [0.5], StoppingRule(max_seconds=20))
    assert (timing.stop_reason, timing.decided(0.5), len(timing.pairs)) == ("time_limit", "undecided", 20)
    early = compare_pairs(ratios_around(0.5, 0.2), [0.9], StoppingRule(max_seconds=14))
    assert (early.stop_reason, early.decided(0.9), early.interval) == ("time_limit", "undecided", None)
    monkeypatch.setenv("RAYDISTILL_TIMING_SECONDS", "14")
    assert compare_pairs(ratios_around(0.5, 0.2), [0.9], RULE) == early


def test_noisy_pairs_are_kept_but_not_counted():
    busy = (make_pair(9.0, cores=MAX_BACKGROUND_CORES + 0.01) for _ in itertools.count())
    quiet = ratios_around(0.5, 0.2)
    timing = compare_pairs((next(quiet if n % 3 else busy) for n in itertools.count()), [0.8], RULE)
    assert (timing.valid_pairs, timing.dropped_pairs, len(timing.pairs)) == (15, 8, 23)
    assert timing.decided(0.8) == "below"
    assert timing.background_cores == pytest.approx(8 * (MAX_BACKGROUND_CORES + 0.01) / 23)
    assert timing.interval == compare_pairs(ratios_around(0.5, 0.2), [0.8], RULE).interval


def test_too_many_noisy_pairs_are_reported():
    timing = compare_pairs([make_pair(0.5, cores=2.0)] * 100, [0.8], StoppingRule(max_seconds=40))
    assert (timing.stop_reason, timing.decided(0.8), len(timing.pairs)) == ("noisy", "undecided", 40)
    assert (timing.ratio, timing.interval) == (None, None)
    mixed = compare_pairs([make_pair(0.5), make_pair(0.5, cores=2.0)] * 50, [0.5], StoppingRule(max_seconds=20))
    assert (mixed.stop_reason, mixed.ratio, mixed.interval) == ("noisy", 0.5, None)


def test_the_ratio_is_the_median_of_the_pairs_medians():
    pairs = [
        Pair(baseline_ms=(10.0, 90.0, 20.0), student_ms=(10.0,), seconds=1, background_cores=0),  # 10 / 20
        Pair(baseline_ms=(10.0,), student_ms=(1.0, 3.0), seconds=1, background_cores=0),  # 2 / 10
        Pair(baseline_ms=(10.0,), student_ms=(80.0,), seconds=1, background_cores=0),
    ]
    assert compare_pairs(pairs, [], RULE).ratio == pytest.approx(0.5)


def test_a_timing_is_frozen_and_survives_json():
    timing = compare_pairs(ratios_around(0.5, 0.2), [0.8], RULE)
    assert PairedTiming.model_validate_json(timing.model_dump_json()) == timing
    with pytest.raises(ValidationError, match="frozen"):
        timing.ratio = 0.1
    with pytest.raises(ValidationError, match="Extra inputs"):
        PairedTiming(**{**timing.model_dump(), "speed": 1})
    with pytest.raises(ValidationError, match="greater than 0"):
        make_pair(0.0)


def test_a_shape_is_excluded_only_if_its_whole_interval_is_above_the_bound_with_its_margin():
    timing = compare_pairs(ratios_around(0.5, 0.01), [], RULE)
    assert timing.interval is not None
    lower = timing.interval[0]
    assert may_exclude(timing, lower / 1.31)
    assert not may_exclude(timing, lower / 1.29)
    assert not may_exclude(compare_pairs([], [0.1], RULE), 0.1)


def test_calls_alternate_and_all_their_times_are_kept(clock, no_background_load):
    order: list[str] = []

    def call(name, seconds):
        order.append(name)
        clock.sleep(seconds)

    timing = time_pairs(
        lambda: call("B", 0.125), lambda: call("S", 0.03125), [2.0], StoppingRule(min_pairs=10, max_seconds=30)
    )
    # Long calls are timed once per pair; short ones are repeated, with an untimed call before them.
    assert {pair.student_ms for pair in timing.pairs} == {(31.25, 31.25, 31.25, 31.25)}
    assert {pair.baseline_ms for pair in timing.pairs} == {(125.0,)}
    assert {pair.seconds for pair in timing.pairs} == {0.125 + 5 * 0.03125}
    assert "".join(order) == "BBSS" + "BSSSSSSSSSSB" * 5
    assert timing.ratio == pytest.approx(0.25)
    assert timing.decided(2.0) == "below"


def test_the_background_load_of_each_pair_is_measured(clock, monkeypatch):
    """Each measurement of the load begins before the calls of its pair and ends after them."""
    starts = []

    class Load:
        def __init__(self):
            starts.append(clock.now)

        def mean_cores(self):
            return clock.now - starts[-1]  # above the limit

    monkeypatch.setattr(paired_latency, "BackgroundLoad", Load)
    timing = time_pairs(lambda: clock.sleep(0.25), lambda: clock.sleep(0.375), [0.5], StoppingRule(max_seconds=2))
    assert [pair.background_cores for pair in timing.pairs] == [0.625] * 4
    assert (timing.stop_reason, timing.dropped_pairs) == ("noisy", 4)


@pytest.mark.slow
def test_pairs_next_to_a_busy_process_are_noisy():
    worker = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        timing = time_pairs(lambda: time.sleep(0.1), lambda: time.sleep(0.1), [0.5], StoppingRule(max_seconds=2))
    finally:
        worker.kill()
        worker.wait()
    assert timing.stop_reason == "noisy"
    assert timing.dropped_pairs >= len(timing.pairs) / 2
    assert timing.background_cores > MAX_BACKGROUND_CORES


@pytest.mark.slow
def test_a_shallow_ctranslate2_student_is_faster_than_its_teacher(tmp_path, no_background_load):
    calls = []
    for layers in (6, 1):
        folder = save_tiny("marian", tmp_path / str(layers), decoder_layers=layers)
        engine = open_engine(folder, "ctranslate2", EngineOptions(cache_dir=tmp_path / "cache", allow_fallback=False))
        calls.append(engine.make_benchmark_call(Workload(10, 20, batch=4, beams=2)))
    timing = time_pairs(*calls, [0.9], StoppingRule(max_seconds=120))
    assert timing.decided(0.9) == "below"
    assert timing.stop_reason == "bounds_cleared"
