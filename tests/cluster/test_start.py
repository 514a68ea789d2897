"""A local Ray listens on loopback only; exclusive tasks always run on the same machine."""

import contextlib
import os
from typing import Any, get_args, get_type_hints

import psutil
import pytest
from ray._private import state

from raydistill.cluster import ray_compat
from raydistill.cluster.start import largest_node


def test_a_local_ray_listens_on_loopback_and_requires_a_token(ray_here: None) -> None:
    import ray

    @ray.remote
    def worker_listeners() -> tuple[list[str], str, str]:
        listening = [c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
        return listening, ray.util.get_node_ip_address(), os.environ["RAY_AUTH_MODE"]

    by_worker, node_address, auth_mode = ray.get(worker_listeners.remote())
    assert (node_address, auth_mode) == ("127.0.0.1", "token")
    listeners = set()
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # idle workers come and go
            addresses = {c.laddr.ip for c in process.net_connections("inet") if c.status == "LISTEN"}
            listeners |= {(process.name(), ip) for ip in addresses}
    assert {"gcs_server", "raylet"} <= {name for name, _ in listeners}
    assert {ip.removeprefix("::ffff:") for ip in [*by_worker, *(ip for _, ip in listeners)]} == {"127.0.0.1"}


def test_get_draining_nodes(ray_here: None) -> None:
    """A private function of Ray; see test_ray_compat.py."""
    changed = f"cluster/ray_compat.py is written for Ray {ray_compat.WRITTEN_FOR}"
    assert list(ray_compat.draining_node_ids()) == [], changed
    assert get_args(get_type_hints(state.GlobalState.get_draining_nodes)["return"]) == (str, int), changed


def test_largest_node_does_not_depend_on_the_order_of_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    def node(name: str, cpus: float, gpus: float = 0.0, alive: bool = True) -> dict[str, Any]:
        return {"NodeManagerAddress": name, "Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus}}

    nodes = [node("a", 8.0), node("c", 8.0), node("b", 4.0, 1.0), node("d", 64.0, alive=False)]
    for order in (nodes, nodes[::-1]):
        monkeypatch.setattr("ray.nodes", lambda order=order: order)
        assert largest_node("cpu")["NodeManagerAddress"] == "c"
        assert largest_node("cuda")["NodeManagerAddress"] == "b"
