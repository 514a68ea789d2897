"""`cluster/local.yaml` as it is meant to be used: `ray up` on three hosts, work that spreads over them, `ray down`.

The hosts are made on this machine (tests/hosts.py). The file is taken as it is but for addresses, key, shared folder,
the CPUs that a host says it has, and the installation: the hosts use this Python's, with the code that `ray up` copied.
"""

import json
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import psutil
import pytest
import yaml

from raydistill.label_sets.label_set import LabelSet, read_label_set
from tests.hosts import NETWORK, Host, running_hosts, what_is_missing
from tests.world import background, corpus_rows, environment, free_port, make_world

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(bool(what_is_missing()), reason=what_is_missing()),
]

ROOT = Path(__file__).parents[1]
RAY = Path(sys.executable).with_name("ray")
# A host that says nothing would offer all of this machine's CPUs, and a share of its memory, thrice.
SMALL = "--num-cpus=1 --object-store-memory=200000000"
BATCHES = ".many-*.work/out/*.parquet"

SPACE: dict[str, Any] = {
    "name": "spread",
    "run": {
        "method": {"choice": ["sft", "kd"]},
        "student": {"size": {"choice": ["2-2", "2-1"]}},
        "training": {"epochs": 60, "batch_size": 8, "warmup_steps": 2, "patience": 99, "seed": {"choice": [0, 1]}},
        "decoding": {"beams": 1, "max_length": 12},
    },
    "search": {"trials": 8, "sampler": "grid", "decoding": {"beams": [1]}},
    "budgets": {"any": {"params_m": 100}},
}


@dataclass(frozen=True)
class Cluster:
    """A cluster that is up: its file, its hosts (the head first), the folder that they share, and the laptop's home."""

    file: Path
    hosts: list[Host]
    shared: Path
    laptop: Path

    def ray(self, *arguments: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
        """`ray ARGUMENTS` on the laptop, in the repository."""
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
        """What a command on the head prints; it must succeed."""
        done = self.ray("exec", str(self.file), command, timeout=timeout)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def start_on_head(self, command: str, output: IO[str] | int = subprocess.PIPE) -> subprocess.Popen[str]:
        """The same without waiting for its end; what it says goes to `output`."""
        return subprocess.Popen(
            [str(RAY), "exec", str(self.file), command],
            env=environment(HOME=str(self.laptop)),
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def down(self) -> None:
        """`ray down`."""
        done = self.ray("down", "-y", str(self.file))
        assert done.returncode == 0, done.stdout + done.stderr


def on_test_hosts(hosts: list[Host], folder: Path, home: Path) -> dict[str, Any]:
    """cluster/local.yaml for test hosts."""
    text = (ROOT / "cluster" / "local.yaml").read_text(encoding="utf-8")
    assert "/srv/raydistill" in text
    config = yaml.safe_load(text.replace("/srv/raydistill", str(home)))
    config["cluster_name"] = f"raydistill-{secrets.token_hex(4)}"
    config["provider"] |= {"head_ip": hosts[0].address, "worker_ips": [host.address for host in hosts[1:]]}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(folder / "key")}
    config["setup_commands"] = [c for c in config["setup_commands"] if "pip install" not in c]
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        config[name] = [c.replace("ray start", f"ray start {SMALL}") for c in config[name]]
    return config


@contextmanager
def cluster_of(
    folder: Path, count: int, more: dict[str, str] | None = None, shared_home: bool = True
) -> Iterator[Cluster]:
    """`count` hosts on which `ray up` has been run, all of them at work; `more` is in the environment of each."""
    shared, laptop, file = folder / "shared", folder / "laptop", folder / "local.yaml"
    shared.mkdir()
    laptop.mkdir()
    with running_hosts(folder, count) as hosts:
        for host in hosts:
            (host.home / "venv").symlink_to(sys.prefix)
            set_more = " ".join(f"{name}='{value}'" for name, value in (more or {}).items())
            (host.home / ".bashrc").write_text(
                f"export PYTHONPATH=$HOME/raydistill GLOO_SOCKET_IFNAME=eth0 HF_HUB_OFFLINE=1 {set_more}\n"
            )
        config = on_test_hosts(hosts, folder, shared if shared_home else folder / "private")
        file.write_text(yaml.safe_dump(config))
        cluster = Cluster(file, hosts, shared, laptop)
        assert cluster.ray("get-auth-token", "--generate").returncode == 0
        try:
            up = cluster.ray("up", "-y", "--no-config-cache", str(file))
            assert up.returncode == 0, up.stdout[-4000:] + up.stderr[-4000:]
            wait_for_nodes(cluster, count)
            yield cluster
        finally:  # what `ray up` notes of its clusters on this machine
            for note in Path("/tmp/ray").glob(f"cluster-{config['cluster_name']}.*"):
                note.unlink()


def wait_for_nodes(cluster: Cluster, count: int) -> None:
    """Until `count` nodes offer a CPU each."""
    ask = 'python -c \'import ray; ray.init(logging_level=40); print("CPUS", ray.cluster_resources().get("CPU"))\''
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if f"CPUS {float(count)}" in cluster.on_head(ask):
            return
        time.sleep(3)
    raise AssertionError(f"not all of {count} nodes came up:\n{cluster.on_head('ray status')}")


def nobody_left(hosts: list[Host], seconds: float) -> list[str]:
    """Command lines that still run on the hosts after so long; workers end when they miss their head."""
    deadline = time.monotonic() + seconds
    while (left := [p for host in hosts for p in host.processes()]) and time.monotonic() < deadline:
        time.sleep(1)
    return [" ".join(p.cmdline()) for p in left if p.is_running()]


def write_space(cluster: Cluster, teacher: Path, data: Path) -> Path:
    """The sweep's file, in the shared folder."""
    dataset = {"name": str(data), "max_source_tokens": 32, "max_target_tokens": 16}
    run = {**SPACE["run"], "teacher": str(teacher), "dataset": dataset}
    path = cluster.shared / "spread.yaml"
    path.write_text(yaml.safe_dump({**SPACE, "run": run}))
    return path


def test_from_ray_up_over_work_that_spreads_to_ray_down(tmp_path: Path) -> None:
    with cluster_of(tmp_path, 3) as cluster:
        names = {host.name for host in cluster.hosts}
        teacher, data = make_world(cluster.shared / "world")
        refuses_strangers(cluster)

        path = write_space(cluster, teacher, data)
        cluster.on_head(f"ray job submit -- raydistill sweep {path}", timeout=900)
        results = [json.loads(p.read_text()) for p in cluster.shared.glob("sweeps/spread/trials/*/result.json")]
        assert [result["status"] for result in results] == ["done"] * 8
        assert {result["host"] for result in results} == names

        source = cluster.shared / "many.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in corpus_rows(1500, seed=7)))
        script = tmp_path / "label.py"
        script.write_text(
            "import sys\nfrom raydistill.pseudolabel import main\nif __name__ == '__main__':\n    main()\n"
        )
        done = cluster.ray(
            *("submit", str(cluster.file), str(script), "--teacher", str(teacher), "--dataset", str(source)),
            *("--batch-chars", "2000"),
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        [folder] = (cluster.shared / "labels").glob("many-*")
        labels = read_label_set(folder)
        assert len(labels.targets) == 1500
        assert labels.manifest["hosts"].keys() == names
        assert sum(labels.manifest["hosts"].values()) == 1500

        cluster.down()
        assert nobody_left(cluster.hosts, 120) == []


def refuses_strangers(cluster: Cluster) -> None:
    """Without the cluster's token neither its head nor a worker answers, from whichever host is asked."""
    ask = "python -c 'import ray; ray.init(logging_level=50); print(\"IN\", len(ray.nodes()))'"
    assert "IN 3" in cluster.on_head(ask)
    for stranger in ("RAY_AUTH_MODE=disabled", "RAY_AUTH_TOKEN=guessed"):
        done = cluster.ray("exec", str(cluster.file), f"env {stranger} timeout 60 {ask}")
        assert done.returncode != 0
        assert "IN 3" not in done.stdout


@contextmanager
def bucket(folder: Path) -> Iterator[dict[str, str]]:
    """moto's S3 server on all of this machine's addresses, with a bucket; gives the hosts' environment for it."""
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


def test_hosts_that_share_no_folder_share_a_bucket(tmp_path: Path) -> None:
    """Work spreads over hosts with homes of their own; a head that lost its own goes on from the bucket."""
    with bucket(tmp_path) as storage, cluster_of(tmp_path, 3, storage, shared_home=False) as cluster:
        head, home = cluster.hosts[0], tmp_path / "private"
        teacher, data = make_world(cluster.shared / "world")
        path = write_space(cluster, teacher, data)
        cluster.on_head(f"raydistill sweep {path}", timeout=900)
        trials = head.private / "sweeps/spread/trials"
        results = [json.loads(found.read_text()) for found in trials.glob("*/result.json")]
        assert [result["status"] for result in results] == ["done"] * 8
        assert {result["host"] for result in results} == {host.name for host in cluster.hosts}
        on_worker = cluster.hosts[1].private / "sweeps/spread"
        assert list(on_worker.glob("trials/*/best/model.safetensors")), "its own trials"
        assert len(list(on_worker.glob("trials/*/best/model.safetensors"))) < 8
        assert not list((head.private / "sweeps/spread").glob(".ray/*")), "Tune's state is in the bucket"
        published = (head.private / "mlartifacts/spread").glob("*/artifacts/checkpoint/model.safetensors")
        assert len(list(published)) == 8, "the other hosts' trials too"

        source = cluster.shared / "many.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in corpus_rows(1500, seed=7)))
        label = f"raydistill pseudolabel --teacher {teacher} --dataset {source} --batch-chars 2000"
        cluster.on_head(label)
        labels = labels_in(head.private / "labels")
        assert len(labels.targets) == 1500
        assert labels.manifest["hosts"].keys() == {host.name for host in cluster.hosts}

        cluster.on_head(f"rm -rf {home}/*")
        said = cluster.on_head(f"raydistill sweep {path} 2>&1", timeout=900)
        assert "8 trials are over, and none is to come" in said
        assert {json.loads(found.read_text())["ended_at"] for found in trials.glob("*/result.json")} == {
            result["ended_at"] for result in results
        }
        assert "1500 rows are there already" in cluster.on_head(f"{label} 2>&1")
        assert labels_in(head.private / "labels").targets == labels.targets
        cluster.down()


@dataclass(frozen=True)
class Struck:
    """The cluster whose hosts are taken away, what to label, and the labels of a job that nobody disturbed."""

    cluster: Cluster
    teacher: Path
    data: Path
    source: Path
    labels: dict[str, str]

    def label(self, output: str) -> str:
        """The command that labels into SHARED/`output`."""
        inputs = f"--teacher {self.teacher} --dataset {self.source} --batch-chars 600"
        return f"raydistill pseudolabel {inputs} --output {self.cluster.shared / output}"


@pytest.fixture(scope="module")
def struck(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Struck]:
    """Three hosts; a test that takes one away gives it back."""
    with cluster_of(tmp_path_factory.mktemp("struck"), 3) as cluster:
        teacher, data = make_world(cluster.shared / "world")
        source = cluster.shared / "many.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in corpus_rows(3000, seed=7)))
        before = Struck(cluster, teacher, data, source, {})
        cluster.on_head(before.label("untouched"))
        labels = labels_in(cluster.shared / "untouched").targets
        assert len(set(labels.values())) > 100, "labels that tell rows apart"
        yield replace(before, labels=labels)


def test_a_label_job_outlives_a_lost_host(struck: Struck) -> None:
    """One of three hosts goes without a word: the job ends as an untouched one, and the host is taken up again."""
    cluster, lost = struck.cluster, struck.cluster.hosts[2]
    job = cluster.start_on_head(struck.label("lost"))
    wait_for(cluster.shared / "lost", BATCHES, 60)
    assert not is_labelled(cluster.shared / "lost"), "the job was over before it could be struck"
    lost.lose()
    succeeds(job)
    found = labels_in(cluster.shared / "lost")
    assert found.targets == struck.labels
    rows = found.manifest["hosts"]
    assert 0 < rows[lost.name] < min(rows[host.name] for host in cluster.hosts[:2])
    lost.switch_on()
    wait_for_nodes(cluster, 3)


def test_a_label_job_outlives_a_minute_without_network(struck: Struck) -> None:
    """A host that is cut off works on, unheard, and comes back: no row is missing, doubled or another."""
    cluster, cut = struck.cluster, struck.cluster.hosts[1]
    job = cluster.start_on_head(struck.label("cut"))
    wait_for(cluster.shared / "cut", BATCHES, 60)
    assert not is_labelled(cluster.shared / "cut"), "the job was over before it could be struck"
    cut.disconnect()
    time.sleep(60)
    cut.connect()
    succeeds(job)
    assert labels_in(cluster.shared / "cut").targets == struck.labels
    wait_for_nodes(cluster, 3)


def test_a_sweep_outlives_a_lost_host(struck: Struck) -> None:
    """Its trials go on elsewhere, from their last checkpoints: all end, once each."""
    cluster, lost = struck.cluster, struck.cluster.hosts[2]
    job = cluster.start_on_head(f"raydistill sweep {write_space(cluster, struck.teacher, struck.data)}")
    trials = cluster.shared / "sweeps" / "spread" / "trials"
    wait_for(trials, "*/result.json", 3)
    lost.lose()
    succeeds(job)
    results = [json.loads(path.read_text()) for path in trials.glob("*/result.json")]
    assert [result["status"] for result in results] == ["done"] * 8
    assert sorted(result["number"] for result in results) == list(range(8))
    lost.switch_on()
    wait_for_nodes(cluster, 3)


def test_a_killed_driver_is_taken_up_by_the_same_command(struck: Struck) -> None:
    """A sweep's and a label job's: what was finished stays as it is, and the end is that of an untouched run."""
    cluster = struck.cluster
    sweep = f"raydistill sweep {write_space(cluster, struck.teacher, struck.data)} --set name=orphaned"
    trials = cluster.shared / "sweeps" / "orphaned" / "trials"
    job = cluster.start_on_head(sweep)
    wait_for(trials, "*/result.json", 3)
    kill_driver(cluster, "sweep", job)
    before = {path: path.read_bytes() for path in trials.glob("*/result.json")}
    assert 3 <= len(before) < 8
    cluster.on_head(sweep)
    after = {path: path.read_bytes() for path in trials.glob("*/result.json")}
    assert [json.loads(result)["status"] for result in after.values()] == ["done"] * 8
    assert before.items() <= after.items(), "a finished trial was done again"

    job = cluster.start_on_head(struck.label("orphaned"))
    wait_for(cluster.shared / "orphaned", BATCHES, 60)
    kill_driver(cluster, "pseudolabel", job)
    assert not is_labelled(cluster.shared / "orphaned")
    cluster.on_head(struck.label("orphaned"))
    assert labels_in(cluster.shared / "orphaned").targets == struck.labels


def kill_driver(cluster: Cluster, name: str, job: subprocess.Popen[str]) -> None:
    """SIGKILL for the command on the head; Ray's processes there are left to find out."""
    [driver] = drivers(cluster, name)
    driver.kill()
    job.communicate(timeout=60)
    assert job.returncode != 0


def drivers(cluster: Cluster, name: str) -> list[psutil.Process]:
    """The processes of a command of ours on the head."""
    lines = {process: process.cmdline() for process in cluster.hosts[0].processes()}
    return [p for p, line in lines.items() if [Path(part).name for part in line[1:3]] == ["raydistill", name]]


def wait_for(root: Path, pattern: str, count: int) -> None:
    """Until so many files are there."""
    deadline = time.monotonic() + 300
    while len(list(root.glob(pattern))) < count:
        assert time.monotonic() < deadline, f"{root}: {pattern} does not come"
        time.sleep(0.2)


def succeeds(job: subprocess.Popen[str]) -> None:
    """The job ends, and well."""
    said, _ = job.communicate(timeout=600)
    assert job.returncode == 0, said[-3000:]


def labels_in(root: Path) -> LabelSet:
    """The one label set there."""
    [folder] = root.glob("many-*")
    return read_label_set(folder)


def is_labelled(root: Path) -> bool:
    """Whether the job there is over."""
    return bool(list(root.glob("many-*/manifest.json")))
