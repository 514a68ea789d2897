"""The data-parallel workers of a run and their communication: gradients, and the metrics of the main process."""

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
    """One of the data-parallel workers of a run.

    Attributes:
        rank: Index of this worker; worker 0 is the main process.
        world_size: Number of workers.
        device: Device of the models, such as "cpu" or "cuda:0".
        compute_dtype: "bf16" or "fp32" where `precision: auto` was resolved for all workers before the run, else None.
        is_draining: Called after every step; true once the node is being preempted.
        upload_folder: Uploads the run's folder, if the workers' machines share no folder.
        download_folder: Downloads the run's folder, if the workers' machines share no folder.
    """

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    compute_dtype: str | None = None
    is_draining: Callable[[], bool] | None = None
    upload_folder: Callable[[], None] | None = None
    download_folder: Callable[[], None] | None = None

    @property
    def is_main_process(self) -> bool:
        """Whether this worker validates, writes files and reports."""
        return self.rank == 0

    @property
    def device_type(self) -> str:
        """The device without its index: "cpu" or "cuda"."""
        return torch.device(self.device).type

    def num_devices(self, settings: Training) -> float:
        """Number of devices that the run holds: GPUs (shares count as fractions), or CPU threads."""
        return self.world_size * (settings.threads if self.device == "cpu" else settings.gpus)

    def device_hours(self, seconds: float, settings: Training) -> float:
        """Device-hours of a run that holds its devices for `seconds`."""
        return seconds * self.num_devices(settings) / 3600

    def barrier(self) -> None:
        """Wait until every worker has reached this call."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def save_folder(self) -> None:
        """Upload the run's folder from the main process, so that the run can resume on another machine."""
        if self.is_main_process and self.upload_folder:
            self.upload_folder()

    def share_folder(self) -> None:
        """Wait for the other workers, and copy the run's folder from the main process to their machines."""
        self.save_folder()
        self.barrier()
        if not self.is_main_process and self.download_folder:
            self.download_folder()


def set_torch_threads(threads: int) -> None:
    """Set the CPU threads of torch and OpenMP in this process. Ray counts CPUs but does not enforce the number."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def all_reduce_gradients(parameters: list[Parameter]) -> None:
    """Sum the gradients over all workers, in one flat buffer; a missing gradient counts as zero."""
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
    torch.distributed.all_reduce(flat)
    offset = 0
    for p in parameters:
        p.grad = flat[offset : offset + p.numel()].view_as(p)
        offset += p.numel()


def broadcast_metrics(metrics: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """Return the main process's metrics on every worker; the argument of the other workers is ignored."""
    if worker.world_size == 1:
        return metrics
    # As JSON: torch.distributed.broadcast_object_list would unpickle data from the network.
    text = torch.frombuffer(bytearray(json.dumps(metrics).encode()), dtype=torch.uint8).to(worker.device)
    size = torch.tensor([len(text)], device=worker.device)
    torch.distributed.broadcast(size, src=0)
    text = text if worker.is_main_process else text.new_empty(int(size))
    torch.distributed.broadcast(text, src=0)
    return json.loads(bytes(text.tolist()))
