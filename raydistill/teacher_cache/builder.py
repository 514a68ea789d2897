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

from raydistill.core.errors import TransientError, UserError
from raydistill.core.files import write_json_atomic
from raydistill.data.batching import Examples, bucket_by_length, pad
from raydistill.models import families
from raydistill.teacher_cache import store

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BATCH_TOKENS = 8192
ENCODER_ARRAY = "states"
# Parts mapped at once, of the 65,530 mappings that Linux lets a process have: a large corpus has thousands of parts for
# the encoder and for every layer.
MAX_MAPPED_PARTS = 32_768


@dataclass(frozen=True)
class PartFile:
    """A part on disk: `vectors` of `width` numbers of `kind`. `made`: when, since a store may be deleted and remade."""

    path: Path
    num_vectors: int
    width: int
    dtype: str
    mtime_ns: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.num_vectors * self.width * np.dtype(store.STORAGE_DTYPES[self.dtype]).itemsize


@dataclass(frozen=True)
class RaggedArray:
    """Memory-mapped rows of vectors: row i is `lengths[i]` vectors of part `part[i]`, from `start[i]` on."""

    parts: list[PartFile]
    part_numbers: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    dtype: torch.dtype

    def read_flat(self, rows: Sequence[int]) -> Tensor:
        """The rows' vectors one after another, [their tokens, width]."""
        return self._to_tensor(np.concatenate([self._read_row(i) for i in rows]))

    def read_padded(self, rows: Sequence[int]) -> Tensor:
        """The rows filled up with zeros, [rows, longest, width]."""
        first = self.parts[0]
        shape = (len(rows), int(self.lengths[list(rows)].max()), first.width)
        out = np.zeros(shape, store.STORAGE_DTYPES[first.dtype])
        for place, i in enumerate(rows):
            out[place, : self.lengths[i]] = self._read_row(i)
        return self._to_tensor(out)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(part.nbytes for part in self.parts)

    def _read_row(self, i: int) -> np.ndarray:
        return map_part(self.parts[self.part_numbers[i]])[self.offsets[i] : self.offsets[i] + self.lengths[i]]

    def _to_tensor(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor.view(torch.bfloat16) if self.dtype == torch.bfloat16 else tensor


@dataclass(frozen=True)
class CacheDtypes:
    """In which numbers states are worked out and kept: "bf16" or "fp32" each. Part of a store's key."""

    storage: str = "bf16"
    compute: str = "fp32"


@dataclass(frozen=True)
class CacheBuilder:
    """What a pass of a teacher over one set of sources has to leave under `root`.

    `base`: examples that hold the sources. `decoders`: per label set its examples and the decoder layers wanted.
    `width` is the model's, `most` the bytes that the stores may take together.
    """

    root: Path
    teacher_key: str
    source_examples: Examples
    width: int
    encoder: bool = True
    label_sets: list[tuple[Examples, list[int]]] = field(default_factory=list)
    dtypes: CacheDtypes = CacheDtypes()
    metadata: dict[str, Any] = field(default_factory=dict)
    max_bytes: float | None = None

    @property
    def sources(self) -> list[list[int]]:
        """Token ids of each source."""
        return self.source_examples.sources

    @cached_property
    def parts(self) -> list[list[int]]:
        """The source rows of each part."""
        return store.plan_parts([len(source) for source in self.sources])

    @cached_property
    def encoder_store(self) -> Path:
        """The folder of the encoder states."""
        layout = (store.FORMAT_VERSION, store.PART_TOKENS, store.WINDOW_ROWS)
        key = _content_key(layout, self.teacher_key, self.source_examples.sources_key, vars(self.dtypes))
        return self.root / f"encoder-{key}"

    @cached_property
    def decoder_stores(self) -> list[Path]:
        """The folders of the decoder states, one per label set."""
        keys = [_content_key(self.encoder_store.name, e.targets_key) for e, _ in self.label_sets]
        return [self.root / f"decoder-{key}" for key in keys]

    @cached_property
    def examples_by_source(self) -> list[list[list[int]]]:
        """By label set and source row: the examples of that source."""
        found: list[list[list[int]]] = []
        for examples, _ in self.label_sets:
            by_row: list[list[int]] = [[] for _ in self.sources]
            for i, row in enumerate(examples.source_indices):
                by_row[row].append(i)
            found.append(by_row)
        return found

    @cached_property
    def array_sizes(self) -> dict[Path, int]:
        """Every array wanted, and its bytes."""
        each = self.width * np.dtype(store.STORAGE_DTYPES[self.dtypes.storage]).itemsize
        found = {self.encoder_store / ENCODER_ARRAY: each * sum(map(len, self.sources))} if self.encoder else {}
        for folder, (examples, layers) in zip(self.decoder_stores, self.label_sets, strict=True):
            found |= {folder / layer_array_name(n): each * sum(map(len, examples.targets)) for n in layers}
        return found

    def missing_parts(self) -> list[int]:
        """The parts that lack something."""
        found = {n for array in self.array_sizes for n in store.missing_parts(array, len(self.parts))}
        return sorted(found)

    def missing_bytes(self) -> int:
        """Bytes that are still to be written: the arrays that are not whole yet, less their finished parts."""
        return sum(
            size - store.parts_size_bytes(array)
            for array, size in self.array_sizes.items()
            if not store.is_complete(array)
        )

    def is_incomplete(self) -> bool:
        """Whether an array is not whole yet."""
        return any(not store.is_complete(array) for array in self.array_sizes)

    def lock(self) -> FileLock:
        """Held by the one process that leads the making of these stores."""
        return store.group_lock(self.root, self.encoder_store.name)

    def prepare(self) -> None:
        """Make the folders and say what they are for; UserError where the stores are larger than bound or disk."""
        need = sum(self.array_sizes.values())
        if self.max_bytes is not None and need > self.max_bytes:
            raise UserError(
                f"{self.root}: the teacher cache takes {need / 1e9:.3g} GB, more than training.cache_gb allows "
                f"({self.max_bytes / 1e9:.3g}); raise it, or set training.teacher_cache to auto or off"
            )
        check_disk_space(self.root, self.missing_bytes())
        for folder in {array.parent for array in self.array_sizes}:
            facts = {"width": self.width, "group": self.encoder_store.name}
            write_json_atomic(folder / "about.json", {**self.metadata, **vars(self.dtypes), **facts})
            store.remove_partial_files(folder)

    def finish(self) -> None:
        """Write the manifests: all parts are there. UserError where some were taken away meanwhile."""
        for array, size in self.array_sizes.items():
            if not store.is_complete(array):
                if store.missing_parts(array, len(self.parts)):
                    raise TransientError(f"{array.parent}: was removed while it was made; run again")
                store.finish_array(array, {"parts": len(self.parts), "bytes": size})

    @property
    def device_seconds(self) -> dict[str, float]:
        """What making each finished array took, whoever made it, by store and array: "encoder-KEY/states"."""
        whole = (array for array in self.array_sizes if store.is_complete(array))
        return {f"{array.parent.name}/{array.name}": store.read_device_seconds(array) for array in whole}

    def build_part(self, teacher: PreTrainedModel, number: int) -> dict[str, float]:
        """Make part `number` of every array that lacks it; returns how many rows and source tokens it had."""
        unfinished = [array for array in self.array_sizes if not store.is_complete(array)]
        lacking = [array for array in unfinished if not store.part_path(array, number).is_file()]
        started = time.monotonic()
        rows = self.parts[number]
        found: dict[Path, dict[int, np.ndarray]] = {array: {} for array in lacking}
        stored = self.encoder and self.encoder_store / ENCODER_ARRAY not in lacking
        states_of = _read_part(self.encoder_store / ENCODER_ARRAY, self, number) if stored else None
        for places in bucket_by_length([len(self.sources[row]) for row in rows], BATCH_TOKENS):
            micro = [rows[place] for place in places]
            states, mask = self._encode(teacher, micro, states_of)
            if self.encoder_store / ENCODER_ARRAY in lacking:
                for row, values in zip(micro, states, strict=True):
                    found[self.encoder_store / ENCODER_ARRAY][row] = self._to_numpy(values[: len(self.sources[row])])
            self._decode(teacher, micro, states, mask, found)
        for array, by_index in found.items():
            order = rows if array.parent == self.encoder_store else self.examples_in_part(number, array.parent)
            kind = store.STORAGE_DTYPES[self.dtypes.storage]
            vectors = [by_index[i] for i in order] or [np.empty((0, self.width), kind)]
            if array == next(iter(found)):  # the time of them all, told once
                store.write_part_time(array, number, _device_seconds(started, teacher))
            store.write_part(array, number, np.concatenate(vectors))
        return {"rows": len(rows), "tokens": sum(len(self.sources[row]) for row in rows)}

    def examples_in_part(self, number: int, folder: Path) -> list[int]:
        """The examples of a part of a decoder store, in the order in which it holds them."""
        by_row = self.examples_by_source[self.decoder_stores.index(folder)]
        return [i for row in self.parts[number] for i in by_row[row]]

    def _encode(
        self, teacher: PreTrainedModel, rows: list[int], cached_states: dict[int, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """The encoder's states for a few sources, padded, and their mask."""
        sources = [self.sources[row] for row in rows]
        mask = make_attention_mask(sources).to(teacher.device)
        if cached_states is not None:
            states = torch.nn.utils.rnn.pad_sequence([cached_states[row] for row in rows], batch_first=True)
            return states.to(teacher.device, teacher.dtype), mask
        ids = pad_to_tensor(sources, teacher.config.pad_token_id).to(teacher.device)
        with self.autocast(teacher):
            states = families.encode(teacher, ids, mask).last_hidden_state
        # As kept, also where the decoder goes on from here: what it gives must not hang on what was there before.
        return states.to(TORCH_DTYPES[self.dtypes.storage]).to(teacher.dtype), mask

    def _decode(
        self,
        teacher: PreTrainedModel,
        rows: list[int],
        states: Tensor,
        mask: Tensor,
        vectors_by_array: dict[Path, dict[int, np.ndarray]],
    ) -> None:
        """The decoder's outputs for the examples of a few sources, into the arrays that lack them."""
        for folder, by_row, (examples, layers) in zip(
            self.decoder_stores, self.examples_by_source, self.label_sets, strict=True
        ):
            wanted = [layer for layer in layers if folder / layer_array_name(layer) in vectors_by_array]
            pairs = [(place, i) for place, row in enumerate(rows) for i in by_row[row]]
            if not wanted or not pairs:
                continue
            places = torch.tensor([place for place, _ in pairs], device=states.device)
            labels = pad_to_tensor([examples.targets[i] for _, i in pairs], -100).to(states.device)
            with self.autocast(teacher):
                ids = families.shift_right(teacher, labels)
                outputs = families.decode(teacher, ids, states[places], mask[places], layers=True).layers
            for layer in wanted:
                for (_, i), values in zip(pairs, outputs[layer], strict=True):
                    vectors_by_array[folder / layer_array_name(layer)][i] = self._to_numpy(
                        values[: len(examples.targets[i])]
                    )

    def autocast(self, teacher: PreTrainedModel) -> Any:
        """A block in which the teacher runs in the pass's numbers."""
        return torch.autocast(teacher.device.type, torch.bfloat16, enabled=self.dtypes.compute == "bf16")

    def _to_numpy(self, values: Tensor) -> np.ndarray:
        kept = values.to("cpu", TORCH_DTYPES[self.dtypes.storage])
        return (kept.view(torch.int16) if self.dtypes.storage == "bf16" else kept).numpy()


def build_cache(
    builder: CacheBuilder, teacher: PreTrainedModel, progress: Callable[[int, int], None] | None = None
) -> None:
    """Carry out a pass in this process."""
    with builder.lock():
        if not builder.is_incomplete():
            return
        missing = builder.missing_parts()
        builder.prepare()
        with torch.inference_mode():
            for done, number in enumerate(missing):
                builder.build_part(teacher, number)
                if progress:
                    progress(done + 1, len(missing))
        builder.finish()


def open_encoder_states(builder: CacheBuilder) -> RaggedArray:
    """The encoder states of a finished pass, by source row."""
    return _open_array(builder.encoder_store / ENCODER_ARRAY, builder.parts, [len(s) for s in builder.sources], builder)


def open_decoder_states(builder: CacheBuilder, index: int = 0) -> dict[int, RaggedArray]:
    """The decoder states of a finished pass's label set, by layer and example."""
    folder, (examples, layers) = builder.decoder_stores[index], builder.label_sets[index]
    parts = [builder.examples_in_part(n, folder) for n in range(len(builder.parts))]
    lengths = [len(target) for target in examples.targets]
    return {layer: _open_array(folder / layer_array_name(layer), parts, lengths, builder) for layer in layers}


def layer_array_name(layer: int) -> str:
    """The array of a decoder layer's outputs."""
    return f"layer-{layer:02d}"


def pad_to_tensor(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of numbers as one tensor [rows, longest], filled up at the end with `value`."""
    return torch.tensor(pad(rows, value))


def make_attention_mask(rows: Sequence[Sequence[int]]) -> Tensor:
    """1 where the padded rows have a token, else 0: [rows, longest]."""
    lengths = torch.tensor([len(row) for row in rows])
    return (torch.arange(int(lengths.max()))[None, :] < lengths[:, None]).long()


def check_disk_space(root: Path, needed_bytes: int) -> None:
    """UserError where the disk has not so many bytes to spare."""
    free = shutil.disk_usage(root).free
    if needed_bytes > free * 0.9:
        raise UserError(
            f"{root}: the teacher cache needs {needed_bytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; free some "
            f"(`raydistill cache` lists old stores), set RAYDISTILL_HOME to a larger disk, or set "
            f"training.teacher_cache to auto or off"
        )


def _open_array(array: Path, rows_by_part: list[list[int]], lengths: list[int], builder: CacheBuilder) -> RaggedArray:
    """An array's rows, mapped as they are read; UserError where a part does not have its size."""
    store.mark_used(array.parent)
    part, start = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    found = []
    for number, rows in enumerate(rows_by_part):
        at = 0
        for row in rows:
            part[row], start[row] = number, at
            at += lengths[row]
        found.append(_check_part(store.part_path(array, number), at, builder))
    return RaggedArray(found, part, start, np.asarray(lengths), TORCH_DTYPES[builder.dtypes.storage])


def _check_part(path: Path, num_vectors: int, builder: CacheBuilder) -> PartFile:
    """A part that is there; UserError where it does not have its size."""
    about = path.stat() if path.is_file() else None
    part = PartFile(path, num_vectors, builder.width, builder.dtypes.storage, about.st_mtime_ns if about else 0)
    if about is None or about.st_size != part.nbytes:
        raise _corrupt_part_error(path)
    return part


@lru_cache(maxsize=MAX_MAPPED_PARTS)
def map_part(part: PartFile) -> np.ndarray:
    """A part as an array [vectors, width] over the file's pages; numpy's own memmap would keep a file open for each."""
    kind = np.dtype(store.STORAGE_DTYPES[part.dtype])
    if not part.nbytes:
        return np.empty((0, part.width), kind)
    torch_kind = torch.from_numpy(np.empty(0, kind)).dtype
    try:
        numbers = torch.from_file(str(part.path), shared=False, size=part.num_vectors * part.width, dtype=torch_kind)
    except RuntimeError:
        raise _corrupt_part_error(part.path) from None
    return numbers.numpy().reshape(part.num_vectors, part.width)


def _corrupt_part_error(path: Path) -> UserError:
    return UserError(f"{path}: is damaged or missing; delete {path.parents[1]} and run again")


def _read_part(array: Path, builder: CacheBuilder, number: int) -> dict[int, Tensor]:
    """The states of one part's rows."""
    rows = builder.parts[number]
    lengths = [len(builder.sources[row]) for row in rows]
    vectors = torch.from_numpy(map_part(_check_part(store.part_path(array, number), sum(lengths), builder)))
    vectors = vectors.view(torch.bfloat16) if builder.dtypes.storage == "bf16" else vectors
    return dict(zip(rows, vectors.split(lengths), strict=True))


def _device_seconds(started: float, teacher: PreTrainedModel) -> float:
    """Wall time times the GPUs held, or the threads at work where there is none."""
    return (time.monotonic() - started) * (torch.get_num_threads() if teacher.device.type == "cpu" else 1)


def _content_key(*parts: object) -> str:
    """A short content key."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
