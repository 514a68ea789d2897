"""cluster/local.yaml as users run it: `ray up` on three test hosts, jobs that spread over them, faults, `ray down`."""

import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.factories.cluster import (
    Cluster,
    driver_processes,
    read_labels,
    remaining_processes,
    running_bucket,
    running_cluster,
    wait_for_nodes,
    write_sources,
    write_space,
)
from tests.factories.hosts import missing_requirements
from tests.factories.workspace import make_world

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(bool(missing_requirements()), reason=missing_requirements()),
]

BATCH_OUTPUTS = ".many-*.work/out/*.parquet"


def test_jobs_spread_over_all_hosts_between_ray_up_and_ray_down(tmp_path: Path) -> None:
    with running_cluster(tmp_path, 3) as cluster:
        names = {host.name for host in cluster.hosts}
        teacher, data = make_world(cluster.shared / "world")
        assert_token_is_required(cluster)

        path = write_space(cluster, teacher, data)
        cluster.on_head(f"ray job submit -- raydistill sweep {path}", timeout=900)
        results = [json.loads(p.read_text()) for p in cluster.shared.glob("sweeps/spread/trials/*/result.json")]
        assert [result["status"] for result in results] == ["done"] * 8
        assert {result["host"] for result in results} == names

        source = write_sources(cluster, 1500)
        script = tmp_path / "label.py"
        script.write_text(
            "import sys\nfrom raydistill.pseudolabel import main\nif __name__ == '__main__':\n    main()\n"
        )
        done = cluster.ray(
            *("submit", str(cluster.file), str(script), "--teacher", str(teacher), "--dataset", str(source)),
            *("--batch-chars", "2000", "--allow-repetitive"),
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        labels = read_labels(cluster.shared / "labels")
        assert len(labels.targets) == 1500
        assert labels.manifest.hosts.keys() == names
        assert sum(labels.manifest.hosts.values()) == 1500

        cluster.down()
        assert remaining_processes(cluster.hosts, 120) == []


def assert_token_is_required(cluster: Cluster) -> None:
    """Without the cluster's token, neither the head nor a worker answers."""
    query = "python -c 'import ray; ray.init(logging_level=50); print(\"IN\", len(ray.nodes()))'"
    assert "IN 3" in cluster.on_head(query)
    for setting in ("RAY_AUTH_MODE=disabled", "RAY_AUTH_TOKEN=guessed"):
        done = cluster.ray("exec", str(cluster.file), f"env {setting} timeout 60 {query}")
        assert done.returncode != 0
        assert "IN 3" not in done.stdout


@pytest.mark.timeout(2400)  # three hosts share the cores of this machine
def test_hosts_without_a_shared_folder_share_a_bucket(tmp_path: Path) -> None:
    """Jobs spread over hosts with their own homes; a head that lost its home resumes from the bucket."""
    with running_bucket(tmp_path) as environ, running_cluster(tmp_path, 3, environ, shared_home=False) as cluster:
        head, home = cluster.hosts[0], tmp_path / "private"
        teacher, data = make_world(cluster.shared / "world")
        path = write_space(cluster, teacher, data, trials=6)  # two for each host
        cluster.on_head(f"raydistill sweep {path}", timeout=1200)
        trials = head.private / "sweeps/spread/trials"
        results = [json.loads(file.read_text()) for file in trials.glob("*/result.json")]
        assert [result["status"] for result in results] == ["done"] * 6
        assert {result["host"] for result in results} == {host.name for host in cluster.hosts}
        on_worker = cluster.hosts[1].private / "sweeps/spread"
        assert list(on_worker.glob("trials/*/best/model.safetensors")), "the worker has its own trials"
        assert len(list(on_worker.glob("trials/*/best/model.safetensors"))) < 6
        assert not list((head.private / "sweeps/spread").glob(".ray/*")), "Tune's state is in the bucket"
        published = (head.private / "mlartifacts/spread").glob("*/artifacts/checkpoint/model.safetensors")
        assert len(list(published)) == 6, "trials of the other hosts are published too"

        source = write_sources(cluster, 1500)
        label = f"raydistill pseudolabel --teacher {teacher} --dataset {source} --batch-chars 2000 --allow-repetitive"
        cluster.on_head(label)
        labels = read_labels(head.private / "labels")
        assert len(labels.targets) == 1500
        assert labels.manifest.hosts.keys() == {host.name for host in cluster.hosts}

        cluster.on_head(f"rm -rf {home}/*")
        output = cluster.on_head(f"raydistill sweep {path} 2>&1", timeout=900)
        assert "nothing to run" in output
        assert {json.loads(file.read_text())["ended_at"] for file in trials.glob("*/result.json")} == {
            result["ended_at"] for result in results
        }
        assert "already complete (1500 rows)" in cluster.on_head(f"{label} 2>&1")
        assert read_labels(head.private / "labels").targets == labels.targets
        cluster.down()


@dataclass(frozen=True)
class FaultTarget:
    """A cluster whose hosts fail, the inputs of its jobs, and the labels of an undisturbed job."""

    cluster: Cluster
    teacher: Path
    data: Path
    source: Path
    labels: dict[str, str]

    def label_command(self, output: str) -> str:
        """The command that writes labels to the folder `output` of the shared folder."""
        inputs = f"--teacher {self.teacher} --dataset {self.source} --batch-chars 600 --allow-repetitive"
        return f"raydistill pseudolabel {inputs} --output {self.cluster.shared / output}"

    def start_labelling(self, output: str) -> subprocess.Popen[str]:
        """Start a label job and return while the job is running, with 60 batches finished."""
        job = self.cluster.start_on_head(self.label_command(output))
        wait_for_files(self.cluster.shared / output, BATCH_OUTPUTS, 60)
        assert not is_labelled(self.cluster.shared / output), "the job finished before the fault"
        return job


@pytest.fixture(scope="module")
def fault_target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultTarget]:
    """Three hosts; a test that stops a host restarts it."""
    with running_cluster(tmp_path_factory.mktemp("faults"), 3) as cluster:
        teacher, data = make_world(cluster.shared / "world")
        target = FaultTarget(cluster, teacher, data, write_sources(cluster, 3000), {})
        cluster.on_head(target.label_command("untouched"))
        labels = read_labels(cluster.shared / "untouched").targets
        assert len(set(labels.values())) > 100, "labels must differ between rows"
        yield replace(target, labels=labels)


def test_label_job_survives_a_lost_host(fault_target: FaultTarget) -> None:
    """One of three hosts is lost without notice: the labels equal those of an undisturbed job; the host can rejoin."""
    cluster, lost = fault_target.cluster, fault_target.cluster.hosts[2]
    job = fault_target.start_labelling("lost")
    lost.lose()
    assert_succeeds(job)
    labels = read_labels(cluster.shared / "lost")
    assert labels.targets == fault_target.labels
    rows = labels.manifest.hosts
    assert 0 < rows[lost.name] < min(rows[host.name] for host in cluster.hosts[:2])
    lost.switch_on()
    wait_for_nodes(cluster, 3)


def test_label_job_survives_a_minute_without_network(fault_target: FaultTarget) -> None:
    """A disconnected host keeps working and comes back: no row is missing, duplicated or different."""
    cluster, disconnected = fault_target.cluster, fault_target.cluster.hosts[1]
    job = fault_target.start_labelling("disconnected")
    disconnected.disconnect()
    time.sleep(60)
    disconnected.connect()
    assert_succeeds(job)
    assert read_labels(cluster.shared / "disconnected").targets == fault_target.labels
    wait_for_nodes(cluster, 3)


def test_sweep_survives_a_lost_host(fault_target: FaultTarget) -> None:
    """Trials of the lost host resume elsewhere from their last checkpoints; every trial finishes exactly once."""
    cluster, lost = fault_target.cluster, fault_target.cluster.hosts[2]
    job = cluster.start_on_head(f"raydistill sweep {write_space(cluster, fault_target.teacher, fault_target.data)}")
    trials = cluster.shared / "sweeps" / "spread" / "trials"
    wait_for_files(trials, "*/result.json", 3)
    lost.lose()
    assert_succeeds(job)
    results = [json.loads(path.read_text()) for path in trials.glob("*/result.json")]
    assert [result["status"] for result in results] == ["done"] * 8
    assert sorted(result["number"] for result in results) == list(range(8))
    lost.switch_on()
    wait_for_nodes(cluster, 3)


def test_the_same_command_resumes_a_sweep_and_a_label_job_whose_driver_was_killed(fault_target: FaultTarget) -> None:
    """Finished trials are not repeated, and the results equal those of an undisturbed job."""
    cluster = fault_target.cluster
    space = write_space(cluster, fault_target.teacher, fault_target.data)
    sweep = f"raydistill sweep {space} --set name=orphaned"
    trials = cluster.shared / "sweeps" / "orphaned" / "trials"
    job = cluster.start_on_head(sweep)
    wait_for_files(trials, "*/result.json", 3)
    kill_driver(cluster, "sweep", job)
    before = {path: path.read_bytes() for path in trials.glob("*/result.json")}
    assert 3 <= len(before) < 8
    cluster.on_head(sweep)
    after = {path: path.read_bytes() for path in trials.glob("*/result.json")}
    assert [json.loads(result)["status"] for result in after.values()] == ["done"] * 8
    assert before.items() <= after.items(), "a finished trial was repeated"

    label = fault_target.label_command("orphaned")
    job = cluster.start_on_head(label)
    wait_for_files(cluster.shared / "orphaned", BATCH_OUTPUTS, 60)
    kill_driver(cluster, "pseudolabel", job)
    assert not is_labelled(cluster.shared / "orphaned")
    cluster.on_head(label)
    assert read_labels(cluster.shared / "orphaned").targets == fault_target.labels


def kill_driver(cluster: Cluster, name: str, job: subprocess.Popen[str]) -> None:
    """Send SIGKILL to the command on the head; Ray's processes must notice by themselves."""
    [driver] = driver_processes(cluster, name)
    driver.kill()
    job.communicate(timeout=60)
    assert job.returncode != 0


def wait_for_files(root: Path, pattern: str, count: int) -> None:
    """Wait until `count` files below `root` match the pattern."""
    deadline = time.monotonic() + 300
    while len(list(root.glob(pattern))) < count:
        assert time.monotonic() < deadline, f"{root}: fewer than {count} files match {pattern}"
        time.sleep(0.2)


def assert_succeeds(job: subprocess.Popen[str]) -> None:
    """Wait for the end of the job, which must succeed."""
    output, _ = job.communicate(timeout=600)
    assert job.returncode == 0, output[-3000:]


def is_labelled(root: Path) -> bool:
    """Whether the label job that writes below `root` has finished."""
    return bool(list(root.glob("many-*/manifest.json")))
