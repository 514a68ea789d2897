"""The private interface of Ray that the package uses: every attribute exists and does what the package needs.

A failure after an upgrade of Ray names the version that `cluster/ray_compat.py` is written for. The test of draining
nodes is in test_start.py, which starts Ray.
"""

import inspect
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
from ray._private import ray_constants, services
from ray.autoscaler._private import resource_demand_scheduler as scheduler
from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.tune.execution import class_cache

from raydistill.cluster import ray_compat

CHANGED = f"cluster/ray_compat.py is written for Ray {ray_compat.WRITTEN_FOR}; Ray {version('ray')} is installed"
PRINT_ACTOR_VARIABLES = """
from ray.tune.execution import class_cache

from raydistill.cluster import ray_compat


def passed():
    # The options of the actor class that Tune creates for a trainable
    return class_cache._ActorClassCache().get(type("Trainable", (), {}))._default_options["runtime_env"]["env_vars"]


before = passed()
ray_compat.keep_aws_keys_from_tune()
after = passed()
print(sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys()), "PL_DISABLE_FORK" in after)
"""


def test_the_installed_ray_is_the_version_that_the_module_is_written_for() -> None:
    assert version("ray") == ray_compat.WRITTEN_FOR, f"{CHANGED}: check every function of the module, then change it"


def test_enable_ray_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR == "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", CHANGED
    assert ray_constants.ENABLE_RAY_CLUSTER is True, CHANGED
    address = services.get_node_ip_address()
    for value in (None, "1"):
        monkeypatch.delenv(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, raising=False)
        if value:
            monkeypatch.setenv(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, value)
        with ray_compat.bind_to_loopback():
            assert services.get_node_ip_address() == "127.0.0.1", CHANGED
            assert os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] == "0"
        assert os.environ.get(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR) == value
        assert services.get_node_ip_address() == address


def test_default_utilization_scorer() -> None:
    names = ["node_resources", "resources", "node_type", "node_availability_summary"]
    assert list(inspect.signature(scheduler._default_utilization_scorer).parameters) == names, CHANGED
    summary = NodeAvailabilitySummary({})
    half = ray_compat.default_node_score({"CPU": 4}, [{"CPU": 2}], "a", summary)
    full = ray_compat.default_node_score({"CPU": 4}, [{"CPU": 4}], "a", summary)
    assert half is not None, CHANGED
    assert full is not None, CHANGED
    assert full > half, CHANGED
    assert ray_compat.default_node_score({"CPU": 4}, [{"CPU": 5}], "a", summary) is None, CHANGED


def test_env_vars_to_propagate() -> None:
    assert isinstance(class_cache.ENV_VARS_TO_PROPAGATE, set), CHANGED
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "aws-not-to-be-seen"}
    done = subprocess.run(
        [sys.executable, "-c", PRINT_ACTOR_VARIABLES],
        env={**os.environ, **keys},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"{CHANGED}\n{done.stderr[-2000:]}"
    assert done.stdout.splitlines()[-1] == f"{sorted(keys)} [] True", CHANGED
