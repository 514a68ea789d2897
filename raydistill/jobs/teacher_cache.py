"""The teacher cache of some runs as a Ray Data job: choose what to cache, build the missing parts in actors."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydistill.cluster import snapshots, sync
from raydistill.cluster.actor_pool import BatchStats, run_batches
from raydistill.cluster.exclusive import run_exclusive
from raydistill.config.run import Run, Training
from raydistill.core.artifact import MANIFEST
from raydistill.core.console import print_progress
from raydistill.data.batching import Examples
from raydistill.teacher_cache import store
from raydistill.teacher_cache.builder import build_part
from raydistill.teacher_cache.layout import MAX_DISK_FRACTION, CacheLayout
from raydistill.teacher_cache.policy import CacheMode, EpochTimes, choose_mode, make_cache_layout, measure_epoch_times
from raydistill.training.inputs import LabelFolders, input_paths, run_label_folders

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROGRESS_INTERVAL_S = 5


@dataclass(frozen=True)
class CacheStats:
    """The size of a cache, and the device-seconds that building each array took ("encoder-KEY/states")."""

    bytes: int
    device_seconds: dict[str, float]


@dataclass(frozen=True)
class CacheRequest:
    """Runs on one training split that may read a common teacher cache.

    Args:
        runs: The runs. Teacher, data and precision of all runs are equal (`cache_group_key`).
        labels: The folders of the label sets that the runs train on.
        root: The folder of all stores.
        device: The device of the teacher, "cpu" or "cuda".
        compute_dtype: The dtype that `precision: auto` means on the workers; this process may have no such device.
    """

    runs: list[Run]
    labels: LabelFolders
    root: Path
    device: str
    compute_dtype: str | None = None

    def make_layout(self, mode: CacheMode) -> CacheLayout:
        """The layout of the cache, with `mode` for runs of `teacher_cache: auto`."""
        modes = [
            (run, mode if run.training.teacher_cache == "auto" else run.training.teacher_cache) for run in self.runs
        ]
        inputs = _load_inputs(self)
        return make_cache_layout(
            modes, inputs.examples, inputs.teacher_key, inputs.teacher_config, self.root, inputs.compute_dtype
        )

    def input_paths(self) -> list[Path]:
        """The folders that the job reads: teacher, data and label sets."""
        label_folders = [Path(folder) for folders in self.labels.values() for folder in folders.values()]
        return [*label_folders, *{path for run in self.runs for path in input_paths(run)}]

    def __hash__(self) -> int:
        return hash((str(self.runs), str(self.labels), self.root, self.device, self.compute_dtype))


@dataclass(frozen=True)
class CacheInputs:
    """What the layout of a cache depends on, without any weights: examples by `label_key`, the teacher, the dtype."""

    examples: dict[str, Examples]
    teacher_key: str
    teacher_config: Any
    compute_dtype: store.ComputeDtype


def cache_group_key(run: Run) -> str:
    """A key of the runs that can share a cache: the same teacher, data, precision and tokens.

    A number of tokens may split the texts into others than the teacher's, and depends on the label sets.
    """
    settings: list[Any] = [run.teacher, run.dataset.model_dump(mode="json")]
    settings += [run.training.precision, run.training.cache_precision]
    if isinstance(run.student.vocabulary, int):
        settings += [run.student.vocabulary, run.label_key]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]


def build_teacher_cache(request: CacheRequest, mode: CacheMode) -> CacheStats:
    """Build the missing parts of the cache of some runs; `mode` is the result of `resolve_cache_mode`.

    Raises:
        UserError: The cache exceeds a limit or the disk space, or an input cannot be read.
    """
    layout = request.make_layout(mode)
    with layout.lock():
        pull_manifests(layout)
        if layout.is_incomplete():
            sync.pull(*layout.array_sizes)  # parts that an earlier build made, on any machine
            layout.prepare()
            sync.push(*layout.stores)
            _build_missing_parts(request, mode, layout)
            layout.finish()
        sync.push(*layout.array_sizes)  # also if a job was killed between `finish` and this step
    return CacheStats(sum(layout.array_sizes.values()), layout.device_seconds)


def resolve_cache_mode(request: CacheRequest, total_epochs: float) -> tuple[CacheMode, str]:
    """Choose the mode of `teacher_cache: auto`, and the reason; `total_epochs` is the sum over all trials."""
    if all(run.training.teacher_cache != "auto" for run in request.runs):
        return "full", "set explicitly by the runs"
    layout = request.make_layout("full")
    pull_manifests(layout)
    if not layout.is_incomplete():
        return "full", "already complete"
    times = run_exclusive(load_and_measure, request, device=request.device, input_paths=request.input_paths())
    mode, reason = choose_mode(layout, times, available_bytes(layout), total_epochs)
    print_progress(f"teacher cache: {mode}: {reason}")
    return mode, reason


def available_bytes(layout: CacheLayout) -> float:
    """Bytes that the arrays may take: free disk space and finished parts, at most the limit of the runs."""
    layout.root.mkdir(parents=True, exist_ok=True)
    finished_bytes = sum(layout.array_sizes.values()) - layout.missing_bytes()
    disk_bytes = MAX_DISK_FRACTION * shutil.disk_usage(layout.root).free + finished_bytes
    return disk_bytes if layout.max_bytes is None else min(disk_bytes, layout.max_bytes)


def resolve_auto_precision(device: str, threads: int) -> str:
    """The dtype that `precision: auto` means on this machine, "bf16" or "fp32"; for `run_exclusive`."""
    return _resolve_compute_dtype(Training(precision="auto"), device, None)


def load_and_measure(request: CacheRequest, device: str, threads: int) -> EpochTimes:
    """Load the teacher and run `measure_epoch_times`; for `run_exclusive`."""
    return measure_epoch_times(request.make_layout("full"), _load_teacher(request, device))


def _build_missing_parts(request: CacheRequest, mode: CacheMode, layout: CacheLayout) -> None:
    """Build the missing parts in actors that hold the teacher, and print the progress."""
    missing = layout.missing_parts()
    num_finished, printed_at = 0, time.monotonic()
    print_progress(
        f"teacher cache: {len(missing)} parts to build, {layout.missing_bytes() / 1e6:.0f} MB, in {request.root}"
    )

    def on_done(_: BatchStats) -> None:
        nonlocal num_finished, printed_at
        num_finished += 1
        if time.monotonic() - printed_at > PROGRESS_INTERVAL_S:
            print_progress(f"  {num_finished}/{len(missing)} parts")
            printed_at = time.monotonic()

    def make_function() -> Callable[[int], BatchStats]:
        return _make_part_function(request, mode)

    run_batches(missing, make_function, device=request.device, on_done=on_done)
    sync.pull(*layout.array_sizes)


def pull_manifests(layout: CacheLayout) -> None:
    """Copy the records of the stores from the storage, but not the parts, which may be many gigabytes."""
    sync.pull(*layout.stores, names=[store.ABOUT_FILE, MANIFEST])


def _make_part_function(request: CacheRequest, mode: CacheMode) -> Callable[[int], BatchStats]:
    """Load the teacher and the inputs in an actor, and return the function that builds a part."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    snapshots.pull(*request.input_paths())
    teacher, layout = _load_teacher(request, request.device), request.make_layout(mode)
    pull_manifests(layout)

    def build(number: int) -> BatchStats:
        files = [store.part_path(array, number) for array in layout.array_sizes]
        files += [store.part_time_path(array, number) for array in layout.array_sizes]
        sync.pull(*files)
        with torch.inference_mode():
            stats = build_part(layout, teacher, number)
        sync.push(*files)
        return stats

    return build


def _load_teacher(request: CacheRequest, device: str) -> "PreTrainedModel":
    import torch

    from raydistill.models.teacher import open_teacher

    run = request.runs[0]
    assert run.teacher is not None
    return torch.nn.Module.to(open_teacher(run.teacher, run.dataset).model, device)


@lru_cache(maxsize=2)
def _load_inputs(request: CacheRequest) -> CacheInputs:
    """Tokenise the examples and read the configuration of the teacher."""
    from raydistill.config.presets import teacher_preset
    from raydistill.models.fingerprints import teacher_key
    from raydistill.models.loading import load_config, locate_checkpoint
    from raydistill.models.tokenization import load_tokenizer, resolve_languages
    from raydistill.models.vocabulary import trim_tokenizer
    from raydistill.training.tokenized_data import load_tokenized_data, make_examples, select_student_tokens

    first = request.runs[0]
    assert first.teacher is not None
    checkpoint = locate_checkpoint(first.teacher, first.dataset.name)
    preset = teacher_preset(first.teacher, first.dataset.name)
    config = load_config(checkpoint)
    languages = resolve_languages(first.teacher, first.dataset)
    tokenizer = load_tokenizer(checkpoint, languages, first.dataset.source_prefix)
    token_ids = None
    if isinstance(first.student.vocabulary, int):  # with "used", the texts are split into the teacher's tokens
        token_ids = select_student_tokens(first, tokenizer, config, run_label_folders(request.labels, first))
        assert token_ids is not None
        tokenizer = trim_tokenizer(tokenizer, token_ids)
    data = load_tokenized_data(first, preset, tokenizer, config)
    examples: dict[str, Examples] = {}
    for run in request.runs:
        if run.label_key not in examples:
            own = make_examples(run, data, tokenizer, run_label_folders(request.labels, run))
            examples[run.label_key] = own if token_ids is None else own.with_token_ids(token_ids)
    compute_dtype = _resolve_compute_dtype(first.training, request.device, request.compute_dtype)
    return CacheInputs(examples, teacher_key(checkpoint), config, compute_dtype)


def _resolve_compute_dtype(training: Training, device: str, compute_dtype: str | None) -> store.ComputeDtype:
    """The dtype of the teacher in training, "bf16" or "fp32"; `compute_dtype` is used for `precision: auto`."""
    from raydistill.training.optimizer_step import autocast_dtype
    from raydistill.training.workers import Worker

    worker = Worker(device=device, compute_dtype=compute_dtype)
    return "fp32" if autocast_dtype(training, worker) is None else "bf16"
