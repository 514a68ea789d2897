"""Measures the highest number of rows per second of an engine, over several settings of threads and batches.

Latency is the time of one batch, in which all threads share the work of each layer. Of many rows, small models decode
more per second if each thread decodes a batch of its own. Which number and size of batches gives the most rows per
second depends on model and processor, so that a few settings are measured.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from raydistill.config.serving import ThroughputSetting
from raydistill.evaluation.latency import BackgroundLoad
from raydistill.inference.decoding import BeamSearchParams, Engine
from raydistill.models.tokenization import tokenize_sources

# Source tokens per batch
CPU_BATCH_TOKENS = (1_200, 2_400, 4_800)
GPU_BATCH_TOKENS = (4_096, 16_384, 65_536)
BATCHES_PER_THREAD = 2
PASSES = 3  # of which the median counts


class SettingThroughput(BaseModel):
    """The throughput with one setting.

    Attributes:
        setting: The setting.
        seconds: Seconds of each pass over the rows.
        rows_per_s: Rows per second of the median pass.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    setting: ThroughputSetting
    seconds: list[float]
    rows_per_s: float


class Throughput(BaseModel):
    """The throughput of an engine with all settings that were tried.

    Attributes:
        rows: Rows of each pass.
        settings: The settings in the order of the measurement.
        background_cores: Average number of CPU cores that other processes kept busy meanwhile.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: int
    settings: tuple[SettingThroughput, ...] = Field(min_length=1)
    background_cores: float

    @property
    def best(self) -> SettingThroughput:
        """The setting with the most rows per second."""
        return max(self.settings, key=lambda measured: measured.rows_per_s)


@dataclass(frozen=True)
class SettingGrid:
    """The settings to try.

    Attributes:
        splits: Pairs of parallel batches and threads per batch.
        batch_tokens: Source tokens per batch, ascending; None for the engine's default.
        min_pass_tokens: Source tokens that a pass has at least, so that passes with other settings are as long.
    """

    splits: tuple[tuple[int, int], ...]
    batch_tokens: tuple[int | None, ...]
    min_pass_tokens: int = 0

    @property
    def tokens_per_pass(self) -> int:
        """Source tokens with which no thread is idle for long: several of the largest batches for each split."""
        num_tokens = (
            BATCHES_PER_THREAD * max(inter for inter, _ in self.splits) * max(n or 1 for n in self.batch_tokens)
        )
        return max(num_tokens, self.min_pass_tokens)

    def only(self, setting: ThroughputSetting) -> "SettingGrid":
        """A grid of a single setting, with passes as long as the passes of this grid."""
        return SettingGrid(
            ((setting.inter_threads, setting.intra_threads),), (setting.batch_tokens,), self.tokens_per_pass
        )


def setting_grid(engine: str, device: str, threads: int) -> SettingGrid:
    """The settings to try for an engine.

    Args:
        engine: ctranslate2 or transformers, which has a single setting.
        device: A name of torch, such as cpu.
        threads: CPU threads in total.
    """
    whole_machine = (1, threads)
    if engine != "ctranslate2":
        return SettingGrid((whole_machine,), (None,))
    if device != "cpu":
        return SettingGrid((whole_machine,), GPU_BATCH_TOKENS)
    pairs = ((threads // 2, 2),) if threads >= 4 else ()
    return SettingGrid(tuple(dict.fromkeys(((threads, 1), *pairs, whole_machine))), CPU_BATCH_TOKENS)


def measure_throughput(
    open_engine: Callable[[ThroughputSetting], Engine],
    grid: SettingGrid,
    texts: Sequence[str],
    beam: BeamSearchParams,
    max_source_tokens: int,
) -> Throughput:
    """Time passes over real rows with some settings; the device should do nothing else.

    First all splits of the threads are measured with batches of middle size, then the other sizes with the best split.
    A pass includes tokenization and detokenization. Rows are repeated if they are too few to keep all threads busy, and
    left out if they are more than necessary. Passes over a part of the rows warm the engine up and are not timed.

    Args:
        open_engine: Opens the engine with a setting. Settings have separate engines, of which one is open at a time.
        grid: The settings to try.
        texts: Source texts, at least one.
        beam: The decoding.
        max_source_tokens: Length at which sources are cut, in tokens.
    """
    load = BackgroundLoad()
    rows: list[str] = []

    def measure(setting: ThroughputSetting) -> SettingThroughput:
        engine = open_engine(setting)
        if not rows:
            rows.extend(_fill_rows(engine, texts, grid.tokens_per_pass, max_source_tokens))
        passes = [rows[: len(rows) // 4 + 1], *[rows] * PASSES]
        seconds = [_seconds(engine, texts, beam, max_source_tokens) for texts in passes][1:]
        return SettingThroughput(setting=setting, seconds=seconds, rows_per_s=len(rows) / statistics.median(seconds))

    middle = grid.batch_tokens[len(grid.batch_tokens) // 2]
    measured = [
        measure(ThroughputSetting(inter_threads=inter, intra_threads=intra, batch_tokens=middle))
        for inter, intra in grid.splits
    ]
    best = max(measured, key=lambda m: m.rows_per_s).setting
    others = [tokens for tokens in grid.batch_tokens if tokens != middle]
    measured += [measure(best.model_copy(update={"batch_tokens": tokens})) for tokens in others]
    return Throughput(rows=len(rows), settings=tuple(measured), background_cores=load.mean_cores())


def _fill_rows(engine: Engine, texts: Sequence[str], num_tokens: int, max_source_tokens: int) -> list[str]:
    """The first texts that have `num_tokens` tokens together, repeated from the start where all have fewer."""
    lengths = list(map(len, tokenize_sources(engine.tokenizer, list(texts), max_source_tokens)))
    rows: list[str] = []
    for text, length in itertools.cycle(zip(texts, lengths, strict=True)):
        rows.append(text)
        num_tokens -= max(1, length)
        if num_tokens <= 0:
            return rows
    return rows


def _seconds(engine: Engine, texts: list[str], beam: BeamSearchParams, max_source_tokens: int) -> float:
    started = time.perf_counter()
    engine.generate(texts, beam, max_source_tokens=max_source_tokens)
    return time.perf_counter() - started
