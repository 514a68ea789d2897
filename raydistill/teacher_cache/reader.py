"""Reading the arrays of a complete teacher cache, memory-mapped."""

import ctypes
import math
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from raydistill.core.artifact import MANIFEST
from raydistill.core.errors import UserError
from raydistill.core.files import mark_used
from raydistill.teacher_cache import store
from raydistill.teacher_cache.layout import CacheLayout, layer_array_name
from raydistill.teacher_cache.storage_dtypes import (
    NUMPY_DTYPES,
    from_numpy,
    from_storage,
    stored_width,
    vector_bytes,
)

# Parts that are mapped at a time. Linux allows a process 65,530 mappings, and a large corpus has thousands of parts for
# the encoder and for every layer.
MAX_MAPPED_PARTS = 32_768


@dataclass(frozen=True)
class PartFile:
    """A part on disk: `num_vectors` vectors of `width` numbers.

    `mtime_ns` is the time of the part, or of the manifest of its array. A deleted part and its rebuilt version differ
    in this time, so that `map_part` maps the new file.
    """

    path: Path
    num_vectors: int
    width: int
    dtype: store.StorageDtype
    mtime_ns: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.num_vectors * vector_bytes(self.dtype, self.width)

    @property
    def shape(self) -> tuple[int, int]:
        """Vectors, and numbers on disk of a vector."""
        return self.num_vectors, stored_width(self.dtype, self.width)


@dataclass(frozen=True)
class RaggedArray:
    """Memory-mapped rows of vectors.

    Row i consists of `lengths[i]` vectors of the part `parts[part_numbers[i]]`, from vector `offsets[i]` on. Vectors
    are returned as they are stored; `from_storage` converts them, on any device.
    """

    parts: list[PartFile]
    part_numbers: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray

    def read_ahead(self, rows: Iterable[int]) -> None:
        """Let the kernel read the vectors of the rows from the disk in the background, a row in a piece."""
        for i in rows:
            advise_will_need(self._read_row(i))

    def read_flat(self, rows: Sequence[int]) -> Tensor:
        """The vectors of the rows one after another, [tokens, stored width]."""
        return from_numpy(np.concatenate([self._read_row(i) for i in rows]))

    def read_padded(self, rows: Sequence[int]) -> Tensor:
        """The vectors of the rows, padded with zeros, [rows, longest, stored width]."""
        first = self.parts[0]
        shape = (len(rows), int(self.lengths[list(rows)].max()), first.shape[-1])
        padded = np.zeros(shape, NUMPY_DTYPES[first.dtype])
        for position, i in enumerate(rows):
            padded[position, : self.lengths[i]] = self._read_row(i)
        return from_numpy(padded)

    def _read_row(self, i: int) -> np.ndarray:
        return map_part(self.parts[self.part_numbers[i]])[self.offsets[i] : self.offsets[i] + self.lengths[i]]


def advise_will_need(values: np.ndarray) -> None:
    """Announce to the kernel that a contiguous, memory-mapped array will be read. The call does not wait for the disk.

    Without the advice, the first access to each page waits for a read of a few pages.
    """
    if values.nbytes:
        start = values.__array_interface__["data"][0]
        page_start = start - start % mmap.PAGESIZE
        _madvise(page_start, start + values.nbytes - page_start, mmap.MADV_WILLNEED)


def _madvise(address: int, num_bytes: int, advice: int) -> None:
    """madvise(2). An error has no consequence: the pages are then read when they are accessed."""
    _libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), ctypes.c_int(advice))


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def open_encoder_states(layout: CacheLayout) -> RaggedArray:
    """Open the encoder states by source row.

    Raises:
        UserError: A part is missing or damaged.
    """
    lengths = [len(source) for source in layout.sources]
    return _open_array(layout.encoder_array, layout.parts, lengths, layout)


def open_decoder_states(layout: CacheLayout, index: int = 0) -> dict[int, RaggedArray]:
    """Open the decoder states of label set `index`, by layer and example.

    Raises:
        UserError: A part is missing or damaged.
    """
    folder, (examples, layers) = layout.decoder_stores[index], layout.label_sets[index]
    parts = [layout.examples_in_part(n, folder) for n in range(len(layout.parts))]
    lengths = [len(target) for target in examples.targets]
    return {layer: _open_array(folder / layer_array_name(layer), parts, lengths, layout) for layer in layers}


def read_encoder_part(layout: CacheLayout, number: int) -> dict[int, Tensor]:
    """The encoder states of the rows of a part in float32, [tokens, width] each.

    Raises:
        UserError: The part is missing or damaged.
    """
    rows = layout.parts[number]
    lengths = [len(layout.sources[row]) for row in rows]
    path = store.part_path(layout.encoder_array, number)
    status = path.stat() if path.is_file() else None
    part = PartFile(path, sum(lengths), layout.width, layout.dtypes.storage, status.st_mtime_ns if status else 0)
    if status is None or status.st_size != part.nbytes:
        raise _corrupt_part_error(path)
    vectors = from_storage(from_numpy(map_part(part)), torch.float32)
    return dict(zip(rows, vectors.split(lengths), strict=True))


def _open_array(array: Path, rows_by_part: list[list[int]], lengths: list[int], layout: CacheLayout) -> RaggedArray:
    """Open an array whose parts hold the rows `rows_by_part` of `lengths` vectors."""
    mark_used(array.parent / store.ABOUT_FILE)
    manifest = store.open_array(array)
    mtime_ns = (array / MANIFEST).stat().st_mtime_ns
    part_numbers, offsets = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    parts = []
    for number, rows in enumerate(rows_by_part):
        num_vectors = 0
        for row in rows:
            part_numbers[row], offsets[row] = number, num_vectors
            num_vectors += lengths[row]
        part = PartFile(store.part_path(array, number), num_vectors, layout.width, layout.dtypes.storage, mtime_ns)
        if manifest.files.get(part.path.name) != part.nbytes:
            raise _corrupt_part_error(part.path)
        parts.append(part)
    return RaggedArray(parts, part_numbers, offsets, np.asarray(lengths))


@lru_cache(maxsize=MAX_MAPPED_PARTS)
def map_part(part: PartFile) -> np.ndarray:
    """Map a part as an array [vectors, stored width].

    numpy's memmap would keep a file open for each part; torch's `from_file` does not.

    Raises:
        UserError: The part is missing or damaged.
    """
    dtype = np.dtype(NUMPY_DTYPES[part.dtype])
    if not part.nbytes:
        return np.empty(part.shape, dtype)
    torch_dtype = torch.from_numpy(np.empty(0, dtype)).dtype
    try:
        values = torch.from_file(str(part.path), shared=False, size=math.prod(part.shape), dtype=torch_dtype)
    except RuntimeError:
        raise _corrupt_part_error(part.path) from None
    return values.numpy().reshape(part.shape)


def _corrupt_part_error(path: Path) -> UserError:
    return UserError(f"{path}: is damaged or missing; delete {path.parents[1]} and run the same command again")
