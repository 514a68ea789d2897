"""What a model costs to serve: milliseconds, parameters, memory; and the table that keeps the measurements."""

import contextlib
import ctypes
import fcntl
import gc
import hashlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from transformers import PretrainedConfig

from raydistill.core.console import print_progress
from raydistill.core.files import write_json_atomic
from raydistill.core.machine import available_cores
from raydistill.inference.decoding import Engine

BYTES_PER_PARAMETER = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
MAX_REPEATS = 1000
# Cores that others may keep busy while something is timed: what runs on a machine anyway takes less, a training more.
MAX_BACKGROUND_CORES = 0.5

Hardware = dict[str, str | int]


@dataclass(frozen=True)
class Timing:
    """Milliseconds per batch: the median, and the lowest and highest of `repeats` calls.

    `peak_mb`: megabytes held at most during them, the engine included. `others`: how many cores other processes kept
    busy meanwhile, on average. Each None where it was not measured.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    repeats: int
    peak_mb: float | None = None
    background_cores: float | None = None

    @property
    def noisy(self) -> bool:
        """Whether others kept the machine so busy that it says too much."""
        return self.background_cores is not None and self.background_cores > MAX_BACKGROUND_CORES


def measure(
    engine: Engine,
    source_tokens: int,
    output_tokens: int,
    batch: int,
    beams: int,
    repeats: int = 5,
    warmup: int = 1,
    min_seconds: float = 0.5,
    rss_before_mb: float | None = None,
) -> Timing:
    """Time an engine on rows of one fixed length: `source_tokens` read and `output_tokens` written, each exactly.

    At least `repeats` calls and `min_seconds` of them, so that a small model is not timed on noise. The device should
    do nothing else meanwhile; what others did on the machine's cores is measured too. With `rss_before_mb`, what
    `rss_mb` said before the engine was opened, so is peak memory.
    """
    if rss_before_mb is not None:
        reset_peak_rss()
    call = engine.make_benchmark_call(source_tokens, output_tokens, batch, beams)
    others = BackgroundLoad()
    timing = replace(time_calls(call, repeats, warmup, min_seconds), background_cores=others.mean_cores())
    peak = rss_mb(engine.device, peak=True) if rss_before_mb is not None else None
    return replace(timing, peak_mb=peak - rss_before_mb) if peak is not None and rss_before_mb is not None else timing


def rss_mb(device: str, peak: bool = False) -> float | None:
    """Megabytes (10^6 bytes) held now, or at most since `reset_peak_rss`; None where the system does not tell.

    On a CPU, what of this process is resident, after freed memory was given back (so that it does not hide what comes
    next). On a GPU, what is in use of the device, by whomever: engines keep what they took, so that now is the peak.
    """
    if device.startswith("cuda"):
        import torch

        free, total = torch.cuda.mem_get_info(device)
        return (total - free) / 1e6
    if not peak:
        malloc_trim()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        name = "VmHWM:" if peak else "VmRSS:"
        return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024 / 1e6
    return None


def malloc_trim() -> None:
    """Give memory that was freed back to the system, where its C library can."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def reset_peak_rss() -> None:
    """Count the peak of resident memory from now on; where Linux refuses, it counts from the process's start."""
    rss_mb("cpu")  # the peak starts from what is resident, which should not be garbage
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def time_calls(call: Callable[[], None], repeats: int, warmup: int, min_seconds: float) -> Timing:
    """Time a call `repeats` times or more, after `warmup` calls that do not count."""
    for _ in range(warmup):
        call()
    times: list[float] = []
    while len(times) < repeats or (sum(times) < min_seconds and len(times) < MAX_REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return summarize_times(times)


def summarize_times(seconds: Sequence[float]) -> Timing:
    """The calls' times put together."""
    return Timing(1000 * statistics.median(seconds), 1000 * min(seconds), 1000 * max(seconds), len(seconds))


class BackgroundLoad:
    """How busy other processes keep the cores that this process may use, from now on."""

    def __init__(self) -> None:
        self._start_cpu_seconds, self.begun = _background_cpu_seconds(), time.perf_counter()

    def mean_cores(self) -> float:
        """How many they kept busy until now, on average."""
        return max(0.0, (_background_cpu_seconds() - self._start_cpu_seconds) / (time.perf_counter() - self.begun))


def _background_cpu_seconds() -> float:
    """Seconds of other processes on these cores; only differences count."""
    mine = time.process_time()  # of all threads
    own = available_cores()
    cores = [t for core, t in enumerate(psutil.cpu_times(percpu=True)) if core in own]
    return sum(t.user + t.nice + t.system + getattr(t, "steal", 0.0) for t in cores) - mine


def hardware(device: str = "cpu", threads: int = 1) -> Hardware:
    """What was measured on: `kind` (cpu, cuda), `name`, `cores` that this process may use, `threads` used."""
    cores = len(available_cores())
    if device.startswith("cuda"):
        import torch

        return {"kind": "cuda", "name": torch.cuda.get_device_name(device), "cores": cores, "threads": threads}
    return {"kind": "cpu", "name": _cpu_name(), "cores": cores, "threads": threads}


def count_parameters(config: PretrainedConfig) -> int:
    """How many parameters a model of this configuration has, tied weights once; nothing is allocated."""
    import torch
    from transformers import AutoModelForSeq2SeqLM

    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(config)
    return sum(weight.numel() for weight in model.parameters())


def memory_mb(config: PretrainedConfig, precision: str = "fp32") -> float:
    """Megabytes (10^6 bytes) of the parameters at a precision: fp32, bf16, fp16 or int8.

    The weights alone, which is what a student saves; activations and caches depend on the batch and come
    on top. With int8 the few norms and biases that stay fp32 are counted as int8.
    """
    return count_parameters(config) * BYTES_PER_PARAMETER[precision] / 1e6


def architecture_key(config: PretrainedConfig) -> str:
    """All of a configuration that decides its speed, such as "marian 6-6 ...": equal for equal shapes."""
    decoder = config.num_decoder_layers if config.model_type == "t5" else config.decoder_layers
    encoder = config.num_layers if config.model_type == "t5" else config.encoder_layers
    keys = (
        ("d_model", "d_kv", "d_ff", "num_heads", "feed_forward_proj", "vocab_size")
        if config.model_type == "t5"
        else (
            *("d_model", "encoder_ffn_dim", "decoder_ffn_dim", "encoder_attention_heads"),
            *("decoder_attention_heads", "activation_function", "vocab_size"),
        )
    )
    return " ".join([config.model_type, f"{encoder}-{decoder}", *[f"{k}={getattr(config, k)}" for k in keys]])


def measurement_key(
    machine: Hardware,
    architecture: str,
    engine: str,
    precision: str,
    *,
    beams: int,
    batch: int,
    source_tokens: int,
    output_tokens: int,
) -> dict[str, Any]:
    """All that a measurement depends on, the engine's version too."""
    return {
        **machine,
        "shape": architecture,
        "engine": f"{engine} {engine_version(engine)}",
        "precision": precision,
        "beams": beams,
        "batch": batch,
        "source_tokens": source_tokens,
        "output_tokens": output_tokens,
    }


def entry_name(measurement: dict[str, Any]) -> str:
    """The name of a measurement in the table: short, and another one for other facts."""
    digest = hashlib.sha256(json.dumps(measurement, sort_keys=True).encode()).hexdigest()
    return f"{measurement['shape'].split(' d_model')[0]} {measurement['engine'].split()[0]} {digest[:12]}"


def engine_version(engine: str) -> str:
    """The version of the library that an engine is."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(engine)
    except PackageNotFoundError:
        return "unknown"


def lookup(table: Path, measurement: dict[str, Any]) -> Timing | None:
    """The timing with these facts in a table's file; None where there is none, or the file is no table.

    What the file says beside it is for people; entries of before that was kept are read as well.
    """
    found = _read_table(table).get(entry_name(measurement))
    try:
        return Timing(**{f.name: found[f.name] for f in fields(Timing) if f.name in found}) if found else None
    except TypeError:
        return None


def record(table: Path, measurement: dict[str, Any], timing: Timing) -> None:
    """Add a timing to a table's file, with its facts, the machine's name and when it was made (UTC).

    Processes may record at the same time; the file is whole throughout.
    """
    made = {"host": platform.node(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.with_name(f".{table.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_json_atomic(
            table, {**_read_table(table), entry_name(measurement): {**asdict(timing), **made, "facts": measurement}}
        )


def _read_table(table: Path) -> dict[str, Any]:
    try:
        data = json.loads(table.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def warn_background_load(cores: float, remedy: str) -> None:
    """Print a warning if other processes kept more than `MAX_BACKGROUND_CORES` cores busy during a measurement.

    Args:
        cores: busy cores, on average (`BackgroundLoad.mean_cores`).
        remedy: how to repeat the measurement, as the end of the sentence "End those processes; ...".
    """
    if cores > MAX_BACKGROUND_CORES:
        print_progress(
            f"latency: other processes kept up to {cores:.1f} cores of the machine busy during the measurement, so the "
            f"times are too long and may mislead the selection. End those processes; {remedy}"
        )
