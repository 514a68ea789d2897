"""What to cache of a teacher: the states that runs read, and whether a cache is faster than recomputing them."""

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import PretrainedConfig

from raydistill.config.run import Run
from raydistill.core.machine import available_memory_bytes
from raydistill.data.batching import Examples, bucket_by_length
from raydistill.models import families
from raydistill.models.freezing import resolve_frozen_parts
from raydistill.models.shrinking import plan_student
from raydistill.models.tensors import make_attention_mask, pad_to_tensor
from raydistill.teacher_cache.builder import teacher_autocast
from raydistill.teacher_cache.layout import CacheDtypes, CacheLayout
from raydistill.teacher_cache.store import ComputeDtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What is cached: encoder and decoder states, encoder states only, or nothing.
CacheMode = Literal["full", "encoder", "off"]
PROBE_BYTES = 2**26
PROBE_TOKENS = 4096


@dataclass(frozen=True)
class ReadSet:
    """What a run can read from a cache: encoder states, and the decoder states of `layers`."""

    encoder: bool
    layers: list[int]


@dataclass(frozen=True)
class EpochTimes:
    """Seconds per epoch for computing encoder and decoder states, and for reading them."""

    encoder: float
    decoder: float
    read_encoder: float
    read_decoder: float


def resolve_read_set(run: Run, teacher_config: PretrainedConfig) -> ReadSet:
    """Return what a run reads from a complete cache.

    Encoder states serve a student with the complete frozen encoder and embeddings of the teacher. Decoder states serve
    every kd run, since they depend on the teacher only.
    """
    plan = plan_student(teacher_config, run.student)
    layers: set[int] = set()
    if run.method == "kd":
        last_layer = families.num_layers(teacher_config)[1] - 1
        layers = {last_layer, *(plan.supervised_decoder if run.loss.alpha_hidden > 0 else [])}
    return ReadSet(resolve_frozen_parts(run, plan).encoder_shared, sorted(layers))


def make_cache_layout(
    runs: Sequence[tuple[Run, CacheMode]],
    examples: Mapping[str, Examples],
    teacher_key: str,
    teacher_config: Any,
    root: Path,
    compute_dtype: ComputeDtype,
) -> CacheLayout:
    """The layout of everything that runs on one training split read.

    Args:
        runs: Runs with their cache modes.
        examples: Examples by the `label_key` of the runs.
        compute_dtype: The dtype in which the teacher would compute in training, "bf16" or "fp32".
    """
    encoder, layers = False, dict[str, set[int]]()
    for run, mode in runs:
        read_set = resolve_read_set(run, teacher_config)
        encoder |= read_set.encoder and mode != "off"
        if mode == "full" and read_set.layers:
            layers.setdefault(run.label_key, set()).update(read_set.layers)
    first = runs[0][0]
    limits = [run.training.cache_gb * 1e9 for run, mode in runs if mode != "off" and run.training.cache_gb is not None]
    return CacheLayout(
        root=root,
        teacher_key=teacher_key,
        source_examples=next(iter(examples.values())),
        width=teacher_config.d_model,
        encoder=encoder,
        label_sets=[(examples[label_key], sorted(label_layers)) for label_key, label_layers in layers.items()],
        dtypes=CacheDtypes(first.training.cache_precision, compute_dtype),
        names=(first.teacher or "", first.dataset.name),
        max_bytes=min(limits, default=None),
    )


def choose_mode(layout: CacheLayout, times: EpochTimes, available_bytes: float, epochs: float) -> tuple[CacheMode, str]:
    """Choose the cache mode of `auto`, and the reason as a line of text.

    Building a cache takes as long as computing the states for one epoch; then each of the `epochs` reads them. States
    are cached if this is faster than computing them in each epoch, and if they fit into `available_bytes`.
    """
    encoder_bytes, decoder_bytes = _bytes_by_kind(layout)
    encoder_cache_is_faster = times.encoder * (epochs - 1) > times.read_encoder * epochs
    decoder_cache_is_faster = times.decoder * (epochs - 1) > times.read_decoder * epochs
    figures = (
        f"encoder states {_format_gb(encoder_bytes)}, recomputing an epoch {times.encoder:.1f} s, "
        f"reading {times.read_encoder:.1f} s; "
        f"decoder states {_format_gb(decoder_bytes)}, recomputing {times.decoder:.1f} s, "
        f"reading {times.read_decoder:.1f} s; "
        f"{epochs:.3g} epochs in total; {_format_gb(available_bytes)} available"
    )
    if layout.encoder and not encoder_cache_is_faster:
        return "off", f"a cache of the encoder states is not faster than recomputing them in every epoch ({figures})"
    if layout.encoder and encoder_bytes > available_bytes:
        return "off", f"the encoder states do not fit ({figures})"
    without_decoder: CacheMode = "encoder" if layout.encoder else "off"
    if not layout.label_sets:
        reason = f"no run reads decoder states ({figures})" if layout.encoder else "no run reads teacher states"
        return without_decoder, reason
    if not decoder_cache_is_faster:
        return (
            without_decoder,
            f"a cache of the decoder states is not faster than recomputing them in every epoch ({figures})",
        )
    if encoder_bytes + decoder_bytes > available_bytes:
        return without_decoder, f"the decoder states do not fit ({figures})"
    return "full", f"the states fit, and a cache is faster than recomputing them in every epoch ({figures})"


def measure_epoch_times(layout: CacheLayout, teacher: "PreTrainedModel") -> EpochTimes:
    """Time the teacher on a batch and the disk on a file, and scale both to an epoch.

    The file is read from the disk itself if the arrays take more than half of the memory, otherwise from the page
    cache, which holds the arrays after the first epoch.
    """
    encoder_bytes, decoder_bytes = _bytes_by_kind(layout)
    cold_cache = encoder_bytes + decoder_bytes > available_memory_bytes() / 2
    rate = measure_read_rate(layout.root, cold_cache)
    encoder_seconds, decoder_seconds = _time_teacher(layout, teacher)
    return EpochTimes(encoder_seconds, decoder_seconds, encoder_bytes / rate, decoder_bytes / rate)


def _time_teacher(layout: CacheLayout, teacher: "PreTrainedModel") -> tuple[float, float]:
    """Seconds per epoch of the encoder and of the decoder, from one batch of the part in the middle."""
    part = layout.parts[len(layout.parts) // 2]
    positions = next(bucket_by_length([len(layout.sources[row]) for row in part], PROBE_TOKENS))
    rows = [part[position] for position in positions]
    sources = [layout.sources[row] for row in rows]
    ids = pad_to_tensor(sources, teacher.config.pad_token_id).to(teacher.device)
    mask = make_attention_mask(sources).to(teacher.device)
    with torch.inference_mode(), teacher_autocast(layout, teacher):
        states = families.encode(teacher, ids, mask).last_hidden_state
        epoch_scale = sum(map(len, layout.sources)) / sum(map(len, sources))
        encoder_seconds = epoch_scale * _time_call(lambda: families.encode(teacher, ids, mask), teacher)
        decoder_seconds = 0.0
        for examples, _ in layout.label_sets:
            target_by_row = dict(zip(examples.source_indices, examples.targets, strict=True))
            labels = pad_to_tensor([target_by_row.get(row, [0]) for row in rows], -100).to(teacher.device)
            start = families.shift_right(teacher, labels)
            seconds = _time_call(lambda start=start: families.decode(teacher, start, states, mask), teacher)  # type: ignore[misc]
            decoder_seconds += len(examples) / len(rows) * seconds
    return encoder_seconds, decoder_seconds


def measure_read_rate(root: Path, cold_cache: bool) -> float:
    """Bytes per second for reading a file under `root`; `cold_cache`: after dropping the file from the page cache."""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=root) as file:
        file.write(os.urandom(PROBE_BYTES))
        file.flush()
        os.fsync(file.fileno())
        if cold_cache:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        started = time.perf_counter()
        num_bytes = len(file.read())
        return num_bytes / (time.perf_counter() - started)


def _bytes_by_kind(layout: CacheLayout) -> tuple[int, int]:
    """Bytes of the encoder states and of the decoder states."""
    encoder_bytes = layout.array_sizes.get(layout.encoder_array, 0)
    return encoder_bytes, sum(layout.array_sizes.values()) - encoder_bytes


def _time_call(call: Callable[[], object], teacher: "PreTrainedModel") -> float:
    """Seconds of a call, after a warm-up call."""

    def run_to_completion() -> None:
        call()
        if teacher.device.type == "cuda":
            torch.cuda.synchronize(teacher.device)

    run_to_completion()
    started = time.perf_counter()
    run_to_completion()
    return time.perf_counter() - started


def _format_gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
