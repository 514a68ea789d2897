"""Building a teacher cache: encoder states and decoder hidden states of a teacher, part by part.

The unit of work is a part: `build_part` computes part n of every array that lacks this part, in any process. A build
that was interrupted resumes with the missing parts.
"""

import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from raydistill.core import artifact
from raydistill.data.batching import bucket_by_length
from raydistill.models import families
from raydistill.models.tensors import make_attention_mask, pad_to_tensor
from raydistill.teacher_cache import store
from raydistill.teacher_cache.layout import CacheLayout, layer_array_name
from raydistill.teacher_cache.reader import read_encoder_part
from raydistill.teacher_cache.storage_dtypes import NUMPY_DTYPES, from_storage, stored_width, to_numpy, to_storage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = 8192  # padded source tokens of a batch of the teacher

# The vectors of a part by array, then by source row (encoder) or by example (decoder).
PartVectors = dict[Path, dict[int, np.ndarray]]


def build_cache(layout: CacheLayout, teacher: "PreTrainedModel") -> None:
    """Build the missing parts in this process.

    Raises:
        UserError: The arrays exceed the limit or the free disk space.
    """
    with layout.lock():
        if not layout.is_incomplete():
            return
        missing = layout.missing_parts()
        layout.prepare()
        with torch.inference_mode():
            for number in missing:
                build_part(layout, teacher, number)
        layout.finish()


def build_part(layout: CacheLayout, teacher: "PreTrainedModel", number: int) -> dict[str, float]:
    """Build part `number` of every array that lacks this part.

    Returns:
        The numbers of `rows` and source `tokens` of the part.
    """
    started = time.monotonic()
    rows = layout.parts[number]
    incomplete = [array for array in layout.array_sizes if not artifact.is_complete(array)]
    lacking = [array for array in incomplete if not store.part_path(array, number).is_file()]
    vectors: PartVectors = {array: {} for array in lacking}
    is_encoder_stored = layout.encoder and layout.encoder_array not in lacking
    cached_states = read_encoder_part(layout, number) if is_encoder_stored else None
    for positions in bucket_by_length([len(layout.sources[row]) for row in rows], BATCH_TOKENS):
        batch = [rows[position] for position in positions]
        states, mask = _encode(layout, teacher, batch, cached_states)
        if layout.encoder_array in lacking:
            for row, values in zip(batch, states, strict=True):
                vectors[layout.encoder_array][row] = _to_stored_array(layout, values[: len(layout.sources[row])])
        for array, by_example in _decode(layout, teacher, batch, states, mask, lacking).items():
            vectors[array] |= by_example
    _write_part_vectors(layout, number, vectors, _device_seconds(started, teacher))
    return {"rows": len(rows), "tokens": sum(len(layout.sources[row]) for row in rows)}


def teacher_autocast(layout: CacheLayout, teacher: "PreTrainedModel") -> AbstractContextManager[object]:
    """A context in which the teacher computes in the compute dtype of the cache."""
    return torch.autocast(teacher.device.type, torch.bfloat16, enabled=layout.dtypes.compute == "bf16")


def _encode(
    layout: CacheLayout, teacher: "PreTrainedModel", rows: list[int], cached_states: dict[int, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """The encoder states of a batch of sources, [rows, longest, width], and the attention mask, [rows, longest]."""
    sources = [layout.sources[row] for row in rows]
    mask = make_attention_mask(sources).to(teacher.device)
    if cached_states is not None:
        states = torch.nn.utils.rnn.pad_sequence([cached_states[row] for row in rows], batch_first=True)
        return states.to(teacher.device, teacher.dtype), mask
    ids = pad_to_tensor(sources, teacher.config.pad_token_id).to(teacher.device)
    with teacher_autocast(layout, teacher):
        states = families.encode(teacher, ids, mask).last_hidden_state
    # Rounded to the storage dtype also for the decoder, so that its states do not depend on which arrays existed.
    return from_storage(to_storage(states, layout.dtypes.storage), teacher.dtype), mask


def _decode(
    layout: CacheLayout, teacher: "PreTrainedModel", rows: list[int], states: Tensor, mask: Tensor, lacking: list[Path]
) -> PartVectors:
    """The decoder states of all examples of a batch of sources, for the arrays in `lacking`."""
    vectors: PartVectors = {}
    for folder, by_row, (examples, layers) in zip(
        layout.decoder_stores, layout.examples_by_source, layout.label_sets, strict=True
    ):
        arrays = {layer: folder / layer_array_name(layer) for layer in layers}
        arrays = {layer: array for layer, array in arrays.items() if array in lacking}
        pairs = [(position, i) for position, row in enumerate(rows) for i in by_row[row]]
        if not arrays or not pairs:
            continue
        positions = torch.tensor([position for position, _ in pairs], device=states.device)
        labels = pad_to_tensor([examples.targets[i] for _, i in pairs], -100).to(states.device)
        with teacher_autocast(layout, teacher):
            ids = families.shift_right(teacher, labels)
            outputs = families.decode(teacher, ids, states[positions], mask[positions], layers=True).layers
        for layer, array in arrays.items():
            vectors[array] = {
                i: _to_stored_array(layout, values[: len(examples.targets[i])])
                for (_, i), values in zip(pairs, outputs[layer], strict=True)
            }
    return vectors


def _write_part_vectors(layout: CacheLayout, number: int, vectors: PartVectors, device_seconds: float) -> None:
    """Write a part of several arrays; `device_seconds` of all of them is recorded with the first array."""
    dtype = layout.dtypes.storage
    empty = np.empty((0, stored_width(dtype, layout.width)), NUMPY_DTYPES[dtype])
    for index, (array, by_row) in enumerate(vectors.items()):
        is_encoder = array == layout.encoder_array
        order = layout.parts[number] if is_encoder else layout.examples_in_part(number, array.parent)
        if index == 0:
            store.write_part_time(array, number, device_seconds)
        store.write_part(array, number, np.concatenate([by_row[i] for i in order] or [empty]))


def _to_stored_array(layout: CacheLayout, states: Tensor) -> np.ndarray:
    return to_numpy(to_storage(states, layout.dtypes.storage))


def _device_seconds(started: float, teacher: "PreTrainedModel") -> float:
    """Wall time since `started` times the number of GPUs, or of CPU threads."""
    return (time.monotonic() - started) * (torch.get_num_threads() if teacher.device.type == "cpu" else 1)
