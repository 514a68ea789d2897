"""The data types in which states are stored: bf16, fp32, and int8 with a float32 scale per block of a vector.

A vector x of int8 storage is divided into blocks of at most `BLOCK` numbers. A block has the scale s = max|x| / 127 and
the integers q = round(x / s), so that |x - q s| <= s / 2: symmetric quantisation to the nearest integer, as in
Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization". On disk the scales follow the integers of their
vector: width + 4 ceil(width / 128) bytes, 0.516 of bf16 at a multiple of 128.
"""

import numpy as np
import torch
from torch import Tensor

from raydistill.teacher_cache.store import StorageDtype

# numpy has no bfloat16, so the bits are stored as int16.
NUMPY_DTYPES: dict[str, type[np.generic]] = {"int8": np.int8, "bf16": np.int16, "fp32": np.float32}
TORCH_DTYPES = {"int8": torch.int8, "bf16": torch.bfloat16, "fp32": torch.float32}
# Numbers of a vector that share a scale. A channel of large values makes its own block coarse, and no other block.
# Another size is another layout on disk: increase `store.FORMAT_VERSION`.
BLOCK = 128
SCALE_BYTES = 4
MAX_INT8 = 127


def stored_width(dtype: StorageDtype, width: int) -> int:
    """The numbers of the storage dtype that a vector of `width` states takes."""
    return width + SCALE_BYTES * -(-width // BLOCK) if dtype == "int8" else width


def vector_bytes(dtype: StorageDtype, width: int) -> int:
    """The bytes on disk of a vector of `width` states."""
    return stored_width(dtype, width) * np.dtype(NUMPY_DTYPES[dtype]).itemsize


def to_storage(states: Tensor, dtype: StorageDtype) -> Tensor:
    """States [..., width] as they are stored: [..., `stored_width`], on the device of the states."""
    return _quantize(states) if dtype == "int8" else states.to(TORCH_DTYPES[dtype])


def from_storage(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Stored states [..., `stored_width`] as states [..., width] of `dtype`, on the device of `stored`."""
    return _dequantize(stored).to(dtype) if stored.dtype == torch.int8 else stored.to(dtype)


def to_numpy(stored: Tensor) -> np.ndarray:
    """Stored states as a numpy array; bf16 as the bits of int16."""
    stored = stored.cpu()
    return (stored.view(torch.int16) if stored.dtype == torch.bfloat16 else stored).numpy()


def from_numpy(values: np.ndarray) -> Tensor:
    """The stored states of an array of `to_numpy`."""
    stored = torch.from_numpy(values)
    return stored.view(torch.bfloat16) if stored.dtype == torch.int16 else stored


def _quantize(states: Tensor) -> Tensor:
    """The integers of each vector, followed by the bytes of its scales, as int8."""
    states = states.float()
    width = states.shape[-1]
    largest = torch.stack([block.abs().amax(-1) for block in states.split(BLOCK, dim=-1)], dim=-1)
    # A block of zeros has the smallest positive scale. An infinite or undefined value gives such a scale, which makes
    # the whole block undefined when it is read.
    scales = (largest / MAX_INT8).clamp(min=torch.finfo(torch.float32).tiny)
    integers = (states / _by_channel(scales, width)).round().nan_to_num().to(torch.int8)
    return torch.cat([integers, scales.view(torch.int8)], dim=-1)


def _dequantize(stored: Tensor) -> Tensor:
    """The states in float32. Vectors of zero bytes, with which rows are padded, are zeros."""
    num_blocks = -(-stored.shape[-1] // (BLOCK + SCALE_BYTES))
    width = stored.shape[-1] - SCALE_BYTES * num_blocks
    # A copy: a view as float32 needs an aligned start.
    scales = stored[..., width:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    return stored[..., :width] * _by_channel(scales, width)


def _by_channel(scales: Tensor, width: int) -> Tensor:
    """The scale of every number of a vector [..., width], or [..., 1] where all numbers share a scale."""
    return scales if scales.shape[-1] == 1 else scales.repeat_interleave(BLOCK, dim=-1)[..., :width]
