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

import pytest
import transformers

from raydistill.config.run import Dataset
from raydistill.evaluation import latency
from raydistill.evaluation.latency import Timing
from raydistill.inference.engines import open_engine
from raydistill.models import loading
from raydistill.models.teacher import open_teacher
from raydistill.search.shape_latency import time_shape
from tests.factories.models import save_tiny


def bart(**changes) -> transformers.BartConfig:
    sizes = dict(
        vocab_size=100,
        d_model=8,
        encoder_layers=2,
        decoder_layers=1,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_position_embeddings=30,
    )
    return transformers.BartConfig(**{**sizes, **changes})


def test_parameters_are_counted_by_hand_with_the_embedding_once():
    attention = 4 * (8 * 8 + 8)
    norm = 16
    ffn = 8 * 32 + 32 + 32 * 8 + 8
    encoder = attention + norm + ffn + norm
    decoder = 2 * (attention + norm) + ffn + norm
    positions = (30 + 2) * 8
    wanted = 100 * 8 + 2 * encoder + decoder + 2 * (positions + norm)
    assert latency.count_parameters(bart()) == wanted
    assert latency.memory_mb(bart()) == pytest.approx(4 * wanted / 1e6)
    assert latency.memory_mb(bart(), "bf16") == pytest.approx(2 * wanted / 1e6)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_parameters_from_the_config_equal_those_of_the_model(family, tmp_path):
    folder = save_tiny(family, tmp_path)
    model = loading.load_model(folder)
    assert latency.count_parameters(loading.load_config(folder)) == sum(p.numel() for p in model.parameters())


def test_time_calls_takes_the_median_and_leaves_the_warm_up_out():
    waits = iter([0.2, 0.01, 0.05, 0.01])
    timing = latency.time_calls(lambda: time.sleep(next(waits)), repeats=3, warmup=1, min_seconds=0)
    assert timing.repeats == 3
    assert 10 <= timing.low_ms <= timing.median_ms < 50 <= timing.high_ms < 200


def test_time_calls_goes_on_for_the_least_time():
    timing = latency.time_calls(lambda: time.sleep(0.01), repeats=1, warmup=0, min_seconds=0.05)
    assert 2 <= timing.repeats <= 5


@pytest.mark.parametrize("kind", ["ctranslate2", "transformers"])
def test_more_output_takes_longer(kind, tmp_path):
    folder = save_tiny("marian", tmp_path / "m")
    engine = open_engine(folder, kind, cache_dir=tmp_path / "cache", allow_fallback=False)
    short, long = (latency.measure(engine, 10, n, batch=4, beams=2, min_seconds=0) for n in (2, 40))
    assert long.low_ms > 2 * short.low_ms
    assert long.background_cores is not None


def test_shape_differs_where_the_cost_does_and_not_where_only_the_rates_do():
    assert latency.architecture_key(bart()) == latency.architecture_key(bart(dropout=0.3))
    for change in ({"decoder_layers": 2}, {"d_model": 16}, {"decoder_ffn_dim": 64}, {"vocab_size": 99}):
        assert latency.architecture_key(bart()) != latency.architecture_key(bart(**change))


def facts(shape="bart 2-1 d_model=8", engine="ctranslate2", precision="fp32", threads=1, **how):
    how = {"beams": 4, "batch": 32, "source_tokens": 20, "output_tokens": 10, **how}
    return latency.measurement_key(latency.hardware("cpu", threads), shape, engine, precision, **how)


def test_key_depends_on_each_of_its_facts():
    others = [facts(**{name: 1}) for name in ("beams", "batch", "source_tokens", "output_tokens")]
    others += [facts(precision="int8"), facts(engine="transformers"), facts("bart 2-2 d_model=8"), facts(threads=2)]
    others += [{**facts(), "name": "another CPU"}]
    assert len({latency.entry_name(one) for one in [facts(), *others]}) == 10
    assert latency.entry_name(dict(reversed(facts().items()))) == latency.entry_name(facts())
    assert latency.entry_name(facts()).startswith("bart 2-1 ctranslate2 ")


def test_table_returns_what_was_recorded_and_survives_damage(tmp_path):
    table, one = tmp_path / "deep" / "latency.json", Timing(12.5, 11.0, 14.0, 5, background_cores=0.1)
    assert latency.lookup(table, facts()) is None
    latency.record(table, facts(), one)
    latency.record(table, facts(beams=1), Timing(1, 1, 1, 1))
    assert latency.lookup(table, facts()) == one
    table.write_bytes(table.read_bytes()[:20])
    assert latency.lookup(table, facts()) is None
    for nonsense in (None, 3, "text", [], {"median_ms": 3.0}):
        table.write_text(json.dumps({latency.entry_name(facts()): nonsense}))
        assert latency.lookup(table, facts()) is None
    latency.record(table, facts(), one)
    assert latency.lookup(table, facts()) == one


def test_a_row_of_the_table_tells_a_person_what_was_timed_where_and_when(tmp_path):
    table = tmp_path / "latency.json"
    latency.record(table, facts(), Timing(12.5, 11.0, 14.0, 5, background_cores=1.25))
    [row] = json.loads(table.read_text()).values()
    assert (row["median_ms"], row["others"], row["host"]) == (12.5, 1.25, platform.node())
    assert row["facts"]["shape"] == "bart 2-1 d_model=8"
    assert row["facts"]["engine"] == f"ctranslate2 {version('ctranslate2')}"
    assert row["facts"]["name"] == latency.hardware()["name"]
    assert {name: row["facts"][name] for name in ("precision", "beams", "batch", "source_tokens", "output_tokens")} == {
        **{"precision": "fp32", "beams": 4, "batch": 32, "source_tokens": 20, "output_tokens": 10}
    }
    assert abs(datetime.now(UTC) - datetime.fromisoformat(row["date"])) < timedelta(minutes=1)


def test_a_row_of_before_its_facts_were_kept_is_read_and_knows_of_no_others(tmp_path):
    table = tmp_path / "latency.json"
    old = {"median_ms": 12.5, "low_ms": 11.0, "high_ms": 14.0, "repeats": 5, "peak_mb": 40.0}
    table.write_text(json.dumps({latency.entry_name(facts()): old}))
    found = latency.lookup(table, facts())
    assert found == Timing(12.5, 11.0, 14.0, 5, 40.0)
    assert not found.noisy


def test_what_others_do_meanwhile_is_seen_and_what_this_process_does_is_not():
    """A second of two cores of one's own, then a second beside a process that takes all it gets."""

    def own_work():
        threads = [threading.Thread(target=hashlib.pbkdf2_hmac, args=("sha256", b"", b"", 500_000)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def seen(during):
        others = latency.BackgroundLoad()
        during()
        return others.mean_cores()

    quiet = min(seen(own_work) for _ in range(3))
    worker = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        beside = min(seen(lambda: time.sleep(0.5)) for _ in range(3))
    finally:
        worker.kill()
        worker.wait()
    assert beside > 0.5
    if os.getloadavg()[0] < 1:  # else others are at work here, too
        assert quiet < 0.5


def test_a_timing_beside_much_other_work_is_disturbed():
    assert not Timing(1, 1, 1, 1).noisy
    assert not Timing(1, 1, 1, 1, background_cores=latency.MAX_BACKGROUND_CORES).noisy
    assert Timing(1, 1, 1, 1, background_cores=1.0).noisy


def test_a_shape_is_timed_once_and_again_only_where_others_disturbed_it(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))
    teacher = open_teacher(str(save_tiny("bart", tmp_path / "m")), Dataset(name="demo"))
    about = {"tokens": {"source": 5, "output": 3}, "engine": "transformers fp32"}

    def timed(anew=True):
        [row] = time_shape(teacher, "2-1", about, [1], "transformers", "cpu", 1, anew)
        return row

    assert timed()["latency_ms"] < 9e9
    table = tmp_path / "home" / "latency.json"
    for others, again in ((0.2, False), (3.0, True)):
        rows = json.loads(table.read_text())
        assert len(rows) == 2  # 32 rows and one
        table.write_text(json.dumps({k: {**row, "median_ms": 9e9, "others": others} for k, row in rows.items()}))
        assert timed(anew=False)["latency_ms"] == 9e9  # the trials of a sweep that is under way have this measure
        found = timed()
        assert (found["latency_ms"] < 9e9) == again
        if not again:
            assert found["others"] == 0.2
    assert all(row["median_ms"] < 9e9 for row in json.loads(table.read_text()).values())
    # An engine that could not be used this time leaves no row under its name.
    before = json.loads(table.read_text())
    assert time_shape(teacher, "2-2", {**about, "engine": "ctranslate2 fp32"}, [1], "transformers", "cpu", 1)
    assert json.loads(table.read_text()) == before


def _record_many(table: Path, who: int) -> None:
    for i in range(20):
        latency.record(table, facts(beams=who, batch=i), Timing(who, who, who, i))


def test_processes_that_record_at_once_lose_nothing(tmp_path):
    table = tmp_path / "latency.json"
    workers = [multiprocessing.Process(target=_record_many, args=(table, who)) for who in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(latency.lookup(table, facts(beams=who, batch=i)) for who in range(3) for i in range(20))


def test_hardware_names_the_machine():
    machine = latency.hardware("cpu", 2)
    assert (machine["kind"], machine["threads"]) == ("cpu", 2)
    assert machine["name"]
    assert int(machine["cores"]) >= 1


def test_peak_memory_is_what_was_held_at_most_and_given_back():
    """40 MB held for a moment within a call, over what was held before."""
    before = latency.rss_mb("cpu")
    assert before is not None
    latency.reset_peak_rss()
    block = b"x" * 40_000_000
    held = latency.rss_mb("cpu")
    del block
    peak = latency.rss_mb("cpu", peak=True)
    after = latency.rss_mb("cpu")
    assert held is not None
    assert peak is not None
    assert after is not None
    assert 39 < held - before < 45
    assert 39 < peak - before < 45
    assert after - before < 5


def test_an_engine_holds_at_least_its_weights(tmp_path):
    folder = save_tiny("bart", tmp_path / "m", d_model=256, ffn_dim=2048, decoder_layers=6)
    before = latency.rss_mb("cpu")
    engine = open_engine(folder, "transformers")
    timing = latency.measure(engine, 10, 5, batch=32, beams=2, min_seconds=0, rss_before_mb=before)
    weights = latency.memory_mb(loading.load_config(folder))
    assert weights > 30
    assert timing.peak_mb is not None
    assert weights < timing.peak_mb < 10 * weights
