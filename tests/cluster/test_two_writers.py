"""Two writers of one artifact on two hosts: one is cut off for a minute in the middle of a write, the other takes over.

The hosts see one folder through one kernel. Such a folder and an NFS server promise that the lock of a stopped process
is not given away. No shared folder promises more: a server that misses a client for longer than its lease gives the
client's locks to others, while the client's process still runs. Here the lock file is deleted, with the same effect:
the second process gets a lock that the first process seems to hold. These hosts cannot show a client that reads its
own cache instead of the server.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from raydistill.cluster import snapshots, sync
from raydistill.core import artifact
from raydistill.core.artifact import Manifest
from tests.factories.cluster import running_bucket
from tests.factories.hosts import Host, missing_requirements, running_hosts
from tests.factories.kills import identities
from tests.factories.machines import files_under
from tests.factories.workspace import environment
from tests.factories.writers import FILES, KIND, LARGE

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(missing_requirements()), reason=missing_requirements()),
]

ROOT = Path(__file__).parents[2]
CUT_SECONDS = 60.0
STAGES = ("before", "block", "publish", "renames")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Host]]:
    with running_hosts(tmp_path_factory.mktemp("hosts"), 2) as hosts:
        yield hosts


class Writer:
    """A process of tests.factories.writers on a host."""

    def __init__(self, host: Host, arguments: list[str], **env: str) -> None:
        self.host, self.arguments = host, arguments
        self.stopped: psutil.Process | None = None
        role, _, text, signals, stage = arguments
        self.result, self.paused = Path(signals, f"{role}-{text}-{stage}.json"), Path(signals, f"{stage}.paused")
        assignments = [f"{name}={value}" for name, value in {**env, "PYTHONPATH": str(ROOT)}.items()]
        command = ["env", *assignments, sys.executable, "-m", "tests.factories.writers", *arguments]
        options = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR")
        login = ["ssh", "-n", "-i", str(host.files.parent / "key"), *(f"-o{option}" for option in options)]
        quoted = " ".join(f"'{part}'" for part in command)
        with self.result.with_suffix(".log").open("wb") as log:
            self.process = subprocess.Popen(
                [*login, f"root@{host.address}", quoted], env=environment(), stdout=log, stderr=log
            )

    def wait_for(self, path: Path, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not path.exists():
            log = self.result.with_suffix(".log")
            assert time.monotonic() < deadline, f"{path}: {log.read_text()[-3000:]}"
            assert path is not self.paused or not self.result.exists(), self.result.read_text()
            time.sleep(0.1)

    def error(self) -> str | None:
        """The error with which the process ended."""
        self.wait_for(self.result)
        error: str | None = json.loads(self.result.read_text())
        return error

    def stop(self) -> None:
        """Stop the process, and wait until the system has stopped it."""
        for process in self.host.processes():
            with suppress(psutil.Error):  # other processes of the host come and go
                if process.cmdline()[1:] == ["-m", "tests.factories.writers", *self.arguments]:
                    self.stopped = process
        assert self.stopped is not None
        self.stopped.suspend()
        while self.stopped.status() != psutil.STATUS_STOPPED:
            time.sleep(0.05)

    def resume(self) -> None:
        """Let the stopped process continue."""
        if self.stopped:
            self.stopped.resume()


def cut_off(host: Host, writers: list[Writer], *, stop: bool) -> None:
    """Disconnect a host and, with `stop`, stop its writers."""
    for writer in writers:
        writer.wait_for(writer.paused)
    host.disconnect()
    for writer in writers:
        if stop:
            writer.stop()


def reconnect(host: Host, writers: list[Writer]) -> None:
    for writer in writers:
        writer.resume()
    host.connect()


def make_artifact(folder: Path, text: str) -> None:
    with artifact.lock(folder), artifact.build(folder, lambda: Manifest(kind=KIND, key=text)) as temporary:
        for name in FILES:
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(text)


def content(folder: Path) -> str:
    """The text of an artifact, all of whose files must be of one writer."""
    manifest = artifact.open_artifact(folder, Manifest, KIND)
    assert set(manifest.files) == set(FILES)
    assert {(folder / name).read_text() for name in FILES} == {manifest.key}
    return manifest.key


@pytest.mark.parametrize("existing", ["old", None])
def test_a_writer_whose_lock_was_given_away_leaves_a_shared_folder_to_its_successor(
    hosts: list[Host], tmp_path: Path, existing: str | None
) -> None:
    """One artifact per step of a write at which the first writer is cut off."""
    folders = {stage: tmp_path / "shared" / stage for stage in STAGES}
    signals = tmp_path / "signals"
    signals.mkdir()
    for folder in folders.values():
        folder.parent.mkdir(exist_ok=True)
        if existing:
            make_artifact(folder, existing)
    first = [Writer(hosts[0], ["build", str(folders[stage]), "A", str(signals), stage]) for stage in STAGES]
    cut_off(hosts[0], first, stop=True)
    cut_at = time.monotonic()

    refused = Writer(hosts[1], ["build", str(folders["block"]), "refused", str(signals), "none"])
    error = refused.error()
    assert error is not None
    assert error.startswith("LockHeld: ")
    assert f"on {hosts[0].name} since" in error, "a stopped process keeps its lock, and the message names its host"

    for stage, folder in folders.items():
        artifact.lock_path(folder).unlink()  # the server gives the lock to the next process
        (signals / stage).mkdir()
        successor = Writer(hosts[1], ["build", str(folder), "B", str(signals / stage), "none"])
        assert successor.error() is None
        assert content(folder) == "B"
    written = {stage: identities(folder) for stage, folder in folders.items()}

    time.sleep(max(0.0, cut_at + CUT_SECONDS - time.monotonic()))
    (signals / "continue").touch()
    reconnect(hosts[0], first)
    for writer in first:
        error = writer.error()
        assert error is not None, writer.arguments
        assert error.startswith("TransientError: "), error
        assert "was written by another process meanwhile" in error
    assert {stage: identities(folder) for stage, folder in folders.items()} == written
    for stage, folder in folders.items():
        assert content(folder) == "B", stage
    left = {path.name for path in (tmp_path / "shared").iterdir()}
    assert left == {name for stage in STAGES for name in (stage, f".{stage}.lock")}, "no temporary folder is left"


@pytest.fixture(params=["file", "s3"])
def storage(request: pytest.FixtureRequest, hosts: list[Host], tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment variables of a storage: a folder that the hosts share, or a bucket that they reach by network."""
    if request.param == "s3":
        with running_bucket(tmp_path) as env:
            yield env
    else:
        (tmp_path / "storage").mkdir()
        yield {sync.STORAGE_ENV: f"file://{tmp_path / 'storage'}"}


def test_a_writer_that_was_cut_off_during_an_upload_leaves_a_stored_folder_to_its_successor(
    hosts: list[Host], tmp_path: Path, storage: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a bucket the first writer keeps running, and its requests fail; with a folder its process is stopped."""
    home, signals = hosts[0].files.parent / "private", tmp_path / "signals"
    run, by_network = home / tmp_path.name / "runs" / "r", storage[sync.STORAGE_ENV].startswith("s3:")
    (signals / "B").mkdir(parents=True)
    env = {**storage, "RAYDISTILL_HOME": str(home / tmp_path.name)}
    first = Writer(hosts[0], ["save", str(run), "A", str(signals), "upload"], **env)
    cut_off(hosts[0], [first], stop=not by_network)
    cut_at = time.monotonic()
    if by_network:
        (signals / "continue").touch()

    successor = Writer(hosts[1], ["save", str(run), "B", str(signals / "B"), "none"], **env)
    assert successor.error() is None
    pull = pull_on_another_machine(tmp_path, env, monkeypatch)
    whole = pull("before", run)
    assert whole["state.json"] == "B 2"
    assert set(whole[LARGE]) == {"B"}

    time.sleep(max(0.0, cut_at + CUT_SECONDS - time.monotonic()))
    assert not first.result.exists(), "the first writer ended before it was connected again"
    (signals / "continue").touch()
    reconnect(hosts[0], [first])
    error = first.error()
    assert error is not None
    assert error.startswith("TransientError: ")
    assert "another worker has taken over" in error
    assert pull("after", run) == whole


def pull_on_another_machine(
    folder: Path, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, Path], dict[str, str]]:
    """Return a function that pulls a folder of the hosts' home to a home of this machine, and returns the files."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)

    def pull(name: str, path: Path) -> dict[str, str]:
        home = folder / name
        monkeypatch.setenv("RAYDISTILL_HOME", str(home))
        copy = home / path.relative_to(env["RAYDISTILL_HOME"])
        snapshots.pull(copy)
        return files_under(copy)

    return pull
