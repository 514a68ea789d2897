"""The teacher runs once: its encoder states and its decoder's hidden states on disk, shared by all trials of a node.

Two kinds of store (data/store.py). Encoder states are one array per training set; decoder states are one array per
layer and label set, and layers that are missing are added later. The unit of work is a part: `Pass.make` does part n
of all that a pass has to make, in whatever process, and a pass that is taken up again does what is missing.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from transformers import PreTrainedModel

from raydistill.core.errors import PassingError, UserError
from raydistill.core.files import write_json_atomic
from raydistill.data.batching import Examples, buckets, pad
from raydistill.models import families
from raydistill.teacher_cache import store

TORCH = {"bf16": torch.bfloat16, "fp32": torch.float32}
BATCH_TOKENS = 8192
STATES = "states"
# Parts mapped at once, of the 65,530 mappings that Linux lets a process have: a large corpus has thousands of parts for
# the encoder and for every layer.
MAPPED = 32_768


@dataclass(frozen=True)
class Part:
    """A part on disk: `vectors` of `width` numbers of `kind`. `made`: when, since a store may be deleted and remade."""

    path: Path
    vectors: int
    width: int
    kind: str
    made: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.vectors * self.width * np.dtype(store.KINDS[self.kind]).itemsize


@dataclass(frozen=True)
class Ragged:
    """Memory-mapped rows of vectors: row i is `lengths[i]` vectors of part `part[i]`, from `start[i]` on."""

    parts: list[Part]
    part: np.ndarray
    start: np.ndarray
    lengths: np.ndarray
    dtype: torch.dtype

    def flat(self, rows: Sequence[int]) -> Tensor:
        """The rows' vectors one after another, [their tokens, width]."""
        return self._tensor(np.concatenate([self._row(i) for i in rows]))

    def padded(self, rows: Sequence[int]) -> Tensor:
        """The rows filled up with zeros, [rows, longest, width]."""
        first = self.parts[0]
        shape = (len(rows), int(self.lengths[list(rows)].max()), first.width)
        out = np.zeros(shape, store.KINDS[first.kind])
        for place, i in enumerate(rows):
            out[place, : self.lengths[i]] = self._row(i)
        return self._tensor(out)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(part.nbytes for part in self.parts)

    def _row(self, i: int) -> np.ndarray:
        return mapped(self.parts[self.part[i]])[self.start[i] : self.start[i] + self.lengths[i]]

    def _tensor(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor.view(torch.bfloat16) if self.dtype == torch.bfloat16 else tensor


@dataclass(frozen=True)
class Numbers:
    """In which numbers states are worked out and kept: "bf16" or "fp32" each. Part of a store's key."""

    kept: str = "bf16"
    computed: str = "fp32"


@dataclass(frozen=True)
class Pass:
    """What a pass of a teacher over one set of sources has to leave under `root`.

    `base`: examples that hold the sources. `decoders`: per label set its examples and the decoder layers wanted.
    `width` is the model's, `most` the bytes that the stores may take together.
    """

    root: Path
    teacher_key: str
    base: Examples
    width: int
    encoder: bool = True
    decoders: list[tuple[Examples, list[int]]] = field(default_factory=list)
    numbers: Numbers = Numbers()
    about: dict[str, Any] = field(default_factory=dict)
    most: float | None = None

    @property
    def sources(self) -> list[list[int]]:
        """Token ids of each source."""
        return self.base.sources

    @cached_property
    def parts(self) -> list[list[int]]:
        """The source rows of each part."""
        return store.plan_parts([len(source) for source in self.sources])

    @cached_property
    def encoder_store(self) -> Path:
        """The folder of the encoder states."""
        layout = (store.FORMAT, store.PART_TOKENS, store.WINDOW_ROWS)
        key = _key(layout, self.teacher_key, self.base.sources_key, vars(self.numbers))
        return self.root / f"encoder-{key}"

    @cached_property
    def decoder_stores(self) -> list[Path]:
        """The folders of the decoder states, one per label set."""
        keys = [_key(self.encoder_store.name, e.targets_key) for e, _ in self.decoders]
        return [self.root / f"decoder-{key}" for key in keys]

    @cached_property
    def examples_of(self) -> list[list[list[int]]]:
        """By label set and source row: the examples of that source."""
        found: list[list[list[int]]] = []
        for examples, _ in self.decoders:
            by_row: list[list[int]] = [[] for _ in self.sources]
            for i, row in enumerate(examples.rows):
                by_row[row].append(i)
            found.append(by_row)
        return found

    @cached_property
    def arrays(self) -> dict[Path, int]:
        """Every array wanted, and its bytes."""
        each = self.width * np.dtype(store.KINDS[self.numbers.kept]).itemsize
        found = {self.encoder_store / STATES: each * sum(map(len, self.sources))} if self.encoder else {}
        for folder, (examples, layers) in zip(self.decoder_stores, self.decoders, strict=True):
            found |= {folder / layer_name(n): each * sum(map(len, examples.targets)) for n in layers}
        return found

    def missing(self) -> list[int]:
        """The parts that lack something."""
        found = {n for array in self.arrays for n in store.missing_parts(array, len(self.parts))}
        return sorted(found)

    def missing_bytes(self) -> int:
        """Bytes that are still to be written: the arrays that are not whole yet, less their finished parts."""
        return sum(
            size - store.bytes_of_parts(array) for array, size in self.arrays.items() if not store.is_whole(array)
        )

    def unfinished(self) -> bool:
        """Whether an array is not whole yet."""
        return any(not store.is_whole(array) for array in self.arrays)

    def lock(self) -> FileLock:
        """Held by the one process that leads the making of these stores."""
        return store.lock(self.root, self.encoder_store.name)

    def begin(self) -> None:
        """Make the folders and say what they are for; UserError where the stores are larger than bound or disk."""
        need = sum(self.arrays.values())
        if self.most is not None and need > self.most:
            raise UserError(
                f"{self.root}: the teacher cache takes {need / 1e9:.3g} GB, more than training.cache_gb allows "
                f"({self.most / 1e9:.3g}); raise it, or set training.teacher_cache to auto or off"
            )
        check_disk(self.root, self.missing_bytes())
        for folder in {array.parent for array in self.arrays}:
            facts = {"width": self.width, "group": self.encoder_store.name}
            write_json_atomic(folder / "about.json", {**self.about, **vars(self.numbers), **facts})
            store.sweep_orphans(folder)

    def finish(self) -> None:
        """Write the manifests: all parts are there. UserError where some were taken away meanwhile."""
        for array, size in self.arrays.items():
            if not store.is_whole(array):
                if store.missing_parts(array, len(self.parts)):
                    raise PassingError(f"{array.parent}: was removed while it was made; run again")
                store.finish_array(array, {"parts": len(self.parts), "bytes": size})

    @property
    def device_seconds(self) -> dict[str, float]:
        """What making each finished array took, whoever made it, by store and array: "encoder-KEY/states"."""
        whole = (array for array in self.arrays if store.is_whole(array))
        return {f"{array.parent.name}/{array.name}": store.device_seconds(array) for array in whole}

    def make(self, teacher: PreTrainedModel, number: int) -> dict[str, float]:
        """Make part `number` of every array that lacks it; returns how many rows and source tokens it had."""
        unfinished = [array for array in self.arrays if not store.is_whole(array)]
        lacking = [array for array in unfinished if not store.part_path(array, number).is_file()]
        started = time.monotonic()
        rows = self.parts[number]
        found: dict[Path, dict[int, np.ndarray]] = {array: {} for array in lacking}
        stored = self.encoder and self.encoder_store / STATES not in lacking
        states_of = _open_part(self.encoder_store / STATES, self, number) if stored else None
        for places in buckets([len(self.sources[row]) for row in rows], BATCH_TOKENS):
            micro = [rows[place] for place in places]
            states, mask = self._encode(teacher, micro, states_of)
            if self.encoder_store / STATES in lacking:
                for row, values in zip(micro, states, strict=True):
                    found[self.encoder_store / STATES][row] = self._bits(values[: len(self.sources[row])])
            self._decode(teacher, micro, states, mask, found)
        for array, by_index in found.items():
            order = rows if array.parent == self.encoder_store else self.examples_in(number, array.parent)
            kind = store.KINDS[self.numbers.kept]
            vectors = [by_index[i] for i in order] or [np.empty((0, self.width), kind)]
            if array == next(iter(found)):  # the time of them all, told once
                store.write_time(array, number, _device_seconds(started, teacher))
            store.write_part(array, number, np.concatenate(vectors))
        return {"rows": len(rows), "tokens": sum(len(self.sources[row]) for row in rows)}

    def examples_in(self, number: int, folder: Path) -> list[int]:
        """The examples of a part of a decoder store, in the order in which it holds them."""
        by_row = self.examples_of[self.decoder_stores.index(folder)]
        return [i for row in self.parts[number] for i in by_row[row]]

    def _encode(
        self, teacher: PreTrainedModel, rows: list[int], stored: dict[int, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """The encoder's states for a few sources, padded, and their mask."""
        sources = [self.sources[row] for row in rows]
        mask = mask_of(sources).to(teacher.device)
        if stored is not None:
            states = torch.nn.utils.rnn.pad_sequence([stored[row] for row in rows], batch_first=True)
            return states.to(teacher.device, teacher.dtype), mask
        ids = padded(sources, teacher.config.pad_token_id).to(teacher.device)
        with self.precision(teacher):
            states = families.encode(teacher, ids, mask).last
        # As kept, also where the decoder goes on from here: what it gives must not hang on what was there before.
        return states.to(TORCH[self.numbers.kept]).to(teacher.dtype), mask

    def _decode(
        self,
        teacher: PreTrainedModel,
        rows: list[int],
        states: Tensor,
        mask: Tensor,
        found: dict[Path, dict[int, np.ndarray]],
    ) -> None:
        """The decoder's outputs for the examples of a few sources, into the arrays that lack them."""
        for folder, by_row, (examples, layers) in zip(
            self.decoder_stores, self.examples_of, self.decoders, strict=True
        ):
            wanted = [layer for layer in layers if folder / layer_name(layer) in found]
            pairs = [(place, i) for place, row in enumerate(rows) for i in by_row[row]]
            if not wanted or not pairs:
                continue
            places = torch.tensor([place for place, _ in pairs], device=states.device)
            labels = padded([examples.targets[i] for _, i in pairs], -100).to(states.device)
            with self.precision(teacher):
                ids = families.shift_right(teacher, labels)
                outputs = families.decode(teacher, ids, states[places], mask[places], layers=True).layers
            for layer in wanted:
                for (_, i), values in zip(pairs, outputs[layer], strict=True):
                    found[folder / layer_name(layer)][i] = self._bits(values[: len(examples.targets[i])])

    def precision(self, teacher: PreTrainedModel) -> Any:
        """A block in which the teacher runs in the pass's numbers."""
        return torch.autocast(teacher.device.type, torch.bfloat16, enabled=self.numbers.computed == "bf16")

    def _bits(self, values: Tensor) -> np.ndarray:
        kept = values.to("cpu", TORCH[self.numbers.kept])
        return (kept.view(torch.int16) if self.numbers.kept == "bf16" else kept).numpy()


def make_here(work: Pass, teacher: PreTrainedModel, progress: Callable[[int, int], None] | None = None) -> None:
    """Carry out a pass in this process."""
    with work.lock():
        if not work.unfinished():
            return
        missing = work.missing()
        work.begin()
        with torch.inference_mode():
            for done, number in enumerate(missing):
                work.make(teacher, number)
                if progress:
                    progress(done + 1, len(missing))
        work.finish()


def open_encoder(work: Pass) -> Ragged:
    """The encoder states of a finished pass, by source row."""
    return _open(work.encoder_store / STATES, work.parts, [len(s) for s in work.sources], work)


def open_decoder(work: Pass, which: int = 0) -> dict[int, Ragged]:
    """The decoder states of a finished pass's label set, by layer and example."""
    folder, (examples, layers) = work.decoder_stores[which], work.decoders[which]
    parts = [work.examples_in(n, folder) for n in range(len(work.parts))]
    lengths = [len(target) for target in examples.targets]
    return {layer: _open(folder / layer_name(layer), parts, lengths, work) for layer in layers}


def layer_name(layer: int) -> str:
    """The array of a decoder layer's outputs."""
    return f"layer-{layer:02d}"


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of numbers as one tensor [rows, longest], filled up at the end with `value`."""
    return torch.tensor(pad(rows, value))


def mask_of(rows: Sequence[Sequence[int]]) -> Tensor:
    """1 where the padded rows have a token, else 0: [rows, longest]."""
    lengths = torch.tensor([len(row) for row in rows])
    return (torch.arange(int(lengths.max()))[None, :] < lengths[:, None]).long()


def check_disk(root: Path, need: int) -> None:
    """UserError where the disk has not so many bytes to spare."""
    free = shutil.disk_usage(root).free
    if need > free * 0.9:
        raise UserError(
            f"{root}: the teacher cache needs {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; free some "
            f"(`raydistill cache` lists old stores), set RAYDISTILL_HOME to a larger disk, or set "
            f"training.teacher_cache to auto or off"
        )


def _open(array: Path, parts: list[list[int]], lengths: list[int], work: Pass) -> Ragged:
    """An array's rows, mapped as they are read; UserError where a part does not have its size."""
    store.mark_used(array.parent)
    part, start = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    found = []
    for number, rows in enumerate(parts):
        at = 0
        for row in rows:
            part[row], start[row] = number, at
            at += lengths[row]
        found.append(_part(store.part_path(array, number), at, work))
    return Ragged(found, part, start, np.asarray(lengths), TORCH[work.numbers.kept])


def _part(path: Path, vectors: int, work: Pass) -> Part:
    """A part that is there; UserError where it does not have its size."""
    about = path.stat() if path.is_file() else None
    part = Part(path, vectors, work.width, work.numbers.kept, about.st_mtime_ns if about else 0)
    if about is None or about.st_size != part.nbytes:
        raise _damaged(path)
    return part


@lru_cache(maxsize=MAPPED)
def mapped(part: Part) -> np.ndarray:
    """A part as an array [vectors, width] over the file's pages; numpy's own memmap would keep a file open for each."""
    kind = np.dtype(store.KINDS[part.kind])
    if not part.nbytes:
        return np.empty((0, part.width), kind)
    torch_kind = torch.from_numpy(np.empty(0, kind)).dtype
    try:
        numbers = torch.from_file(str(part.path), shared=False, size=part.vectors * part.width, dtype=torch_kind)
    except RuntimeError:
        raise _damaged(part.path) from None
    return numbers.numpy().reshape(part.vectors, part.width)


def _damaged(path: Path) -> UserError:
    return UserError(f"{path}: is damaged or missing; delete {path.parents[1]} and run again")


def _open_part(array: Path, work: Pass, number: int) -> dict[int, Tensor]:
    """The states of one part's rows."""
    rows = work.parts[number]
    lengths = [len(work.sources[row]) for row in rows]
    vectors = torch.from_numpy(mapped(_part(store.part_path(array, number), sum(lengths), work)))
    vectors = vectors.view(torch.bfloat16) if work.numbers.kept == "bf16" else vectors
    return dict(zip(rows, vectors.split(lengths), strict=True))


def _device_seconds(started: float, teacher: PreTrainedModel) -> float:
    """Wall time times the GPUs held, or the threads at work where there is none."""
    return (time.monotonic() - started) * (torch.get_num_threads() if teacher.device.type == "cpu" else 1)


def _key(*parts: object) -> str:
    """A short content key."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
