"""The teacher runs once: its encoder states and decoder hidden states on disk, memory-mapped, shared by all trials.

Two stores. Encoder states are one ragged array per training set; decoder states one ragged array per layer and
label set. A store is a folder that appears whole; layers that are missing are added later.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from transformers import PreTrainedModel

from raydistill.config.errors import UserError
from raydistill.data.batches import Examples, buckets, pad
from raydistill.model import forms

# numpy has no bfloat16: its bits are kept as int16.
KINDS: dict[str, tuple[type, torch.dtype]] = {
    "bf16": (np.int16, torch.bfloat16),
    "fp32": (np.float32, torch.float32),
}
BATCH_TOKENS = 8192
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Ragged:
    """Rows of different length of vectors: `offsets` [rows + 1] into `data` [all tokens, width]."""

    data: np.ndarray
    offsets: np.ndarray
    dtype: torch.dtype

    def flat(self, rows: Sequence[int]) -> Tensor:
        """The rows' vectors one after another, [their tokens, width]."""
        parts = [self.data[self.offsets[i] : self.offsets[i + 1]] for i in rows]
        together = torch.from_numpy(np.concatenate(parts))
        return together.view(torch.bfloat16) if self.dtype == torch.bfloat16 else together

    def padded(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The rows filled up with zeros, [rows, longest, width], and their mask [rows, longest]."""
        lengths = torch.from_numpy(np.diff(self.offsets)[list(rows)])
        mask = torch.arange(int(lengths.max()))[None, :] < lengths[:, None]
        out = torch.zeros(*mask.shape, self.data.shape[1], dtype=self.dtype)
        out[mask] = self.flat(rows)
        return out, mask.long()


def key_of(*parts: object) -> str:
    """A short content key."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def tokens_key(rows: Sequence[Sequence[int]]) -> str:
    """A key of token ids: maximum length, language codes and tokenizer all show in them."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.asarray([len(row), *row], dtype=np.int32).tobytes())
    return digest.hexdigest()[:16]


def encoder_bytes(lengths: Sequence[int], width: int, dtype: str = "bf16") -> int:
    """Bytes of an encoder store; a decoder store takes as much per layer for its target lengths."""
    return sum(lengths) * width * np.dtype(KINDS[dtype][0]).itemsize


def encoder_store(
    root: Path,
    teacher: PreTrainedModel,
    sources: Sequence[Sequence[int]],
    teacher_key: str,
    *,
    dtype: str = "bf16",
    progress: Progress | None = None,
) -> Ragged:
    """Open the store of the teacher's encoder states for these sources, making it first where it is missing."""
    folder = root / f"encoder-{key_of(teacher_key, tokens_key(sources), dtype)}"
    lengths = [len(s) for s in sources]

    def fill(batch: list[int], write: Callable[[int, int, Tensor], None]) -> None:
        ids, mask = source_tensors(teacher, [sources[i] for i in batch])
        states = forms.encode(teacher, ids, mask).last
        for place, i in enumerate(batch):
            write(0, i, states[place, : lengths[i]])

    _make(folder, ["states"], lengths, teacher, dtype, fill, progress)
    return _open(folder, "states", lengths, teacher.config.d_model, dtype)


def decoder_store(
    root: Path,
    teacher: PreTrainedModel,
    examples: Examples,
    encoded: Ragged | None,
    layers: Sequence[int],
    teacher_key: str,
    *,
    dtype: str = "bf16",
    progress: Progress | None = None,
) -> dict[int, Ragged]:
    """Open the teacher decoder's outputs at `layers` for every example, making those that are missing.

    The teacher's decoder reads the teacher's own encoder states: from their store, or computed here.
    """
    key = key_of(teacher_key, tokens_key(examples.sources), tokens_key(examples.targets), examples.rows, dtype)
    folder = root / f"decoder-{key}"
    lengths = [len(t) for t in examples.targets]
    missing = [layer for layer in sorted(layers) if not _has(folder, f"layer-{layer:02d}")]

    def fill(batch: list[int], write: Callable[[int, int, Tensor], None]) -> None:
        rows = [examples.rows[i] for i in batch]
        if encoded is not None:
            states, mask = (t.to(teacher.device) for t in encoded.padded(rows))
            states = states.to(teacher.dtype)
        else:
            ids, mask = source_tensors(teacher, [examples.sources[row] for row in rows])
            states = forms.encode(teacher, ids, mask).last
        labels = target_tensor(teacher, [examples.targets[i] for i in batch])
        outputs = forms.decode(teacher, forms.shift_right(teacher, labels), states, mask, layers=True).layers
        for n, layer in enumerate(missing):
            for place, i in enumerate(batch):
                write(n, i, outputs[layer][place, : lengths[i]])

    _make(folder, [f"layer-{layer:02d}" for layer in missing], lengths, teacher, dtype, fill, progress)
    return {n: _open(folder, f"layer-{n:02d}", lengths, teacher.config.d_model, dtype) for n in layers}


def source_tensors(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Padded source ids and their mask, on the model's device."""
    ids = torch.tensor(pad(rows, model.config.pad_token_id), device=model.device)
    mask = torch.tensor(pad([[1] * len(row) for row in rows], 0), device=model.device)
    return ids, mask


def target_tensor(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Padded labels with -100 where there is no token, on the model's device."""
    return torch.tensor(pad(rows, -100), device=model.device)


def _has(folder: Path, name: str) -> bool:
    return (folder / f"{name}.bin").is_file() and (folder / f"{name}.json").is_file()


def _make(
    folder: Path,
    names: list[str],
    lengths: Sequence[int],
    teacher: PreTrainedModel,
    dtype: str,
    fill: Callable[[list[int], Callable[[int, int, Tensor], None]], None],
    progress: Progress | None,
) -> None:
    """Fill the missing arrays in files of their own names, renamed when whole; one process at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not names or all(_has(folder, name) for name in names):
            return
        for orphan in folder.glob(".*.making"):  # left by a process that was killed; the lock says that none is at work
            orphan.unlink()
        width = teacher.config.d_model
        need = encoder_bytes(lengths, width, dtype) * len(names)
        _check_disk(folder, need)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        kind, torch_dtype = KINDS[dtype]
        making = [folder / f".{name}.making" for name in names]
        arrays = [np.memmap(path, dtype=kind, mode="w+", shape=(int(offsets[-1]), width)) for path in making]

        def write(array: int, row: int, states: Tensor) -> None:
            values = states.to("cpu", torch_dtype)
            raw = values.view(torch.int16) if torch_dtype == torch.bfloat16 else values
            arrays[array][offsets[row] : offsets[row + 1]] = raw.numpy()

        try:
            done = 0
            with torch.inference_mode():
                for batch in buckets(lengths, BATCH_TOKENS):
                    fill(batch, write)
                    done += len(batch)
                    if progress:
                        progress(done, len(lengths))
            for array, path, name in zip(arrays, making, names, strict=True):
                array.flush()
                path.rename(folder / f"{name}.bin")
                (folder / f"{name}.json").write_text(json.dumps({"rows": len(lengths), "width": width, "dtype": dtype}))
        finally:
            for path in making:
                path.unlink(missing_ok=True)


def _open(folder: Path, name: str, lengths: Sequence[int], width: int, dtype: str) -> Ragged:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    kind, torch_dtype = KINDS[dtype]
    data = np.memmap(folder / f"{name}.bin", dtype=kind, mode="r", shape=(int(offsets[-1]), width))
    return Ragged(data, offsets, torch_dtype)


def _check_disk(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if need > free * 0.9:
        raise UserError(
            f"{folder}: the teacher cache needs {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            f"free some, set RAYDISTILL_HOME to a larger disk, or set training.teacher_cache: off"
        )
