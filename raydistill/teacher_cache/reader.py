"""Reading the arrays of a complete teacher cache, memory-mapped."""

from collections.abc import Sequence
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
from raydistill.teacher_cache.layout import TORCH_DTYPES, CacheLayout, layer_array_name

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
    dtype: str
    mtime_ns: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.num_vectors * self.width * np.dtype(store.STORAGE_DTYPES[self.dtype]).itemsize


@dataclass(frozen=True)
class RaggedArray:
    """Memory-mapped rows of vectors.

    Row i consists of `lengths[i]` vectors of the part `parts[part_numbers[i]]`, from vector `offsets[i]` on.
    """

    parts: list[PartFile]
    part_numbers: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    dtype: torch.dtype

    def read_flat(self, rows: Sequence[int]) -> Tensor:
        """The vectors of the rows one after another, [tokens, width]."""
        return self._to_tensor(np.concatenate([self._read_row(i) for i in rows]))

    def read_padded(self, rows: Sequence[int]) -> Tensor:
        """The vectors of the rows, padded with zeros, [rows, longest, width]."""
        first = self.parts[0]
        shape = (len(rows), int(self.lengths[list(rows)].max()), first.width)
        padded = np.zeros(shape, store.STORAGE_DTYPES[first.dtype])
        for position, i in enumerate(rows):
            padded[position, : self.lengths[i]] = self._read_row(i)
        return self._to_tensor(padded)

    def _read_row(self, i: int) -> np.ndarray:
        return map_part(self.parts[self.part_numbers[i]])[self.offsets[i] : self.offsets[i] + self.lengths[i]]

    def _to_tensor(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor.view(torch.bfloat16) if self.dtype == torch.bfloat16 else tensor


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
    """The encoder states of the rows of a part, [tokens, width] each.

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
    vectors = torch.from_numpy(map_part(part))
    vectors = vectors.view(torch.bfloat16) if layout.dtypes.storage == "bf16" else vectors
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
    return RaggedArray(parts, part_numbers, offsets, np.asarray(lengths), TORCH_DTYPES[layout.dtypes.storage])


@lru_cache(maxsize=MAX_MAPPED_PARTS)
def map_part(part: PartFile) -> np.ndarray:
    """Map a part as an array [vectors, width].

    numpy's memmap would keep a file open for each part; torch's `from_file` does not.

    Raises:
        UserError: The part is missing or damaged.
    """
    dtype = np.dtype(store.STORAGE_DTYPES[part.dtype])
    if not part.nbytes:
        return np.empty((0, part.width), dtype)
    torch_dtype = torch.from_numpy(np.empty(0, dtype)).dtype
    try:
        values = torch.from_file(str(part.path), shared=False, size=part.num_vectors * part.width, dtype=torch_dtype)
    except RuntimeError:
        raise _corrupt_part_error(part.path) from None
    return values.numpy().reshape(part.num_vectors, part.width)


def _corrupt_part_error(path: Path) -> UserError:
    return UserError(f"{path}: is damaged or missing; delete {path.parents[1]} and run the same command again")
