"""Measures the latency and the memory of an engine."""

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from raydistill.core.errors import UserError
from raydistill.core.machine import available_cores, reset_peak_rss, rss_mb

if TYPE_CHECKING:  # the records of a sweep import this module, and no torch
    from raydistill.inference.decoding import Engine, Workload

# Costs and the number of rows that are decoded together.
LATENCY_BATCH_SIZES = {"latency_ms": 32, "latency_ms_b1": 1}
# The longest time in seconds for which a call, or a pair of calls, is timed. Short timings vary more.
TIMING_LIMIT_ENV = "RAYDISTILL_TIMING_SECONDS"
MAX_REPEATS = 1000
# CPU cores that other processes may keep busy during a measurement. Background services need less, a training run more.
MAX_BACKGROUND_CORES = 0.5

# Fewer threads than all are used only if a batch takes less than this share of the time.
THREADS_GAIN = 0.95

Hardware = dict[str, str | int]


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: median, lowest and highest of `repeats` calls.

    `peak_mb`: peak memory in megabytes during the calls, the engine included. `background_cores`: the average number of
    CPU cores that other processes kept busy. Both are None if not measured.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    repeats: int
    peak_mb: float | None = None
    background_cores: float | None = None

    @property
    def noisy(self) -> bool:
        """Whether other processes kept more than `MAX_BACKGROUND_CORES` busy."""
        return self.background_cores is not None and self.background_cores > MAX_BACKGROUND_CORES


@dataclass(frozen=True)
class Repetition:
    """How often a call is timed: at least `repeats` times and `min_seconds` in total, after `warmup` untimed calls."""

    repeats: int = 5
    warmup: int = 1
    min_seconds: float = 0.5


def measure(
    engine: "Engine",
    workload: "Workload",
    repetition: Repetition | None = None,
    memory_before_mb: float | None = None,
) -> Timing:
    """Time an engine on rows of fixed length; the device should do nothing else.

    The load of the CPU cores by other processes is measured too. `memory_before_mb`: the value of `used_memory_mb`
    before the engine was opened; with it, `peak_mb` is the additional memory of engine and calls.
    """
    if memory_before_mb is not None:
        reset_peak_rss()
    call = engine.make_benchmark_call(workload)
    load = BackgroundLoad()
    timing = time_calls(call, repetition or Repetition())
    timing = replace(timing, background_cores=load.mean_cores())
    peak = used_memory_mb(engine.device, peak=True) if memory_before_mb is not None else None
    if peak is None or memory_before_mb is None:
        return timing
    return replace(timing, peak_mb=peak - memory_before_mb)


def used_memory_mb(device: str, peak: bool = False) -> float | None:
    """Return the megabytes (10^6 bytes) in use, or None if the system does not report them.

    On a CPU: resident memory of this process, see `rss_mb`. On a GPU: memory of the device in use by all processes;
    the engines do not return memory to the device, so the current value is also the peak.
    """
    if device.startswith("cuda"):
        import torch

        free, total = torch.cuda.mem_get_info(device)
        return (total - free) / 1e6
    return rss_mb(peak)


def measure_peak_mb(call: Callable[[], object], device: str, memory_before_mb: float | None) -> float | None:
    """Peak memory in megabytes of an engine and a call of the engine; None if the system does not report it.

    `memory_before_mb` is the value of `used_memory_mb` before the engine was opened, which is subtracted.
    """
    reset_peak_rss()
    call()
    peak_mb = used_memory_mb(device, peak=True)
    return None if peak_mb is None or memory_before_mb is None else peak_mb - memory_before_mb


def limit_seconds(seconds: float) -> float:
    """`seconds`, or RAYDISTILL_TIMING_SECONDS if that is shorter.

    Raises:
        UserError: The variable is not a number.
    """
    limit = os.environ.get(TIMING_LIMIT_ENV)
    try:
        return min(seconds, float(limit)) if limit else seconds
    except ValueError:
        raise UserError(f"{TIMING_LIMIT_ENV}={limit}: expected a number of seconds") from None


def time_calls(call: Callable[[], None], repetition: Repetition) -> Timing:
    """Time repeated calls."""
    min_seconds = limit_seconds(repetition.min_seconds)
    for _ in range(repetition.warmup):
        call()
    seconds: list[float] = []
    while len(seconds) < repetition.repeats or (sum(seconds) < min_seconds and len(seconds) < MAX_REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return summarize_times(seconds)


def summarize_times(seconds: Sequence[float]) -> Timing:
    """Return median, lowest and highest of the calls' seconds, in milliseconds."""
    return Timing(1000 * statistics.median(seconds), 1000 * min(seconds), 1000 * max(seconds), len(seconds))


def choose_threads(open_engine: Callable[[int], "Engine"], workload: "Workload", threads: int) -> int:
    """The number of threads with which an engine decodes a batch in the shortest time.

    More threads are not always faster: the threads of a small model wait for each other at every layer of every token.
    `threads` are halved until a batch takes longer than with twice as many.

    Args:
        open_engine: Opens the engine with a number of threads. One engine is open at a time.
        workload: The batch.
        threads: The highest number.
    """
    if threads == 1:
        return 1
    best, best_ms = threads, math.inf
    tried = threads
    while tried >= 1:
        engine = open_engine(tried)
        call = engine.make_benchmark_call(workload)
        milliseconds = time_calls(call, Repetition(repeats=3)).low_ms
        del engine, call
        if milliseconds >= best_ms * (THREADS_GAIN if best == threads else 1.0):
            break
        best, best_ms = tried, milliseconds
        tried //= 2
    return best


class BackgroundLoad:
    """Measures how busy other processes keep the CPU cores of this process, from its creation on."""

    def __init__(self) -> None:
        self._start_cpu_seconds, self._start_time = _background_cpu_seconds(), time.perf_counter()

    def mean_cores(self) -> float:
        """Return the average number of cores that other processes have kept busy so far."""
        elapsed = time.perf_counter() - self._start_time
        return max(0.0, (_background_cpu_seconds() - self._start_cpu_seconds) / elapsed)


def _background_cpu_seconds() -> float:
    """Return the CPU seconds of other processes on the cores of this process; only differences are meaningful."""
    own_seconds = time.process_time()  # of all threads
    own_cores = available_cores()
    cores = [times for core, times in enumerate(psutil.cpu_times(percpu=True)) if core in own_cores]
    return sum(t.user + t.nice + t.system + getattr(t, "steal", 0.0) for t in cores) - own_seconds


def hardware(device: str = "cpu", threads: int = 1) -> Hardware:
    """Describe the hardware: `kind` (cpu or cuda), `name`, the `cores` of this process, and the `threads` in use."""
    cores = len(available_cores())
    if device.startswith("cuda"):
        import torch

        return {"kind": "cuda", "name": torch.cuda.get_device_name(device), "cores": cores, "threads": threads}
    return {"kind": "cpu", "name": _cpu_name(), "cores": cores, "threads": threads}


def engine_version(engine: str) -> str:
    """Return the version of an engine's library, or "unknown" if it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(engine)
    except PackageNotFoundError:
        return "unknown"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
