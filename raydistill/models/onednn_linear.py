"""float32 matrix products through oneDNN on CPUs where torch's own library for them, Intel's MKL, holds back.

On AMD's CPUs with AVX512, MKL 2024 computes with half their width: two cores of an EPYC brought 110 to 190 GFLOP/s
with it and 350 to 400 with oneDNN, which torch carries as well and uses for bfloat16 (docs/log.md). Both are float32
throughout; only the order of the sums differs.
"""

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Multiply-adds below which calling oneDNN costs more than it saves.
SMALLEST = 2**21
# The smallest weight. A kernel is made for every shape, which takes as long as a product of a small weight: in training
# nearly every step has new shapes, while decoding meets the same ones at every token.
SMALLEST_WEIGHT = {"training": 2**18, "inference": 2**16}
ALLOWED = True  # False leaves torch's own layers, as the benchmarks' baselines want them


class Linear(nn.Linear):
    """`torch.nn.Linear` with products by oneDNN; autocast, other types and other devices go torch's way."""

    def forward(self, inputs: Tensor) -> Tensor:
        size = self.weight.numel()
        smallest = SMALLEST_WEIGHT["training" if torch.is_grad_enabled() else "inference"]
        fits = inputs.dtype == self.weight.dtype == torch.float32 and inputs.device.type == "cpu"
        worth = size >= smallest and inputs.numel() // self.in_features * size >= SMALLEST
        if fits and worth and not torch.is_autocast_enabled("cpu"):
            return _Product.apply(inputs, self.weight, self.bias)
        return F.linear(inputs, self.weight, self.bias)


def quicken(model: nn.Module) -> None:
    """Let a model's linear layers compute by `Linear`, where that helps; weights, names and results stay."""
    if ALLOWED and helps():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = Linear


@functools.cache
def helps() -> bool:
    """Whether this CPU is one that MKL holds back on: it has AVX512 and Intel did not make it."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`rows @ weight.T + bias` for [n, in] and [out, in], either of them also as a transposed view."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        count = inputs.numel() // inputs.shape[-1]
        rows = _filled(inputs.reshape(count, -1))
        ctx.save_for_backward(rows, weight)
        return product(rows, weight, bias)[:count].reshape(*inputs.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        need_inputs, need_weight, need_bias = ctx.needs_input_grad
        shape = slope.shape[:-1]
        flat = slope.reshape(shape.numel(), -1)
        filled = _filled(flat)
        to_inputs = to_weight = None
        if need_inputs:
            to_inputs = product(filled, weight.t())[: len(flat)].reshape(*shape, -1)
        if need_weight:
            to_weight = product(filled.t(), rows.t())
        return to_inputs, to_weight, flat.sum(0) if need_bias else None


def _filled(rows: Tensor) -> Tensor:
    """The rows, and zeros up to one of eight numbers per power of two: else nearly every batch wants kernels anew."""
    step = max(1, 2 ** (len(rows).bit_length() - 4))
    more = -len(rows) % step
    return F.pad(rows, (0, 0, 0, more)) if more else rows.contiguous()
