"""Counting of the workers that a cluster can hold."""

import pytest

from raydistill.cluster.actor_pool import slots


def test_slots_are_counted_per_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four machines of four CPUs never hold a worker of eight; with a GPU each they hold a worker of two CPUs each."""
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}} for _ in range(4)]
    monkeypatch.setattr("ray.nodes", lambda: [*nodes, {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}])
    assert [slots("cpu", threads) for threads in (1, 2, 4, 8)] == [16, 8, 4, 0]
    assert [slots("cuda", threads) for threads in (2, 8)] == [4, 0]
    assert [slots("cuda", 1, share) for share in (1, 0.6, 0.5, 0.3, 0.25, 0.1)] == [4, 4, 8, 12, 16, 16]
