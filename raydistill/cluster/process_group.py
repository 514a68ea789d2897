"""The torch process group of a data-parallel run, bound to the addresses by which Ray knows its nodes.

Ray's TorchTrainer creates a process group for every run, whose store listens on every address of the machine and asks
for no token. Here a run with one worker has no process group. The store of a run with several workers listens only on
its node's own address, as Ray's ports do: loopback on a local cluster.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from ray.train.backend import Backend
from ray.train.torch import TorchConfig

GROUP_TIMEOUT = timedelta(minutes=30)  # Ray's default; all workers but the main one wait during a validation


class _NoOpBackend(Backend):
    """Backend that creates no process group; `process_group` does so in the workers.

    Workers see each other's GPUs, as ray.train.torch.get_device expects.
    """

    share_cuda_visible_devices = True


class ManualGroupConfig(TorchConfig):
    """Configuration of a TorchTrainer whose workers create their process group themselves."""

    @property
    def backend_cls(self) -> type[Backend]:
        """A backend that does nothing before the workers start."""
        return _NoOpBackend


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Context in which the workers of this Ray Train run form a process group, if there are several.

    Args:
        device: This worker's device; gloo is used on "cpu", NCCL on a GPU.
    """
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    if world_size == 1:
        yield
        return
    own_address = ray.util.get_node_ip_address()
    interface = network_interface(own_address)
    for backend in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{backend}_SOCKET_IFNAME", interface)
    listener = socket.create_server((own_address, 0)) if rank == 0 else None
    host, port = broadcast_from_rank_zero(listener.getsockname() if listener else None)
    store = dist.TCPStore(
        host, port, world_size, rank == 0, GROUP_TIMEOUT, master_listen_fd=listener.detach() if listener else None
    )
    backend = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=GROUP_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def gather_node_ids(device: str) -> list[str]:
    """Ray's node id of every worker of this Ray Train run, by rank. A collective call: every worker must make it."""
    import ray.train

    own_id = ray.get_runtime_context().get_node_id()
    world_size = ray.train.get_context().get_world_size()
    if world_size == 1:
        return [own_id]
    # Not all_gather_object, which unpickles what other processes send.
    own_bytes = torch.tensor(list(bytes.fromhex(own_id)), dtype=torch.uint8, device=device)
    gathered = [torch.empty_like(own_bytes) for _ in range(world_size)]
    dist.all_gather(gathered, own_bytes)
    return [bytes(node_id.tolist()).hex() for node_id in gathered]


def network_interface(address: str) -> str:
    """Name of the network interface that has an IP address; OSError if there is none."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return name
    raise OSError(f"{address}: no network interface of this machine has this address, by which Ray knows the machine")
