"""Throughput: the settings that are tried, the best of them, and engines with parallel batches."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raydistill.config.serving import ThroughputSetting
from raydistill.evaluation import throughput
from raydistill.evaluation.throughput import (
    SettingGrid,
    SettingThroughput,
    Throughput,
    measure_throughput,
    setting_grid,
)
from raydistill.inference.ctranslate2_engine import CTranslate2Engine
from raydistill.inference.decoding import Engine, EngineOptions
from raydistill.inference.engines import open_engine
from raydistill.models import tokenization
from tests.factories.clock import FakeClock
from tests.factories.engines import GREEDY, first_texts
from tests.factories.models import save_tiny, sentences


def setting(inter: int, intra: int, tokens: int | None = None) -> ThroughputSetting:
    return ThroughputSetting(inter_threads=inter, intra_threads=intra, batch_tokens=tokens)


@pytest.mark.parametrize(
    ("engine", "device", "threads", "splits", "sizes"),
    [
        ("ctranslate2", "cpu", 1, ((1, 1),), (1200, 2400, 4800)),
        ("ctranslate2", "cpu", 2, ((2, 1), (1, 2)), (1200, 2400, 4800)),
        ("ctranslate2", "cpu", 8, ((8, 1), (4, 2), (1, 8)), (1200, 2400, 4800)),
        ("ctranslate2", "cuda", 8, ((1, 8),), (4096, 16384, 65536)),
        ("transformers", "cpu", 2, ((1, 2),), (None,)),
    ],
)
def test_settings_use_all_threads(engine: str, device: str, threads: int, splits: Any, sizes: Any) -> None:
    assert setting_grid(engine, device, threads) == SettingGrid(splits, sizes)


def test_a_pass_has_several_of_the_largest_batches_for_every_parallel_one() -> None:
    assert setting_grid("ctranslate2", "cpu", 4).tokens_per_pass == 2 * 4 * 4800


def test_best_setting_has_the_most_rows_per_second() -> None:
    slow = SettingThroughput(setting=setting(1, 2), seconds=[2.0, 4.0, 9.0], rows_per_s=25.0)
    fast = SettingThroughput(setting=setting(2, 1), seconds=[3.0, 2.0, 1.0], rows_per_s=50.0)
    assert Throughput(rows=100, settings=(slow, fast), background_cores=0.0).best is fast
    assert fast.setting.label == "2 batches x 1 thread"
    assert setting(1, 2, 4800).label == "1 batch of 4,800 tokens x 2 threads"


class SleepingEngine:
    """An engine whose time per row is known; the rest of an engine plays no part in a pass."""

    name = "ctranslate2"

    def __init__(self, clock: FakeClock, seconds_per_row: float, tokenizer: Any) -> None:
        self.clock, self.seconds_per_row, self.tokenizer = clock, seconds_per_row, tokenizer

    def generate(self, texts: list[str], *_: Any, **__: Any) -> None:
        self.clock.sleep(self.seconds_per_row * len(texts))


def test_sizes_of_batches_are_tried_with_the_best_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    monkeypatch.setattr(throughput, "time", clock)
    tokenizer = tokenization.load_tokenizer(save_tiny("marian", tmp_path / "m"))
    # Milliseconds per row: two batches of one thread are faster than one batch of two, and large batches fastest
    cost: dict[tuple[int, int, int | None], float]
    cost = {(1, 2, 20): 4.0, (2, 1, 20): 2.0, (2, 1, 10): 3.0, (2, 1, 40): 1.0}
    opened = []

    def open_setting(s: ThroughputSetting) -> Any:
        opened.append((s.inter_threads, s.intra_threads, s.batch_tokens))
        return SleepingEngine(clock, cost[opened[-1]] / 1000, tokenizer)

    texts = sentences(5, seed=1)
    result = measure_throughput(open_setting, SettingGrid(((1, 2), (2, 1)), (10, 20, 40)), texts, GREEDY, 16)
    assert opened == [(1, 2, 20), (2, 1, 20), (2, 1, 10), (2, 1, 40)]
    assert result.best.setting == setting(2, 1, 40)
    assert [measured.rows_per_s for measured in result.settings] == pytest.approx([250, 500, 1000 / 3, 1000])
    assert [len(measured.seconds) for measured in result.settings] == [throughput.PASSES] * 4
    num_tokens = sum(map(len, tokenization.tokenize_sources(tokenizer, texts, 16)))
    assert num_tokens * result.rows / len(texts) == pytest.approx(2 * 2 * 40, abs=32), (
        "rows are repeated to fill a pass"
    )


@pytest.mark.parametrize("family", ["marian", "bart"])
def test_parallel_batches_give_the_same_texts_in_the_same_order(family: str, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path / "m")
    options = EngineOptions(cache_dir=tmp_path / "cache", allow_fallback=False)
    texts = sentences(90, seed=2)
    expected = first_texts(open_engine(folder, "ctranslate2", options).generate(texts, GREEDY, max_source_tokens=16))
    parallel = open_engine(folder, "ctranslate2", replace(options, inter_threads=2, batch_tokens=30))
    assert isinstance(parallel, CTranslate2Engine)
    assert parallel.converted.translator.num_translators == 2
    assert first_texts(parallel.generate(texts, GREEDY, max_source_tokens=16)) == expected


def test_throughput_of_an_engine(tmp_path: Path) -> None:
    folder = save_tiny("marian", tmp_path / "m")
    options = EngineOptions(cache_dir=tmp_path / "cache", allow_fallback=False)

    def open_setting(s: ThroughputSetting) -> Engine:
        return open_engine(folder, "ctranslate2", options.with_setting(s))

    grid = SettingGrid(((2, 1), (1, 1)), (20,))
    result = measure_throughput(open_setting, grid, sentences(9, seed=3), replace(GREEDY, max_length=4), 16)
    assert [measured.setting for measured in result.settings] == [setting(2, 1, 20), setting(1, 1, 20)]
    assert all(m.rows_per_s * sorted(m.seconds)[1] == pytest.approx(result.rows) for m in result.settings)
