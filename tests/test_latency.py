import multiprocessing
import time
from pathlib import Path

import pytest
import transformers

from raydistill.evaluation import latency
from raydistill.evaluation.latency import Timing
from raydistill.model import teachers
from raydistill.model.generate import open_engine
from tests.tiny import save_tiny


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
    assert latency.parameters(bart()) == wanted
    assert latency.memory_mb(bart()) == pytest.approx(4 * wanted / 1e6)
    assert latency.memory_mb(bart(), "bf16") == pytest.approx(2 * wanted / 1e6)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_parameters_from_the_config_equal_those_of_the_model(family, tmp_path):
    folder = save_tiny(family, tmp_path)
    model = teachers.load_model(folder)
    assert latency.parameters(teachers.load_config(folder)) == sum(p.numel() for p in model.parameters())


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
    engine = open_engine(folder, kind, cache=tmp_path / "cache", allow_fallback=False)
    short, long = (latency.measure(engine, 10, n, batch=4, beams=2, min_seconds=0) for n in (2, 40))
    assert long.low_ms > 2 * short.low_ms


def test_shape_differs_where_the_cost_does_and_not_where_only_the_rates_do():
    assert latency.shape(bart()) == latency.shape(bart(dropout=0.3))
    for change in ({"decoder_layers": 2}, {"d_model": 16}, {"decoder_ffn_dim": 64}, {"vocab_size": 99}):
        assert latency.shape(bart()) != latency.shape(bart(**change))


def test_key_depends_on_each_of_its_facts():
    machine = latency.hardware("cpu", 1)
    facts = dict(beams=4, batch=32, source_tokens=20, output_tokens=10)
    names = {latency.key(machine, "bart 2-1", "ctranslate2", "fp32", **facts)}
    for fact in facts:
        names.add(latency.key(machine, "bart 2-1", "ctranslate2", "fp32", **{**facts, fact: 1}))
    names.add(latency.key(machine, "bart 2-1", "ctranslate2", "int8", **facts))
    names.add(latency.key(machine, "bart 2-1", "transformers", "fp32", **facts))
    names.add(latency.key(machine, "bart 2-2", "ctranslate2", "fp32", **facts))
    names.add(latency.key(latency.hardware("cpu", 2), "bart 2-1", "ctranslate2", "fp32", **facts))
    assert len(names) == 9
    assert latency.key(dict(machine), "bart 2-1", "ctranslate2", "fp32", **facts) in names


def test_table_returns_what_was_recorded_and_survives_damage(tmp_path):
    table, one = tmp_path / "deep" / "latency.json", Timing(12.5, 11.0, 14.0, 5)
    assert latency.lookup(table, "a") is None
    latency.record(table, "a", one)
    latency.record(table, "b", Timing(1, 1, 1, 1))
    assert latency.lookup(table, "a") == one
    table.write_bytes(table.read_bytes()[:20])
    assert latency.lookup(table, "a") is None
    latency.record(table, "a", one)
    assert latency.lookup(table, "a") == one


def _record_many(table: Path, who: int) -> None:
    for i in range(20):
        latency.record(table, f"{who}-{i}", Timing(who, who, who, i))


def test_processes_that_record_at_once_lose_nothing(tmp_path):
    table = tmp_path / "latency.json"
    workers = [multiprocessing.Process(target=_record_many, args=(table, who)) for who in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(latency.lookup(table, f"{who}-{i}") for who in range(3) for i in range(20))


def test_hardware_names_the_machine():
    machine = latency.hardware("cpu", 2)
    assert (machine["kind"], machine["threads"]) == ("cpu", 2)
    assert machine["name"]
    assert int(machine["cores"]) >= 1


def test_peak_memory_is_what_was_held_at_most_and_given_back():
    """40 MB held for a moment within a call, over what was held before."""
    before = latency.held_mb("cpu")
    assert before is not None
    latency.forget_peak()
    block = b"x" * 40_000_000
    held = latency.held_mb("cpu")
    del block
    peak = latency.held_mb("cpu", peak=True)
    after = latency.held_mb("cpu")
    assert held is not None
    assert peak is not None
    assert after is not None
    assert 39 < held - before < 45
    assert 39 < peak - before < 45
    assert after - before < 5


def test_an_engine_holds_at_least_its_weights(tmp_path):
    folder = save_tiny("bart", tmp_path / "m", d_model=256, ffn_dim=2048, decoder_layers=6)
    before = latency.held_mb("cpu")
    engine = open_engine(folder, "transformers")
    timing = latency.measure(engine, 10, 5, batch=32, beams=2, min_seconds=0, held_before=before)
    weights = latency.memory_mb(teachers.load_config(folder))
    assert weights > 30
    assert timing.peak_mb is not None
    assert weights < timing.peak_mb < 10 * weights
