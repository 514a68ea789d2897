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
from raydistill.data.batching import Examples, buckets
from raydistill.models import families
from raydistill.models.freezing import what_is_frozen
from raydistill.models.shrinking import plan
from raydistill.teacher_cache.builder import Numbers, Pass, mask_of, padded

Keep = Literal["full", "encoder", "off"]
PROBE_BYTES = 2**26
PROBE_TOKENS = 4096


@dataclass(frozen=True)
class Wanted:
    """What a run can read of the teacher: its encoder states, and its decoder's outputs at `layers`."""

    encoder: bool
    layers: list[int]


@dataclass(frozen=True)
class Costs:
    """Seconds for one epoch: working the encoder and decoder states out anew, or reading them."""

    encoder: float
    decoder: float
    read_encoder: float
    read_decoder: float


def wanted(run: Run, depths: tuple[int, int]) -> Wanted:
    """What a run reads where all is kept.

    Encoder states serve a student whose encoder and embeddings are the teacher's and frozen. The decoder's serve every
    kd run: they are the teacher's own whatever the student's encoder and embeddings are.
    """
    layers = plan(depths, run.student)
    taught: set[int] = set()
    if run.method == "kd":
        taught = {depths[1] - 1, *(layers.supervised_decoder if run.loss.alpha_hidden > 0 else [])}
    return Wanted(what_is_frozen(run, layers).shared, sorted(taught))


def pass_for(
    runs: Sequence[tuple[Run, Keep]],
    examples: Mapping[str, Examples],
    teacher_key: str,
    config: Any,
    root: Path,
    computed: str,
) -> Pass:
    """All that runs on one training split read, as one pass; `examples` by what the runs call their labels.

    `computed`: the numbers in which the teacher would run if it ran with every step, "bf16" or "fp32".
    """
    depths = families.depths(config)
    encoder, layers = False, dict[str, set[int]]()
    for run, keep in runs:
        reads = wanted(run, depths)
        encoder |= reads.encoder and keep != "off"
        if keep == "full" and reads.layers:
            layers.setdefault(run.label_key, set()).update(reads.layers)
    first = runs[0][0]
    bounds = [run.training.cache_gb * 1e9 for run, keep in runs if keep != "off" and run.training.cache_gb is not None]
    about = {"teacher": first.teacher, "data": first.dataset.name, "teacher_key": teacher_key}
    return Pass(
        root,
        teacher_key,
        next(iter(examples.values())),
        config.d_model,
        encoder,
        [(examples[label], sorted(wanted_layers)) for label, wanted_layers in layers.items()],
        Numbers(first.training.cache_precision, computed),
        about,
        min(bounds, default=None),
    )


def choose(work: Pass, costs: Costs, room: float, epochs: float) -> tuple[Keep, str]:
    """What of a pass is worth keeping within `room` bytes, when it is read `epochs` times; and why, in a line.

    A store is made once at the price of an epoch's working out, and read in every epoch after that.
    """
    sizes = [0, 0]
    for array, size in work.arrays.items():
        sizes[array.parent != work.encoder_store] += size
    pays = {
        "encoder": costs.encoder * (epochs - 1) > costs.read_encoder * epochs,
        "decoder": costs.decoder * (epochs - 1) > costs.read_decoder * epochs,
    }
    facts = (
        f"encoder states {_gb(sizes[0])}, an epoch worked out anew {costs.encoder:.1f} s, "
        f"read {costs.read_encoder:.1f} s; "
        f"decoder states {_gb(sizes[1])}, {costs.decoder:.1f} s, {costs.read_decoder:.1f} s; "
        f"{epochs:.3g} epochs in all; room for {_gb(room)}"
    )
    if work.encoder and not pays["encoder"]:
        return "off", f"reading the encoder states does not pay ({facts})"
    if work.encoder and sizes[0] > room:
        return "off", f"the encoder states do not fit ({facts})"
    if not work.decoders:
        return ("encoder", f"no run reads decoder states ({facts})") if work.encoder else ("off", "no run reads any")
    if not pays["decoder"]:
        return ("encoder" if work.encoder else "off"), f"reading the decoder states does not pay ({facts})"
    if sum(sizes) > room:
        return ("encoder" if work.encoder else "off"), f"the decoder states do not fit ({facts})"
    return "full", f"it fits and pays ({facts})"


def measure(work: Pass, teacher: PreTrainedModel) -> Costs:
    """Time a few batches of the pass and some reading from its disk, taken up to a whole epoch.

    Reading is timed from the disk itself where the stores would take more than half of the memory, and else from the
    system's cache, which then holds them after the first epoch.
    """
    encoder_bytes = sum(size for array, size in work.arrays.items() if array.parent == work.encoder_store)
    decoder_bytes = sum(work.arrays.values()) - encoder_bytes
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    rate = reading_rate(work.root, cold=sum(work.arrays.values()) > memory / 2)
    rows = work.parts[len(work.parts) // 2]
    micro = [rows[place] for place in next(buckets([len(work.sources[row]) for row in rows], PROBE_TOKENS))]
    sources = [work.sources[row] for row in micro]
    ids, mask = padded(sources, teacher.config.pad_token_id).to(teacher.device), mask_of(sources).to(teacher.device)
    with torch.inference_mode(), work.precision(teacher):
        states = families.encode(teacher, ids, mask).last
        tokens = sum(map(len, work.sources)) / sum(map(len, sources))
        encoder = tokens * _timed(lambda: families.encode(teacher, ids, mask), teacher)
        decoder = 0.0
        for examples, _ in work.decoders:
            pairs = dict(zip(examples.rows, examples.targets, strict=True))
            targets = [pairs.get(row, [0]) for row in micro]
            labels = padded(targets, -100).to(teacher.device)
            start = families.shift_right(teacher, labels)
            share = len(examples) / len(micro)
            decoder += share * _timed(lambda start=start: families.decode(teacher, start, states, mask), teacher)  # type: ignore[misc]
    return Costs(encoder, decoder, encoder_bytes / rate, decoder_bytes / rate)


def reading_rate(root: Path, cold: bool) -> float:
    """Bytes per second that a file under `root` is read with, once written; `cold`: not from the system's cache."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / f".probe-{os.getpid()}"
    try:
        with path.open("wb") as file:
            file.write(os.urandom(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        read = len(path.read_bytes())
        return read / (time.perf_counter() - started)
    finally:
        path.unlink(missing_ok=True)


def _timed(call: Callable[[], object], teacher: PreTrainedModel) -> float:
    """Seconds of a call, after one that does not count."""

    def to_its_end() -> None:
        call()
        if teacher.device.type == "cuda":
            torch.cuda.synchronize(teacher.device)

    to_its_end()
    started = time.perf_counter()
    to_its_end()
    return time.perf_counter() - started


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
