"""An hour of a sweep and a label job on three hosts, with a random fault every two minutes.

In every round the same sweep, published to the MLflow server of deploy/, and the same label job run at the same time.
Every round must end like an undisturbed one: the same trials, each exactly once, with the same losses; the same label
for every row; one finished run per trial in the database. A command that stops is run again, as a user would.
"""

import json
import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.factories.cluster import (
    SPACE,
    Cluster,
    driver_processes,
    read_labels,
    running_cluster,
    write_sources,
    write_space,
)
from tests.factories.hosts import NETWORK, Host
from tests.factories.hosts import missing_requirements as missing_for_hosts
from tests.factories.mlflow_server import MODULES, Server, mlflow_server
from tests.factories.mlflow_server import missing_requirements as missing_for_server
from tests.factories.workspace import WORKER_PROCESSES, make_world

MISSING = missing_for_hosts() or missing_for_server()
pytestmark = [pytest.mark.soak, pytest.mark.timeout(3 * 3600), pytest.mark.skipif(bool(MISSING), reason=MISSING)]

MINUTES = float(os.environ.get("RAYDISTILL_SOAK_MINUTES", "60"))
FAULT_INTERVAL_S = 120.0
OUTAGE_S = 30.0  # of a host, the tracking server or the database
NETWORK_OUTAGE_S = 60.0
ROWS = 6000
ROUND_TIMEOUT_S = 3600
UNPUBLISHED = "run the same command again to publish"


@dataclass
class RepeatedCommand:
    """A command on the head that is run again until it succeeds.

    Attributes:
        cluster: the cluster.
        line: the command line.
        name: the name of its log files.
        logs: the folder of its log files.
        exit_statuses: the exit statuses of finished calls.
        process: the current call, or None.
        complete: whether the command has succeeded and published everything.
    """

    cluster: Cluster
    line: str
    name: str
    logs: Path
    exit_statuses: list[int] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None
    complete: bool = False

    @property
    def log(self) -> Path:
        """The log file of the current call."""
        return self.logs / f"{self.name}-{len(self.exit_statuses)}.log"

    def poll(self) -> None:
        """Start the command, or check whether the current call has ended."""
        if self.process is None and not self.complete:
            with self.log.open("w", encoding="utf-8") as output:
                self.process = self.cluster.start_on_head(f"{self.line} 2>&1", output)
        elif self.process is not None and self.process.poll() is not None:
            output_text = self.log.read_text(encoding="utf-8")
            assert "Traceback (most recent call last)" not in output_text, output_text[-6000:]
            self.exit_statuses.append(self.process.returncode)
            self.complete = self.process.returncode == 0 and UNPUBLISHED not in output_text
            self.process = None


@dataclass
class FaultInjector:
    """Causes random faults and ends outages when they are due.

    Attributes:
        cluster: the cluster.
        server: the MLflow server.
        rng: chooses the faults.
        counts: the number of faults so far, by kind.
        outages: time at which an outage is due to end, and the function that ends it.
    """

    cluster: Cluster
    server: Server
    rng: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    outages: list[tuple[float, Callable[[], None]]] = field(default_factory=list)

    def inject(self) -> str:
        """Cause a random fault, and return its description. No kind occurs again before all kinds have occurred."""
        kinds = {
            "worker process": self._kill_worker,
            "host": lambda: self._lose_host(self._choose_host()),
            "network": lambda: self._disconnect(self._choose_host()),
            "tracking server": lambda: self._interrupt(self.server.kill, self.server.start),
            "database": lambda: self._interrupt(self.server.database.stop, self.server.database.start),
            "driver of the sweep": lambda: self._kill_driver("sweep"),
            "driver of the label job": lambda: self._kill_driver("pseudolabel"),
        }
        fewest = min(self.counts[kind] for kind in kinds)
        kind = self.rng.choice([kind for kind in kinds if self.counts[kind] == fewest])
        target = kinds[kind]()
        if target is None:
            return f"none: no {kind} was running"
        self.counts[kind] += 1
        return f"{kind} {target}".strip()

    def end_outages(self, force: bool = False) -> None:
        """End the outages that are due, or all of them."""
        due = [outage for outage in self.outages if force or outage[0] <= time.monotonic()]
        for outage in due:
            self.outages.remove(outage)
            _, restore = outage
            restore()

    def _interrupt(self, stop: Callable[[], None], restore: Callable[[], None], seconds: float = OUTAGE_S) -> str:
        stop()
        self.outages.append((time.monotonic() + seconds, restore))
        return ""

    def _choose_host(self) -> Host:
        return self.rng.choice(self.cluster.hosts[1:])  # not the head, which holds Ray's own state

    def _lose_host(self, host: Host) -> str:
        self._interrupt(host.lose, host.switch_on)
        return host.name

    def _disconnect(self, host: Host) -> str:
        self._interrupt(host.disconnect, host.connect, NETWORK_OUTAGE_S)
        return host.name

    def _kill_worker(self) -> str | None:
        workers = [p for host in self.cluster.hosts for p in host.processes() if _is_worker(p)]
        if not workers:
            return None
        worker = self.rng.choice(workers)
        name = worker.name()
        worker.kill()
        return name

    def _kill_driver(self, command: str) -> str | None:
        drivers = driver_processes(self.cluster, command)
        for process in drivers:
            process.kill()
        return "" if drivers else None


def _is_worker(process: psutil.Process) -> bool:
    """Whether a process executes a trial, labels, or runs an exclusive task; Ray's own actors and agents do not."""
    try:
        return process.name().startswith(WORKER_PROCESSES)
    except psutil.Error:
        return False


@dataclass(frozen=True)
class SoakSetup:
    """The cluster and the server, and the inputs of every round's commands."""

    cluster: Cluster
    server: Server
    space: Path
    label_command: str

    def commands(self, name: str) -> list[RepeatedCommand]:
        """The sweep and the label job of the round `name`."""
        sweep = f"raydistill sweep {self.space} --set name={name} --set tracking_uri={self.server.url}"
        label = f"{self.label_command} --output {self.cluster.shared / name}"
        logs = self.cluster.file.parent / "logs"
        return [
            RepeatedCommand(self.cluster, sweep, f"{name}-sweep", logs),
            RepeatedCommand(self.cluster, label, f"{name}-label", logs),
        ]

    def results(self, name: str) -> tuple[dict[str, float], dict[str, str]]:
        """The loss of each trial by key, and the label of each row by id.

        Also asserts that every trial is done and has exactly one run in the database.
        """
        folder = self.cluster.shared / "sweeps" / name / "trials"
        results = [json.loads(path.read_text()) for path in folder.glob("*/result.json")]
        assert {result["status"] for result in results} == {"done"}
        assert sorted(result["number"] for result in results) == list(range(SPACE["search"]["trials"]))
        for path in folder.glob("*/metrics.jsonl"):
            steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
            assert steps == sorted(set(steps)), path
        assert self.server.trials(name) == sorted((result["key"], "FINISHED") for result in results)
        losses = {result["key"]: result["metrics"]["val_loss"] for result in results}
        return losses, read_labels(self.cluster.shared / name).targets


@pytest.fixture
def soak_setup(tmp_path: Path) -> Iterator[SoakSetup]:
    for name in MODULES:
        pytest.importorskip(name)
    logs = tmp_path / "logs"
    logs.mkdir()
    login = {"MLFLOW_TRACKING_USERNAME": "team", "MLFLOW_TRACKING_PASSWORD": "the-teams-own-password"}
    with (
        running_cluster(tmp_path, 3, login) as cluster,
        mlflow_server(logs, host=f"{NETWORK}.1", password=login["MLFLOW_TRACKING_PASSWORD"]) as server,
    ):
        teacher, data = make_world(cluster.shared / "world")
        space = write_space(cluster, teacher, data, retries=50)
        source = write_sources(cluster, ROWS)
        label_command = (
            f"raydistill pseudolabel --teacher {teacher} --dataset {source} --batch-chars 600 --allow-repetitive"
        )
        yield SoakSetup(cluster, server, space, label_command)


def test_rounds_with_random_faults_end_like_an_undisturbed_round(soak_setup: SoakSetup) -> None:
    start = time.monotonic()
    undisturbed = soak_setup.commands("untouched")
    run_round(undisturbed, lambda: None)
    assert [command.exit_statuses for command in undisturbed] == [[0], [0]]
    losses, labels = soak_setup.results("untouched")
    assert len(set(labels.values())) > 100, "labels must differ between rows"
    print_elapsed(start, f"undisturbed round: {len(losses)} trials, {len(labels)} labels")

    faults = FaultInjector(soak_setup.cluster, soak_setup.server, random.Random(7))
    soak_start = time.monotonic()
    last_fault = soak_start

    def inject_fault_if_due() -> None:
        nonlocal last_fault
        faults.end_outages()
        if time.monotonic() - last_fault >= FAULT_INTERVAL_S:
            last_fault = time.monotonic()
            print_elapsed(start, f"fault: {faults.inject()}")

    rounds, exit_statuses = 0, Counter[int]()
    while time.monotonic() - soak_start < 60 * MINUTES:
        commands = soak_setup.commands(f"round{rounds}")
        run_round(commands, inject_fault_if_due)
        faults.end_outages(force=True)
        round_losses, round_labels = soak_setup.results(f"round{rounds}")
        assert round_losses == pytest.approx(losses, rel=0.02)
        assert round_labels == labels
        exit_statuses.update(status for command in commands for status in command.exit_statuses)
        rounds += 1
        print_elapsed(start, f"round {rounds} complete; calls by exit status so far: {dict(exit_statuses)}")
    minutes = (time.monotonic() - soak_start) / 60
    print_elapsed(
        start, f"{minutes:.0f} minutes, {rounds} rounds, {faults.counts.total()} faults: {dict(faults.counts)}"
    )
    assert faults.counts.total() >= 0.8 * 60 * MINUTES / FAULT_INTERVAL_S


def run_round(commands: list[RepeatedCommand], between_polls: Callable[[], None]) -> None:
    """Run until every command is complete, and call `between_polls` about once a second."""
    deadline = time.monotonic() + ROUND_TIMEOUT_S
    while not all(command.complete for command in commands):
        assert time.monotonic() < deadline, [command.line for command in commands if not command.complete]
        for command in commands:
            command.poll()
        if not all(command.complete for command in commands):
            between_polls()
        time.sleep(1)


def print_elapsed(start: float, text: str) -> None:
    """Print progress with the elapsed minutes; pytest shows it with -s."""
    print(f"[{(time.monotonic() - start) / 60:5.1f} min] {text}", flush=True)
