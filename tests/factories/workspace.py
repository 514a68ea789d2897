"""A small world for tests of whole commands: a tiny teacher, a corpus on disk, and the command line."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil

from tests.factories.models import save_tiny, sentences


def corpus_rows(n: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows whose target is the source's first words."""
    texts = sentences(2 * n, seed)
    return [
        {"id": f"r{seed}-{i}", "source": f"{texts[2 * i]} {texts[2 * i + 1]}", "target": texts[2 * i]} for i in range(n)
    ]


def write_corpus(folder: Path, train: int = 48, other: int = 8) -> Path:
    """A folder with train, validation and test files."""
    folder.mkdir(parents=True)
    for seed, (split, n) in enumerate({"train": train, "validation": other, "test": other}.items()):
        lines = [json.dumps(row) for row in corpus_rows(n, seed)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def make_world(folder: Path) -> tuple[Path, Path]:
    """A teacher's folder and a corpus's."""
    return save_tiny("bart", folder / "teacher", dropout=0.0), write_corpus(folder / "data")


# How Ray calls the processes of actors that label, trials of both launchers, and what has its machine alone.
AT_WORK = ("ray::MapWorker", "ray::ImplicitFunc", "ray::RayTrainWorker", "ray::_with_thr")
# In the environment of every command; in nothing that it says or writes.
SECRETS = {
    "HF_TOKEN": "hf_NotToBeSeen",
    "MLFLOW_TRACKING_PASSWORD": "mlflow-not-to-be-seen",
    "AWS_SECRET_ACCESS_KEY": "aws-not-to-be-seen",
}


def environment(**more: str) -> dict[str, str]:
    """What a command of the tests runs with: no RAYDISTILL_HOME, as a new user has none, and secrets."""
    own = {name: value for name, value in os.environ.items() if name != "RAYDISTILL_HOME"}
    return {**own, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **SECRETS, **more}


def command(home: Path, *arguments: object, timeout: float = 280, **more: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m raydistill.NAME ...` to its end, in the folder in which ./outputs is `home`."""
    assert home.name == "outputs"
    return subprocess.run(
        [sys.executable, "-m", f"raydistill.{arguments[0]}", *map(str, arguments[1:])],
        env=environment(**more),
        cwd=home.parent,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def processes_of(home: Path) -> list[psutil.Process]:
    """Ray's processes of the commands that work under `home`."""
    mine = []
    for process in psutil.process_iter(["name"]):
        try:
            if process.environ().get("RAYDISTILL_HOME") == str(home):
                mine.append(process)
        except psutil.Error:
            continue
    return mine


def wait_for_ray_to_end(home: Path) -> None:
    """A killed driver's Ray processes end by themselves; until then they would hold on to its folders.

    All but the node's two agents, which outlive a driver that was killed while Ray started: they touch no folder of
    ours, and are ended here.
    """
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        left = processes_of(home)
        agents = [process for process in left if "Agent" in process.name()]
        if len(agents) == len(left):
            for process in agents:
                process.kill()
            return
        time.sleep(0.2)
    raise AssertionError(f"Ray's processes are still there: {processes_of(home)}")


def last_json(done: subprocess.CompletedProcess[str]) -> dict:
    """The object that `--json` ends with; the command's messages where it failed."""
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def background(
    arguments: list[str], log: Path, ready: Callable[[], object], **env: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A process and its children until the block ends; it is there when `ready()` no longer fails."""
    with log.open("wb") as output:
        process = subprocess.Popen(arguments, env={**os.environ, **env}, stdout=output, stderr=output, cwd=log.parent)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                ready()
                break
            except OSError:
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.3)
        yield process
    finally:
        family = [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        process.terminate()
        for child in [*family, psutil.Process(process.pid)] if family else []:
            child.kill()
        process.wait()
