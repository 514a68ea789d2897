"""What of the teacher is worth keeping on disk for some runs: what they read, what it costs, and what pays."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from raydistill.config.run import Run
from raydistill.data.batching import Examples, bucket_by_length
from raydistill.models import families
from raydistill.models.freezing import resolve_frozen_parts
from raydistill.models.shrinking import plan_layers
from raydistill.teacher_cache.builder import CacheBuilder, CacheDtypes, make_attention_mask, pad_to_tensor

CacheMode = Literal["full", "encoder", "off"]
PROBE_BYTES = 2**26
PROBE_TOKENS = 4096


@dataclass(frozen=True)
class ReadSet:
    """What a run can read of the teacher: its encoder states, and its decoder's outputs at `layers`."""

    encoder: bool
    layers: list[int]


@dataclass(frozen=True)
class EpochTimes:
    """Seconds for one epoch: working the encoder and decoder states out anew, or reading them."""

    encoder: float
    decoder: float
    read_encoder: float
    read_decoder: float


def resolve_read_set(run: Run, depths: tuple[int, int]) -> ReadSet:
    """What a run reads where all is kept.

    Encoder states serve a student whose encoder and embeddings are the teacher's and frozen. The decoder's serve every
    kd run: they are the teacher's own whatever the student's encoder and embeddings are.
    """
    layers = plan_layers(depths, run.student)
    taught: set[int] = set()
    if run.method == "kd":
        taught = {depths[1] - 1, *(layers.supervised_decoder if run.loss.alpha_hidden > 0 else [])}
    return ReadSet(resolve_frozen_parts(run, layers).encoder_shared, sorted(taught))


def make_cache_builder(
    runs: Sequence[tuple[Run, CacheMode]],
    examples: Mapping[str, Examples],
    teacher_key: str,
    teacher_config: Any,
    root: Path,
    compute_dtype: str,
) -> CacheBuilder:
    """All that runs on one training split read, as one pass; `examples` by what the runs call their labels.

    `compute_dtype`: the numbers in which the teacher would run if it ran with every step, "bf16" or "fp32".
    """
    depths = families.num_layers(teacher_config)
    encoder, layers = False, dict[str, set[int]]()
    for run, keep in runs:
        reads = resolve_read_set(run, depths)
        encoder |= reads.encoder and keep != "off"
        if keep == "full" and reads.layers:
            layers.setdefault(run.label_key, set()).update(reads.layers)
    first = runs[0][0]
    bounds = [run.training.cache_gb * 1e9 for run, keep in runs if keep != "off" and run.training.cache_gb is not None]
    about = {"teacher": first.teacher, "data": first.dataset.name, "teacher_key": teacher_key}
    return CacheBuilder(
        root,
        teacher_key,
        next(iter(examples.values())),
        teacher_config.d_model,
        encoder,
        [(examples[label], sorted(wanted_layers)) for label, wanted_layers in layers.items()],
        CacheDtypes(first.training.cache_precision, compute_dtype),
        about,
        min(bounds, default=None),
    )


def choose_mode(
    builder: CacheBuilder, times: EpochTimes, available_bytes: float, epochs: float
) -> tuple[CacheMode, str]:
    """What of a pass is worth keeping within `available_bytes` bytes, when it is read `epochs` times; and why, in a
    line.

    A store is made once at the price of an epoch's working out, and read in every epoch after that.
    """
    sizes = [0, 0]
    for array, size in builder.array_sizes.items():
        sizes[array.parent != builder.encoder_store] += size
    pays = {
        "encoder": times.encoder * (epochs - 1) > times.read_encoder * epochs,
        "decoder": times.decoder * (epochs - 1) > times.read_decoder * epochs,
    }
    facts = (
        f"encoder states {_format_gb(sizes[0])}, an epoch worked out anew {times.encoder:.1f} s, "
        f"read {times.read_encoder:.1f} s; "
        f"decoder states {_format_gb(sizes[1])}, {times.decoder:.1f} s, {times.read_decoder:.1f} s; "
        f"{epochs:.3g} epochs in all; room for {_format_gb(available_bytes)}"
    )
    if builder.encoder and not pays["encoder"]:
        return "off", f"reading the encoder states does not pay ({facts})"
    if builder.encoder and sizes[0] > available_bytes:
        return "off", f"the encoder states do not fit ({facts})"
    if not builder.label_sets:
        return ("encoder", f"no run reads decoder states ({facts})") if builder.encoder else ("off", "no run reads any")
    if not pays["decoder"]:
        return ("encoder" if builder.encoder else "off"), f"reading the decoder states does not pay ({facts})"
    if sum(sizes) > available_bytes:
        return ("encoder" if builder.encoder else "off"), f"the decoder states do not fit ({facts})"
    return "full", f"it fits and pays ({facts})"


def measure_epoch_times(builder: CacheBuilder, teacher: PreTrainedModel) -> EpochTimes:
    """Time a few batches of the pass and some reading from its disk, taken up to a whole epoch.

    Reading is timed from the disk itself where the stores would take more than half of the memory, and else from the
    system's cache, which then holds them after the first epoch.
    """
    encoder_bytes = sum(size for array, size in builder.array_sizes.items() if array.parent == builder.encoder_store)
    decoder_bytes = sum(builder.array_sizes.values()) - encoder_bytes
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    rate = measure_read_rate(builder.root, cold_cache=sum(builder.array_sizes.values()) > memory / 2)
    rows = builder.parts[len(builder.parts) // 2]
    micro = [rows[place] for place in next(bucket_by_length([len(builder.sources[row]) for row in rows], PROBE_TOKENS))]
    sources = [builder.sources[row] for row in micro]
    ids, mask = (
        pad_to_tensor(sources, teacher.config.pad_token_id).to(teacher.device),
        make_attention_mask(sources).to(teacher.device),
    )
    with torch.inference_mode(), builder.autocast(teacher):
        states = families.encode(teacher, ids, mask).last_hidden_state
        tokens = sum(map(len, builder.sources)) / sum(map(len, sources))
        encoder = tokens * _time_call(lambda: families.encode(teacher, ids, mask), teacher)
        decoder = 0.0
        for examples, _ in builder.label_sets:
            pairs = dict(zip(examples.source_indices, examples.targets, strict=True))
            targets = [pairs.get(row, [0]) for row in micro]
            labels = pad_to_tensor(targets, -100).to(teacher.device)
            start = families.shift_right(teacher, labels)
            share = len(examples) / len(micro)
            decoder += share * _time_call(lambda start=start: families.decode(teacher, start, states, mask), teacher)  # type: ignore[misc]
    return EpochTimes(encoder, decoder, encoder_bytes / rate, decoder_bytes / rate)


def measure_read_rate(root: Path, cold_cache: bool) -> float:
    """Bytes per second that a file under `root` is read with, once written; `cold_cache`: not from the system's
    cache."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / f".probe-{os.getpid()}"
    try:
        with path.open("wb") as file:
            file.write(os.urandom(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
            if cold_cache:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        read = len(path.read_bytes())
        return read / (time.perf_counter() - started)
    finally:
        path.unlink(missing_ok=True)


def _time_call(call: Callable[[], object], teacher: PreTrainedModel) -> float:
    """Seconds of a call, after one that does not count."""

    def to_its_end() -> None:
        call()
        if teacher.device.type == "cuda":
            torch.cuda.synchronize(teacher.device)

    to_its_end()
    started = time.perf_counter()
    to_its_end()
    return time.perf_counter() - started


def _format_gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
