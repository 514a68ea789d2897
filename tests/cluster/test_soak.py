"""An hour of a sweep and a label job over three hosts, with something taken away every two minutes.

Round after round the same sweep, published to deploy/'s MLflow server, and the same label job run at the same time.
Each round ends as an untouched one did: the same trials, once each, with the same losses; the same label of every row;
one finished run per trial in the database. A command that stops is given again, as a user would.
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
import yaml

from tests.cluster.test_ray_up import SPACE, Cluster, cluster_of, drivers, labels_in
from tests.factories.hosts import NETWORK, Host, what_is_missing
from tests.factories.mlflow_server import MODULES, Server, mlflow_server
from tests.factories.mlflow_server import what_is_missing as what_the_server_misses
from tests.factories.workspace import AT_WORK, corpus_rows, make_world

MISSING = what_is_missing() or what_the_server_misses()
pytestmark = [pytest.mark.soak, pytest.mark.timeout(3 * 3600), pytest.mark.skipif(bool(MISSING), reason=MISSING)]

MINUTES = float(os.environ.get("RAYDISTILL_SOAK_MINUTES", "60"))
EVERY_S = 120.0
AWAY_S = 30.0  # a host, the tracking server, the database
CUT_S = 60.0  # the network
ROWS = 6000
ROUND_S = 3600  # a round that takes so long hangs
UNPUBLISHED = "run the same command again to publish"


@dataclass
class Command:
    """A command on the head that is given again until it has ended well; `ended` tells how its calls ended."""

    cluster: Cluster
    line: str
    name: str
    logs: Path
    ended: list[int] = field(default_factory=list)
    job: subprocess.Popen[str] | None = None
    whole: bool = False

    @property
    def log(self) -> Path:
        """What its present call says."""
        return self.logs / f"{self.name}-{len(self.ended)}.log"

    def look(self) -> None:
        """Start it, or see how it ended."""
        if self.job is None and not self.whole:
            with self.log.open("w", encoding="utf-8") as output:
                self.job = self.cluster.start_on_head(f"{self.line} 2>&1", output)
        elif self.job is not None and self.job.poll() is not None:
            said = self.log.read_text(encoding="utf-8")
            assert "Traceback (most recent call last)" not in said, said[-6000:]
            self.ended.append(self.job.returncode)
            self.whole = self.job.returncode == 0 and UNPUBLISHED not in said
            self.job = None


@dataclass
class Faults:
    """What may be taken away, and what is to be given back at which time."""

    cluster: Cluster
    server: Server
    rng: random.Random
    done: Counter[str] = field(default_factory=Counter)
    back: list[tuple[float, Callable[[], None]]] = field(default_factory=list)

    def strike(self) -> str:
        """Take something away at random: every kind comes before one comes again."""
        kinds = {
            "worker process": self._worker,
            "host": lambda: self._host(self._any_host()),
            "network": lambda: self._network(self._any_host()),
            "tracking server": lambda: self._away(self.server.kill, self.server.start),
            "database": lambda: self._away(self.server.database.stop, self.server.database.start),
            "driver of the sweep": lambda: self._driver("sweep"),
            "driver of the label job": lambda: self._driver("pseudolabel"),
        }
        least = min(self.done[kind] for kind in kinds)
        kind = self.rng.choice([kind for kind in kinds if self.done[kind] == least])
        what = kinds[kind]()
        if what is None:
            return f"nothing: no {kind} was at work"
        self.done[kind] += 1
        return f"{kind} {what}".strip()

    def give_back(self, everything: bool = False) -> None:
        """Give back what was away for long enough."""
        due = [one for one in self.back if everything or one[0] <= time.monotonic()]
        for one in due:
            self.back.remove(one)
            one[1]()

    def _away(self, take: Callable[[], None], give: Callable[[], None], seconds: float = AWAY_S) -> str:
        take()
        self.back.append((time.monotonic() + seconds, give))
        return ""

    def _any_host(self) -> Host:
        return self.rng.choice(self.cluster.hosts[1:])  # the head holds Ray's own state

    def _host(self, host: Host) -> str:
        self._away(host.lose, host.switch_on)
        return host.name

    def _network(self, host: Host) -> str:
        self._away(host.disconnect, host.connect, CUT_S)
        return host.name

    def _worker(self) -> str | None:
        found = [p for host in self.cluster.hosts for p in host.processes() if _works(p)]
        if not found:
            return None
        chosen = self.rng.choice(found)
        name = chosen.name()
        chosen.kill()
        return name

    def _driver(self, name: str) -> str | None:
        found = drivers(self.cluster, name)
        for process in found:
            process.kill()
        return "" if found else None


def _works(process: psutil.Process) -> bool:
    """A trial, an actor that labels, or what prepares and judges; none of Ray's own actors and agents."""
    try:
        return process.name().startswith(AT_WORK)
    except psutil.Error:
        return False


@dataclass(frozen=True)
class Place:
    """Where rounds run, and the commands of one."""

    cluster: Cluster
    server: Server
    space: Path
    label: str

    def commands(self, name: str) -> list[Command]:
        sweep = f"raydistill sweep {self.space} --set name={name} --set tracking_uri={self.server.url}"
        label = f"{self.label} --output {self.cluster.shared / name}"
        logs = self.cluster.file.parent / "logs"
        return [
            Command(self.cluster, sweep, f"{name}-sweep", logs),
            Command(self.cluster, label, f"{name}-label", logs),
        ]

    def found(self, name: str) -> tuple[dict[str, float], dict[str, str]]:
        """The loss of each trial by key, and each row's label; every trial is done, and stands once in the database."""
        folder = self.cluster.shared / "sweeps" / name / "trials"
        results = [json.loads(path.read_text()) for path in folder.glob("*/result.json")]
        assert {result["status"] for result in results} == {"done"}
        assert sorted(result["number"] for result in results) == list(range(SPACE["search"]["trials"]))
        for path in folder.glob("*/metrics.jsonl"):
            steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
            assert steps == sorted(set(steps)), path
        assert self.server.trials(name) == sorted((result["key"], "FINISHED") for result in results)
        losses = {result["key"]: result["metrics"]["val_loss"] for result in results}
        return losses, labels_in(self.cluster.shared / name).targets


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    for name in MODULES:
        pytest.importorskip(name)
    logs = tmp_path / "logs"
    logs.mkdir()
    passwords = {"MLFLOW_TRACKING_USERNAME": "team", "MLFLOW_TRACKING_PASSWORD": "the-teams-own-password"}
    with cluster_of(tmp_path, 3, passwords) as cluster:
        here = {"host": f"{NETWORK}.1", "password": passwords["MLFLOW_TRACKING_PASSWORD"]}
        with mlflow_server(logs, **here) as server:
            teacher, data = make_world(cluster.shared / "world")
            dataset = {"name": str(data), "max_source_tokens": 32, "max_target_tokens": 16}
            run = {**SPACE["run"], "teacher": str(teacher), "dataset": dataset}
            space = cluster.shared / "soak.yaml"
            space.write_text(yaml.safe_dump({**SPACE, "run": run, "search": {**SPACE["search"], "retries": 50}}))
            source = cluster.shared / "many.jsonl"
            source.write_text("".join(json.dumps(row) + "\n" for row in corpus_rows(ROWS, seed=7)))
            label = f"raydistill pseudolabel --teacher {teacher} --dataset {source} --batch-chars 600"
            yield Place(cluster, server, space, label)


def test_an_hour_of_faults_ends_as_untouched_rounds_did(place: Place) -> None:
    began = time.monotonic()
    untouched = place.commands("untouched")
    run_round(untouched, lambda: None)
    assert [command.ended for command in untouched] == [[0], [0]]
    losses, labels = place.found("untouched")
    assert len(set(labels.values())) > 100, "labels that tell rows apart"
    tell(began, f"the untouched round: {len(losses)} trials, {len(labels)} labels")

    faults = Faults(place.cluster, place.server, random.Random(7))
    soaked = time.monotonic()
    struck = soaked

    def fault() -> None:
        nonlocal struck
        faults.give_back()
        if time.monotonic() - struck >= EVERY_S:
            struck = time.monotonic()
            tell(began, f"taken away: {faults.strike()}")

    rounds, calls = 0, Counter[int]()
    while time.monotonic() - soaked < 60 * MINUTES:
        commands = place.commands(f"round{rounds}")
        run_round(commands, fault)
        faults.give_back(everything=True)
        found, texts = place.found(f"round{rounds}")
        assert found == pytest.approx(losses, rel=0.02)
        assert texts == labels
        calls.update(code for command in commands for code in command.ended)
        rounds += 1
        tell(began, f"round {rounds} is whole; calls by their status so far: {dict(calls)}")
    minutes = (time.monotonic() - soaked) / 60
    tell(began, f"{minutes:.0f} minutes, {rounds} rounds, {faults.done.total()} faults: {dict(faults.done)}")
    assert faults.done.total() >= 0.8 * 60 * MINUTES / EVERY_S


def run_round(commands: list[Command], fault: Callable[[], None]) -> None:
    """Until all commands have ended well."""
    deadline = time.monotonic() + ROUND_S
    while not all(command.whole for command in commands):
        assert time.monotonic() < deadline, [command.line for command in commands if not command.whole]
        for command in commands:
            command.look()
        if not all(command.whole for command in commands):
            fault()
        time.sleep(1)


def tell(began: float, what: str) -> None:
    """A line for who waits: pytest shows it with -s."""
    print(f"[{(time.monotonic() - began) / 60:5.1f} min] {what}", flush=True)
