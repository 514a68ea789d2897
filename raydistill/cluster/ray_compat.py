"""All uses of Ray's private interface, written for Ray 2.60.0.

Private attributes may change in any release. `tests/cluster/test_ray_compat.py` tests each of them, and a test of the
layout checks that no other module uses one.
"""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

WRITTEN_FOR = "2.60.0"


def draining_node_ids() -> Collection[str]:
    """Ray's ids of the nodes that are being drained.

    `ray._private.state.state.get_draining_nodes`, which Ray Train's own preemption watcher calls (Ray 2.60.0).

    Raises:
        RayError: Ray was not started, or its head does not answer.
    """
    import ray

    draining: dict[str, int] = ray._private.state.state.get_draining_nodes()
    return draining.keys()


@contextmanager
def bind_to_loopback() -> Iterator[None]:
    """Context in which a new Ray uses 127.0.0.1 as its node's address, as it does by default on macOS and Windows.

    All its ports then listen on loopback only. `ray.init(_node_ip_address="127.0.0.1")` has no such effect, because Ray
    replaces that address by the machine's. Workers read the environment variable; this process uses Ray's constant,
    which was set when Ray was imported.

    `ray._private.ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR` and `ENABLE_RAY_CLUSTER` (Ray 2.60.0).
    """
    from ray._private import ray_constants

    name, constant_before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    value_before = os.environ.get(name)
    os.environ[name] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = constant_before
        os.environ.pop(name)
        if value_before is not None:
            os.environ[name] = value_before


def default_node_score(
    node_resources: Any, resources: list[Any], node_type: str, node_availability_summary: Any
) -> tuple[Any, ...] | None:
    """The score of a node type by Ray's autoscaler; None if a node of the type can hold none of the bundles.

    `ray.autoscaler._private.resource_demand_scheduler._default_utilization_scorer` (Ray 2.60.0).
    """
    from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer

    score: tuple[Any, ...] | None = _default_utilization_scorer(
        node_resources, resources, node_type, node_availability_summary=node_availability_summary
    )
    return score


def keep_aws_keys_from_tune() -> None:
    """Remove the AWS keys from the environment variables that Ray Tune passes to its actors.

    Tune would pass the keys as a setting, which Ray's agent writes to a log that every user can read. Actors on this
    machine inherit the environment, and other nodes have roles or keys of their own.

    `ray.tune.execution.class_cache.ENV_VARS_TO_PROPAGATE` (Ray 2.60.0).
    """
    from ray.tune.execution import class_cache

    names = class_cache.ENV_VARS_TO_PROPAGATE
    names.difference_update([name for name in names if name.startswith("AWS_")])
