"""The teacher's pass over a training split as a Ray Data job: decide what is kept, make what is missing, record it."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from raydistill.cluster import sync
from raydistill.cluster.actor_pool import BatchStats, run_batches
from raydistill.cluster.exclusive import run_exclusive
from raydistill.config.run import Run
from raydistill.core.console import print_progress
from raydistill.data.batching import Examples
from raydistill.teacher_cache import store
from raydistill.teacher_cache.builder import CacheBuilder
from raydistill.teacher_cache.policy import CacheMode, EpochTimes, choose_mode, make_cache_builder, measure_epoch_times
from raydistill.training.inputs import LabelFolders, input_paths, run_label_folders

MAX_DISK_FRACTION = 0.9


@dataclass(frozen=True)
class CacheStats:
    """What a pass came to: the bytes kept, and by array of a store the device-seconds that it once took."""

    bytes: int
    device_seconds: dict[str, float]


@dataclass(frozen=True)
class CacheRequest:
    """Runs on one training split that may read the teacher's states, and the label sets that they train on.

    `computed` is what `precision: auto` came to on the workers; this process may have no such device.
    """

    runs: list[Run]
    labels: LabelFolders
    root: Path
    device: str
    compute_dtype: str | None = None

    def make_builder(self, mode: CacheMode) -> CacheBuilder:
        """What these runs read, where runs of `auto` keep `mode`."""
        modes = [
            (run, mode if run.training.teacher_cache == "auto" else run.training.teacher_cache) for run in self.runs
        ]
        examples, key, config, computed = _load_inputs(self)
        return make_cache_builder(modes, examples, key, config, self.root, computed)

    def input_paths(self) -> list[Path]:
        """What is read of the home: the teacher and the label sets, as far as they lie there."""
        labels = [Path(folder) for made in self.labels.values() for folder in made.values()]
        return [*labels, *{place for run in self.runs for place in input_paths(run)}]

    def __hash__(self) -> int:
        return hash((str(self.runs), str(self.labels), self.root, self.device, self.compute_dtype))


def cache_group_key(run: Run) -> str:
    """Runs of one group may read one pass: the same teacher, pairs and numbers."""
    about = (run.teacher, run.dataset.model_dump(mode="json"), run.training.precision, run.training.cache_precision)
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]


def build_teacher_cache(request: CacheRequest, mode: CacheMode) -> CacheStats:
    """Make what the runs read of the teacher, unless it is there; `mode` is what `resolve_cache_mode` came to."""
    work = request.make_builder(mode)
    with work.lock():
        pull_manifests(work)
        if work.is_incomplete():
            sync.pull(*work.array_sizes)  # the parts that an earlier pass made, wherever
            work.prepare()
            sync.push(*store_folders(work))
            _build_missing_parts(request, mode, work)
            finish_and_push(work)
    return CacheStats(sum(work.array_sizes.values()), work.device_seconds)


def resolve_cache_mode(request: CacheRequest, total_epochs: float) -> tuple[CacheMode, str]:
    """What `auto` keeps for these runs, and why; `total_epochs`: over all trials."""
    if all(run.training.teacher_cache != "auto" for run in request.runs):
        return "full", "as the runs ask"
    whole = request.make_builder("full")
    pull_manifests(whole)
    if not whole.is_incomplete():
        return "full", "it is there already"
    costs = run_exclusive(load_and_measure, request, device=request.device, input_paths=request.input_paths())
    keep, why = choose_mode(whole, costs, available_bytes(whole), total_epochs)
    print_progress(f"teacher cache: {keep}: {why}")
    return keep, why


def available_bytes(builder: CacheBuilder) -> float:
    """Bytes that the stores may take: the runs' own bound, and what is free and used by them already."""
    builder.root.mkdir(parents=True, exist_ok=True)
    there = sum(builder.array_sizes.values()) - builder.missing_bytes()
    free = MAX_DISK_FRACTION * shutil.disk_usage(builder.root).free + there
    return free if builder.max_bytes is None else min(free, builder.max_bytes)


def resolve_auto_precision(device: str, threads: int) -> str:
    """What `precision: auto` comes to on the hardware that this runs on; to be called `alone`."""
    from raydistill.config.run import Training
    from raydistill.training.loop import autocast_dtype
    from raydistill.training.workers import Worker

    return "fp32" if autocast_dtype(Training(precision="auto"), Worker(device=device)) is None else "bf16"


def load_and_measure(request: CacheRequest, device: str, threads: int) -> EpochTimes:
    """`measure` with the teacher loaded; to be called `alone`."""
    return measure_epoch_times(request.make_builder("full"), _load_teacher(request, device))


def _build_missing_parts(request: CacheRequest, mode: CacheMode, builder: CacheBuilder) -> None:
    """Make the missing parts in actors that hold the teacher."""
    missing = builder.missing_parts()
    total, done, last = len(missing), 0, time.monotonic()
    print_progress(
        f"teacher cache: {total} parts to make, {builder.missing_bytes() / 1e6:.0f} MB, under {request.root}"
    )

    def on_done(facts: BatchStats) -> None:
        nonlocal done, last
        done += 1
        if time.monotonic() - last > 5:
            print_progress(f"  {done}/{total} parts")
            last = time.monotonic()

    sync.push(*request.input_paths())
    run_batches(missing, part_function_factory(request, mode), device=request.device, on_done=on_done)
    sync.pull(*builder.array_sizes)


def store_folders(builder: CacheBuilder) -> list[Path]:
    """The folders of the stores that a pass has to leave."""
    return sorted({array.parent for array in builder.array_sizes})


def pull_manifests(builder: CacheBuilder) -> None:
    """Learn from the storage which of a pass's arrays are whole: not their parts, which may be many gigabytes."""
    sync.pull(*store_folders(builder), patterns=["about.json", "manifest.json"])


def finish_and_push(builder: CacheBuilder) -> None:
    """`Pass.finish`, kept in the storage too; the parts are here."""
    builder.finish()
    sync.push(*builder.array_sizes)


def part_function_factory(request: CacheRequest, mode: CacheMode) -> Callable[[], Callable[[int], BatchStats]]:
    """What an actor needs to make parts: called there, it loads the teacher and reads the texts."""

    def make() -> Callable[[int], BatchStats]:
        os.environ["OMP_NUM_THREADS"] = "1"
        import torch

        torch.set_num_threads(1)
        sync.pull(*request.input_paths())
        teacher, work = _load_teacher(request, request.device), request.make_builder(mode)
        pull_manifests(work)

        def part(number: int) -> BatchStats:
            files = [store.part_path(array, number) for array in work.array_sizes]
            files += [path.with_suffix(".json") for path in files]
            sync.pull(*files)
            with torch.inference_mode():
                facts = work.build_part(teacher, number)
            sync.push(*files)
            return facts

        return part

    return make


def _load_teacher(request: CacheRequest, device: str) -> Any:
    import torch

    from raydistill.training.tokenized_data import open_teacher

    run = request.runs[0]
    assert run.teacher is not None
    return torch.nn.Module.to(open_teacher(run.teacher, run.dataset).model, device)


@lru_cache(maxsize=2)
def _load_inputs(request: CacheRequest) -> tuple[dict[str, Examples], str, Any, str]:
    """The examples by label set, the teacher's key and configuration, and its numbers; keeps no weights."""
    from raydistill.config.presets import teacher_preset
    from raydistill.models.loading import load_config, load_tokenizer, locate_checkpoint, resolve_languages, teacher_key
    from raydistill.training.loop import autocast_dtype
    from raydistill.training.tokenized_data import load_tokenized_data, make_examples
    from raydistill.training.workers import Worker

    run = request.runs[0]
    assert run.teacher is not None
    where = locate_checkpoint(run.teacher, run.dataset.name)
    preset = teacher_preset(run.teacher, run.dataset.name)
    config, tokenizer = load_config(where), load_tokenizer(where, resolve_languages(run.teacher, run.dataset))
    material = load_tokenized_data(run, preset, tokenizer, config)
    examples: dict[str, Examples] = {}
    for each in request.runs:
        if each.label_key not in examples:
            examples[each.label_key] = make_examples(each, material, tokenizer, run_label_folders(request.labels, each))
    worker = Worker(device=request.device, compute_dtype=request.compute_dtype)
    computed = "fp32" if autocast_dtype(run.training, worker) is None else "bf16"
    return examples, teacher_key(where), config, computed
