"""The data-parallel workers of a run, and what they tell each other: gradients, means, and what the first one found."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter

from raydistill.config.run import Training


@dataclass(frozen=True)
class Worker:
    """One of `world` data-parallel workers.

    `computed` is what `precision: auto` came to, "bf16" or "fp32", where that was decided for all workers before.
    `leaving()` is asked after every step whether the machine is about to be taken away.
    """

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    compute_dtype: str | None = None
    is_draining: Callable[[], bool] | None = None

    @property
    def is_main_process(self) -> bool:
        """Whether this is the worker that validates, writes and reports."""
        return self.rank == 0

    def num_devices(self, settings: Training) -> float:
        """How many devices the run holds: of GPUs a worker's share, of CPU cores as many as it has threads."""
        return self.world_size * (settings.threads if self.device == "cpu" else settings.gpus)


def set_torch_threads(threads: int) -> None:
    """Set the CPU threads of torch and OpenMP in this process. Ray counts CPUs but does not enforce the number."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def all_reduce_gradients(parameters: list[Parameter]) -> None:
    """Add up the gradients of all workers in one flat buffer; a parameter without a gradient counts as zero."""
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
    torch.distributed.all_reduce(flat)
    at = 0
    for p in parameters:
        p.grad = flat[at : at + p.numel()].view_as(p)
        at += p.numel()


def broadcast_metrics(metrics: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """The first worker's metrics, for all of them."""
    if worker.world_size == 1:
        return metrics
    # As text: torch's own way of sending objects would unpickle what comes from the network.
    text = torch.frombuffer(bytearray(json.dumps(metrics).encode()), dtype=torch.uint8).to(worker.device)
    size = torch.tensor([len(text)], device=worker.device)
    torch.distributed.broadcast(size, src=0)
    text = text if worker.is_main_process else text.new_empty(int(size))
    torch.distributed.broadcast(text, src=0)
    return json.loads(bytes(text.tolist()))
