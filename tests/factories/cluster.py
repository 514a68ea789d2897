"""A Ray cluster on test hosts, started by `ray up` with cluster/local.yaml, and small jobs to run on the cluster.

The file is used unchanged except for addresses, key, shared folder, the number of CPUs that a host reports, and the
installation: the hosts use this Python with the code that `ray up` copied.
"""

import json
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil
import pytest
import yaml

from raydistill.label_sets.label_set import LabelSet, read_label_set
from tests.factories.hosts import NETWORK, Host, running_hosts
from tests.factories.workspace import background, corpus_rows, environment, free_port

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")
# By default each host would offer all CPUs of this machine and a share of its memory.
SMALL_NODE = "--num-cpus=1 --object-store-memory=200000000"

SPACE: dict[str, Any] = {
    "name": "spread",
    "run": {
        "method": {"choice": ["sft", "kd"]},
        "student": {"size": {"choice": ["2-2", "2-1"]}},
        "training": {"epochs": 60, "batch_size": 8, "warmup_steps": 2, "patience": 99, "seed": {"choice": [0, 1]}},
        "decoding": {"beams": 1, "max_length": 12},
        "evaluation": {"allow_repetitive_teacher": True},
    },
    "search": {"trials": 8, "sampler": "grid"},
    "serving": {"beams": [1], "precision": ["fp32"]},
    "budgets": {"any": {"params_m": 100}},
}


@dataclass(frozen=True)
class Cluster:
    """A running cluster.

    Attributes:
        file: the cluster's YAML file.
        hosts: the hosts, the head first.
        shared: the folder that all hosts share.
        laptop: the home of the user who runs `ray up`.
    """

    file: Path
    hosts: list[Host]
    shared: Path
    laptop: Path

    def ray(self, *arguments: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
        """Run `ray ARGUMENTS` on the laptop, in the repository."""
        return subprocess.run(
            [str(RAY), *arguments],
            env=environment(HOME=str(self.laptop)),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def on_head(self, command: str, timeout: float = 400) -> str:
        """Run a command on the head, which must succeed, and return what the command prints."""
        done = self.ray("exec", str(self.file), command, timeout=timeout)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def start_on_head(self, command: str, output: IO[str] | int = subprocess.PIPE) -> subprocess.Popen[str]:
        """Start a command on the head, with its messages in `output`, without waiting for its end."""
        return subprocess.Popen(
            [str(RAY), "exec", str(self.file), command],
            env=environment(HOME=str(self.laptop)),
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def down(self) -> None:
        """Run `ray down`, which must succeed."""
        done = self.ray("down", "-y", str(self.file))
        assert done.returncode == 0, done.stdout + done.stderr


def local_config(hosts: list[Host], folder: Path, home: Path) -> dict[str, Any]:
    """cluster/local.yaml for test hosts, with `home` as RAYDISTILL_HOME."""
    text = (ROOT / "cluster" / "local.yaml").read_text(encoding="utf-8")
    assert "/srv/raydistill" in text
    config = yaml.safe_load(text.replace("/srv/raydistill", str(home)))
    config["cluster_name"] = f"raydistill-{secrets.token_hex(4)}"
    config["provider"] |= {"head_ip": hosts[0].address, "worker_ips": [host.address for host in hosts[1:]]}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(folder / "key")}
    config["setup_commands"] = [c for c in config["setup_commands"] if "pip install" not in c]
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        config[name] = [c.replace("ray start", f"ray start {SMALL_NODE}") for c in config[name]]
    return config


@contextmanager
def running_cluster(
    folder: Path, count: int, environ: dict[str, str] | None = None, shared_home: bool = True
) -> Iterator[Cluster]:
    """Context with a cluster of `count` hosts, all of which have joined.

    Args:
        folder: where hosts, keys and the cluster's files are created.
        count: the number of hosts.
        environ: additional environment variables of every host.
        shared_home: whether RAYDISTILL_HOME is the shared folder; otherwise each host has its own.
    """
    shared, laptop, file = folder / "shared", folder / "laptop", folder / "local.yaml"
    shared.mkdir()
    laptop.mkdir()
    with running_hosts(folder, count) as hosts:
        for host in hosts:
            (host.home / "venv").symlink_to(sys.prefix)
            assignments = " ".join(f"{name}='{value}'" for name, value in (environ or {}).items())
            (host.home / ".bashrc").write_text(
                f"export PYTHONPATH=$HOME/raydistill GLOO_SOCKET_IFNAME=eth0 HF_HUB_OFFLINE=1 {assignments}\n"
            )
        config = local_config(hosts, folder, shared if shared_home else folder / "private")
        file.write_text(yaml.safe_dump(config))
        cluster = Cluster(file, hosts, shared, laptop)
        assert cluster.ray("get-auth-token", "--generate").returncode == 0
        try:
            up = cluster.ray("up", "-y", "--no-config-cache", str(file))
            assert up.returncode == 0, up.stdout[-4000:] + up.stderr[-4000:]
            wait_for_nodes(cluster, count)
            yield cluster
        finally:  # files in which `ray up` records its clusters
            for record in Path("/tmp/ray").glob(f"cluster-{config['cluster_name']}.*"):
                record.unlink()


@contextmanager
def running_bucket(folder: Path) -> Iterator[dict[str, str]]:
    """Context with a bucket of moto's S3 server on all addresses; yields the environment variables of the hosts."""
    boto3 = pytest.importorskip("boto3")
    port = free_port()
    server = [sys.executable, "-m", "moto.server", "-H", "0.0.0.0", "-p", str(port)]
    with background(server, folder / "moto.log", lambda: socket.create_connection(("127.0.0.1", port)).close()):
        keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", **keys).create_bucket(Bucket="shared")
        yield {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "RAYDISTILL_STORAGE": f"s3://shared/raydistill?endpoint_override={NETWORK}.1:{port}"
            "&scheme=http&region=us-east-1",
        }


def wait_for_nodes(cluster: Cluster, count: int) -> None:
    """Wait until `count` nodes offer one CPU each."""
    query = 'python -c \'import ray; ray.init(logging_level=40); print("CPUS", ray.cluster_resources().get("CPU"))\''
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if f"CPUS {float(count)}" in cluster.on_head(query):
            return
        time.sleep(3)
    raise AssertionError(f"not all of {count} nodes have joined:\n{cluster.on_head('ray status')}")


def remaining_processes(hosts: list[Host], seconds: float) -> list[str]:
    """Command lines of processes that still run on the hosts after `seconds`; workers end when they miss the head."""
    deadline = time.monotonic() + seconds
    while (remaining := [p for host in hosts for p in host.processes()]) and time.monotonic() < deadline:
        time.sleep(1)
    return [" ".join(process.cmdline()) for process in remaining if process.is_running()]


def write_space(cluster: Cluster, teacher: Path, data: Path, **search: Any) -> Path:
    """Write a space file with `SPACE`'s eight trials to the shared folder; `search` replaces settings of the search."""
    dataset = {"name": str(data), "max_source_tokens": 32, "max_target_tokens": 16, "selection_share": 0}
    run = {**SPACE["run"], "teacher": str(teacher), "dataset": dataset}
    path = cluster.shared / "spread.yaml"
    path.write_text(yaml.safe_dump({**SPACE, "run": run, "search": {**SPACE["search"], **search}}))
    return path


def write_sources(cluster: Cluster, count: int) -> Path:
    """Write a corpus of `count` rows to label to the shared folder."""
    path = cluster.shared / "many.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in corpus_rows(count, seed=7)))
    return path


def driver_processes(cluster: Cluster, command: str) -> list[psutil.Process]:
    """The processes of `raydistill COMMAND` on the head."""
    lines = {process: process.cmdline() for process in cluster.hosts[0].processes()}
    return [p for p, line in lines.items() if [Path(part).name for part in line[1:3]] == ["raydistill", command]]


def read_labels(root: Path) -> LabelSet:
    """Read the only label set below `root`."""
    [folder] = root.glob("many-*")
    return read_label_set(folder)
