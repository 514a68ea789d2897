"""Rows of token ids as padded tensors, for the teacher cache and for training."""

from collections.abc import Sequence

import torch
from torch import Tensor

from raydistill.data.batching import pad


def pad_to_tensor(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of integers as a tensor [rows, longest], padded at the end with `value`."""
    return torch.tensor(pad(rows, value))


def make_attention_mask(rows: Sequence[Sequence[int]]) -> Tensor:
    """The attention mask of padded rows: 1 for tokens, 0 for padding, [rows, longest]."""
    lengths = torch.tensor([len(row) for row in rows])
    return (torch.arange(int(lengths.max()))[None, :] < lengths[:, None]).long()
