"""cluster.yaml against the installed Ray's own schema and bootstrap rules, and what those leave unchecked."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
IMAGE = re.compile(r"ami-[0-9a-f]{8,17}|resolve:ssm:/aws/service/[\w./-]+")


@pytest.fixture(scope="module")
def given() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def prepared(given: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config

    return prepare_config(given)


def _nodes(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return config["available_node_types"]


def test_ray_accepts_it(prepared: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import validate_config

    validate_config(prepared)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: c.update(idle_minutes=5),
        lambda c: c.update(head_node_type="nobody"),
        lambda c: c["available_node_types"]["gpu_spot"].update(min_workers=9, max_workers=1),
    ],
)
def test_the_validator_is_not_blind(given: dict[str, Any], spoil: Any) -> None:
    import copy

    from ray.autoscaler._private.util import prepare_config, validate_config

    spoiled = copy.deepcopy(given)
    spoil(spoiled)
    with pytest.raises(Exception, match=r"."):
        validate_config(prepare_config(spoiled))


def test_region_and_images_are_there(given: dict[str, Any]) -> None:
    """Ray's validator accepts a file without them, and `ray up` then fails late or takes an old image."""
    region = given["provider"]["region"]
    assert re.fullmatch(r"[a-z]{2}(-[a-z]+)+-\d", region)
    assert all(zone.startswith(region) for zone in given["provider"]["availability_zone"].split(","))
    for name, node in _nodes(given).items():
        assert IMAGE.fullmatch(node["node_config"]["ImageId"]), name
        assert node["node_config"]["InstanceType"], name


def test_workers_scale_from_zero_on_spot_with_a_way_out(given: dict[str, Any]) -> None:
    spot, on_demand = _nodes(given)["gpu_spot"], _nodes(given)["gpu_on_demand"]
    assert spot["min_workers"] == on_demand["min_workers"] == 0
    assert spot["max_workers"] == given["max_workers"] > 0
    assert spot["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in on_demand["node_config"], "boto3 refuses a null"
    assert spot["resources"] == on_demand["resources"]
    assert "GPU" not in _nodes(given)["head"]["resources"]


def test_nothing_but_ssh_is_open(given: dict[str, Any]) -> None:
    """Ray adds SSH and the group's own traffic to the security group; this file adds nothing to them."""
    assert "IpPermissions" not in given["provider"]["security_group"]
    commands = "\n".join(given["head_start_ray_commands"] + given["worker_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in commands
    assert "mlflow server --host 127.0.0.1" in commands
    assert "0.0.0.0" not in commands


def test_the_mounted_files_are_here_and_are_what_pip_needs(given: dict[str, Any]) -> None:
    mounts = given["file_mounts"]
    for local in mounts.values():
        assert (ROOT / local).exists(), local
    assert {"pyproject.toml", "constraints.txt", "raydistill", "README.md"} <= set(mounts.values())
    for commands in (given["head_setup_commands"], given["worker_setup_commands"]):
        assert any("pip install" in c and "-c constraints.txt" in c for c in commands)


def test_commands_on_the_head_join_the_cluster_and_share_a_home(given: dict[str, Any]) -> None:
    setup = "\n".join(given["setup_commands"])
    assert "RAY_ADDRESS=auto" in setup, "without it a command starts a Ray of its own"
    assert "RAYDISTILL_HOME=$HOME/shared" in setup


def test_versions_are_pinned_to_the_ray_that_validated(given: dict[str, Any]) -> None:
    import ray

    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    assert ray.__version__ == pins["ray"]
