"""The process group of a data-parallel run: none for one worker, else on its nodes' own addresses.

Ray's TorchTrainer makes one for every run, whose store listens on every address of the machine and asks for no token.
Here one worker has none, and the store of several is bound to the address by which its node is known to Ray, as Ray's
own ports are: loopback on a cluster of this machine alone.
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

TIMEOUT = timedelta(minutes=30)  # what Ray's own has, too: a validation holds up all workers but the first


class _NoGroup(Backend):
    """Workers see each other's GPUs, as ray.train.torch.get_device expects; the group is `process_group`'s."""

    share_cuda_visible_devices = True


class OwnGroup(TorchConfig):
    """Of a trainer whose workers make their group themselves."""

    @property
    def backend_cls(self) -> type[Backend]:
        """What Ray does before the workers begin: nothing."""
        return _NoGroup


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """A block in which the workers of this Ray Train run have a process group, if they are several.

    `device`: this worker's, "cpu" (gloo) or a GPU's (NCCL).
    """
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if world == 1:
        yield
        return
    here = ray.util.get_node_ip_address()
    interface = interface_of(here)
    for backend in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{backend}_SOCKET_IFNAME", interface)
    listener = socket.create_server((here, 0)) if rank == 0 else None
    host, port = broadcast_from_rank_zero(listener.getsockname() if listener else None)
    store = dist.TCPStore(
        host, port, world, rank == 0, TIMEOUT, master_listen_fd=listener.detach() if listener else None
    )
    backend = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def nodes_of_all(device: str) -> list[str]:
    """The ids of the nodes that this Ray Train run's workers are on, in the workers' order; all are to ask together."""
    import ray.train

    here = ray.get_runtime_context().get_node_id()
    world = ray.train.get_context().get_world_size()
    if world == 1:
        return [here]
    mine = torch.tensor(list(bytes.fromhex(here)), dtype=torch.uint8, device=device)
    ids = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(ids, mine)
    return [bytes(each.tolist()).hex() for each in ids]


def interface_of(address: str) -> str:
    """The name of the network interface that has `address`."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            return name
    raise OSError(f"{address}: no network interface of this machine has the address that Ray knows it by")
