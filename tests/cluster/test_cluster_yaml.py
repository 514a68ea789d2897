"""cluster.yaml and cluster/local.yaml: checked with Ray's schema, bootstrap and scheduler, and beyond them.

AWS is replaced by moto's server; nothing leaves this machine.
"""

import copy
import json
import re
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
IMAGE = re.compile(r"ami-[0-9a-f]{8,17}|resolve:ssm:/aws/service/[\w./-]+")
FILES = ("cluster.yaml", "cluster/local.yaml")


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return read("cluster.yaml")


@pytest.fixture(scope="module")
def prepared(config: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config

    return prepare_config(config)


def _nodes(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return config["available_node_types"]


def test_ray_accepts_the_file(prepared: dict[str, Any]) -> None:
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
def test_ray_refuses_an_invalid_file(config: dict[str, Any], spoil: Any) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    spoiled = copy.deepcopy(config)
    spoil(spoiled)
    with pytest.raises(Exception, match=r"."):
        validate_config(prepare_config(spoiled))


def test_region_and_images_are_set(config: dict[str, Any]) -> None:
    """Ray's validator accepts a file without them; `ray up` would then fail late or use an old image."""
    region = config["provider"]["region"]
    assert re.fullmatch(r"[a-z]{2}(-[a-z]+)+-\d", region)
    assert all(zone.startswith(region) for zone in config["provider"]["availability_zone"].split(","))
    for name, node in _nodes(config).items():
        assert IMAGE.fullmatch(node["node_config"]["ImageId"]), name
        assert node["node_config"]["InstanceType"], name


def test_workers_scale_from_zero_on_spot_or_on_demand(config: dict[str, Any]) -> None:
    spot, on_demand = _nodes(config)["gpu_spot"], _nodes(config)["gpu_on_demand"]
    assert spot["min_workers"] == on_demand["min_workers"] == 0
    assert spot["max_workers"] == on_demand["max_workers"] == config["max_workers"] > 0
    assert spot["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in on_demand["node_config"], "boto3 refuses a null"
    assert spot["resources"] == on_demand["resources"]
    assert "GPU" not in _nodes(config)["head"]["resources"]


def test_only_ssh_is_open(config: dict[str, Any]) -> None:
    """Ray adds SSH and traffic within the security group; the file adds no other permission."""
    assert "IpPermissions" not in config["provider"]["security_group"]
    commands = "\n".join(config["head_start_ray_commands"] + config["worker_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in commands
    assert "mlflow server --host 127.0.0.1" in commands
    assert "0.0.0.0" not in commands


@pytest.mark.parametrize("name", FILES)
def test_mounted_files_exist_and_include_what_pip_needs(name: str) -> None:
    config = read(name)
    mounts = dict(config["file_mounts"])
    assert mounts.pop("~/.ray/auth_token") == "~/.ray/auth_token", (
        "the token must be the user's, not a file of the project"
    )
    for local in mounts.values():
        assert (ROOT / local).exists(), local
    assert {"pyproject.toml", "constraints.txt", "raydistill", "README.md"} <= set(mounts.values())
    for role in ("head", "worker"):
        setup = [*config.get("setup_commands", []), *config.get(f"{role}_setup_commands", [])]
        assert any("pip install" in c and "-c constraints.txt" in c for c in setup)


def test_machines_with_a_gpu_install_the_cublas_of_ctranslate2(config: dict[str, Any], tmp_path: Path) -> None:
    """The extra `gpu` is pinned. AWS's workers install it, and so do local machines with NVIDIA's driver."""
    [package] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    assert f"\n{package.partition('>')[0]}==12." in (ROOT / "constraints.txt").read_text()
    assert any("-c constraints.txt '.[gpu]'" in command for command in config["worker_setup_commands"])
    [line] = [c for c in read("cluster/local.yaml")["setup_commands"] if "pip install" in c]
    echo_line = line.replace("cd ~/raydistill && ~/venv/bin/python -m pip", "echo")
    driver = tmp_path / "nvidia-smi"
    for expected in (".", ".[gpu]"):
        shell = subprocess.run(
            ["/bin/bash", "-c", echo_line], env={"PATH": str(tmp_path)}, capture_output=True, text=True
        )
        assert shell.stdout.split()[-1] == expected
        driver.write_text("#!/bin/sh\n")
        driver.chmod(0o755)


@pytest.mark.parametrize("name", FILES)
def test_every_command_is_valid_shell(name: str) -> None:
    """In YAML, " #" starts a comment, which may truncate a command."""
    commands = [c for key, value in read(name).items() if key.endswith("commands") for c in value]
    assert len(commands) > 5
    for command in commands:
        assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0, command


@pytest.mark.parametrize("name", FILES)
def test_every_ray_process_requires_the_token(name: str) -> None:
    config = read(name)
    setup = "\n".join(config["setup_commands"])
    assert "RAY_AUTH_MODE=token" in setup
    assert "RAY_ADDRESS=auto" in setup, "without it, a command starts a separate Ray"


def test_ray_accepts_local_yaml_and_keeps_all_machines() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(read("cluster/local.yaml"))
    validate_config(config)
    [node] = config["available_node_types"].values()
    assert node["min_workers"] == node["max_workers"] == len(config["provider"]["worker_ips"])


def test_all_aws_nodes_share_a_bucket_and_have_access(config: dict[str, Any]) -> None:
    """Ray creates the head's role; a worker without a role would have no access."""
    [line] = [c for c in config["setup_commands"] if "RAYDISTILL_HOME" in c]
    shell = f"HOME=/home/ubuntu; {line.split(' > ')[0]} > env; . ./env; echo $RAYDISTILL_HOME $RAYDISTILL_STORAGE"
    with tempfile.TemporaryDirectory() as folder:
        output = subprocess.run(["bash", "-c", shell], cwd=folder, capture_output=True, text=True, check=True).stdout
    home, storage = output.split()
    assert home == "/home/ubuntu/outputs"
    assert storage == f"s3://CHANGE-ME/raydistill?region={config['provider']['region']}"
    workers = [node["node_config"] for name, node in _nodes(config).items() if name != config["head_node_type"]]
    assert [node["IamInstanceProfile"] for node in workers] == [{"Name": "raydistill-worker"}] * 2
    assert "IamInstanceProfile" not in _nodes(config)["head"]["node_config"]


def test_pinned_ray_is_the_installed_ray(config: dict[str, Any]) -> None:
    import ray

    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    assert ray.__version__ == pins["ray"]


def load_scorer(config: dict[str, Any]) -> Any:
    """The scorer that the head's start command names, loaded as Ray loads it."""
    from ray.autoscaler._private.loader import load_function_or_class

    [start] = [c for c in config["head_start_ray_commands"] if "ray start" in c]
    assert "RAY_enable_autoscaler_v2=0" in start, "Ray's second autoscaler ignores the scorer"
    [name] = re.findall(r"RAY_AUTOSCALER_UTILIZATION_SCORER=(\S+)", start)
    return load_function_or_class(name)


@pytest.mark.parametrize(
    ("failed", "expected"),
    [
        ((), {"gpu_spot": 3}),
        (("gpu_spot",), {"gpu_on_demand": 3}),
        (("gpu_on_demand",), {"gpu_spot": 3}),
        (("gpu_on_demand", "gpu_spot"), {"gpu_spot": 3}),
    ],
)
def test_gpus_are_requested_on_spot_and_on_demand_after_spot_failed(
    prepared: dict[str, Any], failed: tuple[str, ...], expected: dict[str, int]
) -> None:
    """With Ray's scheduler, Ray's record of failed launches and the scorer of the file."""
    from ray.autoscaler._private.node_provider_availability_tracker import NodeProviderAvailabilityTracker
    from ray.autoscaler._private.resource_demand_scheduler import get_nodes_for
    from ray.autoscaler.node_launch_exception import NodeLaunchException

    now = 1000.0
    tracker = NodeProviderAvailabilityTracker(timer=lambda: now)

    def requested_nodes() -> dict[str, int]:
        scorer = partial(load_scorer(prepared), node_availability_summary=tracker.summary())
        bundles: list[Any] = [{"GPU": 1}] * 3
        nodes, missing = get_nodes_for(_nodes(prepared), {"head": 1}, "head", 4, bundles, scorer)
        assert missing == []
        return dict(nodes)

    for node_type in failed:
        tracker.update_node_availability(node_type, int(now), NodeLaunchException("Capacity", "none left", None))
    assert requested_nodes() == expected
    now += 3600
    assert requested_nodes() == {"gpu_spot": 3}, "spot must be tried again after an hour"


def test_a_cpu_task_prefers_a_cpu_node_and_two_gpus_fit_no_node(prepared: dict[str, Any]) -> None:
    from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary

    score = partial(load_scorer(prepared), node_availability_summary=NodeAvailabilitySummary({}))
    resources = _nodes(prepared)["gpu_spot"]["resources"]
    assert score(resources, [{"CPU": 1.0}], "gpu_spot") < score({"CPU": 4}, [{"CPU": 1.0}], "some_cpu_node")
    assert score(resources, [{"GPU": 2.0}], "gpu_spot") is None


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """moto's server in place of AWS, with the role that Ray would create, for which it waits half a minute."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("laptop")))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_DEFAULT_REGION", "us-west-2")
        iam = boto3.client("iam")
        iam.create_instance_profile(InstanceProfileName="ray-autoscaler-v1")
        iam.create_instance_profile(InstanceProfileName="raydistill-worker")
        iam.create_role(RoleName="ray-autoscaler-v1", AssumeRolePolicyDocument=json.dumps({"Statement": []}))
        iam.add_role_to_instance_profile(InstanceProfileName="ray-autoscaler-v1", RoleName="ray-autoscaler-v1")
        yield f"http://{host}:{port}"
    server.stop()


def test_aws_launches_the_machines_of_the_file(aws: str, prepared: dict[str, Any]) -> None:
    """With the bootstrap of `ray up`, and a machine of each type launched as by the autoscaler."""
    import boto3
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    config = bootstrap_aws(copy.deepcopy(prepared))
    ec2 = boto3.client("ec2")
    [group] = ec2.describe_security_groups(Filters=[{"Name": "group-name", "Values": ["raydistill"]}])["SecurityGroups"]
    for rule in group["IpPermissions"]:
        internal = [pair["GroupId"] for pair in rule["UserIdGroupPairs"]] == [group["GroupId"]] and not rule["IpRanges"]
        assert internal or (rule["FromPort"], rule["ToPort"]) == (22, 22), rule
    assert len(group["IpPermissions"]) == 2

    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, node in _nodes(config).items():
        provider.create_node(node["node_config"], {"kind": name}, 1)
    running = ec2.describe_instances(Filters=[{"Name": "instance-state-name", "Values": ["running", "pending"]}])
    machines = {
        tag["Value"]: machine
        for reservation in running["Reservations"]
        for machine in reservation["Instances"]
        for tag in machine["Tags"]
        if tag["Key"] == "kind"
    }
    assert machines.keys() == {"head", "gpu_spot", "gpu_on_demand"}
    for name, machine in machines.items():
        assert machine["InstanceType"] == _nodes(prepared)[name]["node_config"]["InstanceType"]
        assert [g["GroupId"] for g in machine["SecurityGroups"]] == [group["GroupId"]]
        assert machine.get("InstanceLifecycle") == ("spot" if name == "gpu_spot" else None)
        assert machine["Placement"]["AvailabilityZone"] in prepared["provider"]["availability_zone"].split(",")
        [volume] = ec2.describe_volumes(VolumeIds=[disk["Ebs"]["VolumeId"] for disk in machine["BlockDeviceMappings"]])[
            "Volumes"
        ]
        [requested] = _nodes(prepared)[name]["node_config"]["BlockDeviceMappings"]
        assert (volume["Size"], volume["Encrypted"]) == (requested["Ebs"]["VolumeSize"], True)
    assert "IamInstanceProfile" in machines["head"] or "IamInstanceProfile" in config["head_node"]
    provider.terminate_nodes(list(provider.non_terminated_nodes({})))
