"""A workspace for tests of whole commands: a tiny teacher, a corpus on disk, and functions that run commands."""

import importlib
import io
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, closing, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import psutil
import ray
from huggingface_hub import constants

from raydistill.cluster.start import ray_cluster
from tests.factories.models import save_tiny, sentences


def corpus_rows(n: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows whose target is the first sentence of the source."""
    texts = sentences(2 * n, seed)
    return [
        {"id": f"r{seed}-{i}", "source": f"{texts[2 * i]} {texts[2 * i + 1]}", "target": texts[2 * i]} for i in range(n)
    ]


def write_corpus(folder: Path, train: int = 48, other: int = 8) -> Path:
    """Write a folder with train, validation and test files of JSON lines."""
    folder.mkdir(parents=True)
    for seed, (split, n) in enumerate({"train": train, "validation": other, "test": other}.items()):
        lines = [json.dumps(row) for row in corpus_rows(n, seed)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def make_world(folder: Path) -> tuple[Path, Path]:
    """Save a tiny teacher and write a corpus; return their folders."""
    return save_tiny("bart", folder / "teacher", dropout=0.0), write_corpus(folder / "data")


# Beginnings of the names of Ray's worker processes: label actors, trials of both launchers, exclusive tasks.
WORKER_PROCESSES = ("ray::MapWorker", "ray::ImplicitFunc", "ray::RayTrainWorker", "ray::_report_and_run")
# In the environment of every command; no output and no file may contain the values.
SECRETS = {
    "HF_TOKEN": "hf_NotToBeSeen",
    "MLFLOW_TRACKING_PASSWORD": "mlflow-not-to-be-seen",
    "AWS_SECRET_ACCESS_KEY": "aws-not-to-be-seen",
}


def environment(**extra: str) -> dict[str, str]:
    """The environment of a command: without RAYDISTILL_HOME, as for a new user, with short timings and with secrets."""
    own = {name: value for name, value in os.environ.items() if name != "RAYDISTILL_HOME"}
    settings = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "RAYDISTILL_TIMING_SECONDS": "0.2",
        # Ray ends idle workers while there are more workers than CPUs. With this setting the worker that scored the
        # teacher also serves the finalists, and torch is imported once.
        "RAY_num_workers_soft_limit": "8",
    }
    return {**own, **settings, **SECRETS, **extra}


def command(home: Path, *arguments: object, timeout: float = 560, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m raydistill.NAME ...` in the parent folder of `home`, which must be named outputs."""
    assert home.name == "outputs"
    return subprocess.run(
        [sys.executable, "-m", f"raydistill.{arguments[0]}", *map(str, arguments[1:])],
        env=environment(**extra),
        cwd=home.parent,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def invoke(home: Path, *arguments: object, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, which has imported torch, transformers and Ray already; else as `command` does.

    If this process has initialized Ray, as in `ray_for_commands` and `ray_here`, the command joins this Ray, whose
    workers must have been started with the same home. Otherwise the command starts and ends its own. What libraries
    write to the file descriptors is not captured. An exception that `python -m` prints with a traceback is raised.
    Caches of this process remain: if data or checkpoints change between two commands, use `command`.
    """
    assert not ray.is_initialized() or os.environ["RAYDISTILL_HOME"] == str(home), "Ray's workers have another home"
    main = importlib.import_module(f"raydistill.{arguments[0]}").main
    argv = [f"raydistill.{arguments[0]}", *map(str, arguments[1:])]
    out, errors, status = io.StringIO(), io.StringIO(), 0
    with command_environment(home, **extra), redirect_stdout(out), redirect_stderr(errors):
        try:
            with patch.object(sys, "argv", argv):
                main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    return subprocess.CompletedProcess(argv, status, out.getvalue(), errors.getvalue())


@contextmanager
def ray_for_commands(home: Path, cpus: int | None = None, **extra: str) -> Iterator[None]:
    """Context with a local Ray for the commands that `invoke` runs with the same `home`.

    Environment variables that Ray's workers read are given here. Until the end of the context, this process has the
    environment and the working directory of a command.
    """
    with command_environment(home, **extra), ray_cluster(cpus):
        yield


@contextmanager
def command_environment(home: Path, **extra: str) -> Iterator[None]:
    """Context in which this process has the environment of a command with this home, and the home's parent folder.

    Environment, working directory and levels of loggers are restored afterwards. The libraries of Hugging Face read
    their variables when they are imported, so `extra` must not contain any of them.
    """
    assert not [name for name in extra if name.startswith("HF_")]
    variables = environment(RAYDISTILL_HOME=str(home), **extra)
    levels = {name: logging.getLogger(name).level for name in list(logging.root.manager.loggerDict)}
    offline = patch.object(constants, "HF_HUB_OFFLINE", True)
    with patch.dict(os.environ, variables, clear=True), chdir(home.parent), offline:
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def processes_of(home: Path) -> list[psutil.Process]:
    """Ray's processes of commands whose RAYDISTILL_HOME is `home`."""
    processes = []
    for process in psutil.process_iter(["name"]):
        try:
            if process.environ().get("RAYDISTILL_HOME") == str(home):
                processes.append(process)
        except psutil.Error:
            continue
    return processes


def wait_for_ray_to_end(home: Path) -> None:
    """Wait until the Ray processes of a killed driver have ended, because they still use the driver's folders.

    The node's two agents are killed: they do not end if the driver was killed while Ray was starting.
    """
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        remaining = processes_of(home)
        agents = [process for process in remaining if "Agent" in process.name()]
        if len(agents) == len(remaining):
            for process in agents:
                process.kill()
            return
        time.sleep(0.2)
    raise AssertionError(f"Ray's processes are still running: {processes_of(home)}")


def last_json(done: subprocess.CompletedProcess[str]) -> dict:
    """The object that a command with `--json` prints last; fails with the command's messages if the command failed."""
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def free_port() -> int:
    """A TCP port of loopback that no process uses."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def background(
    arguments: list[str], log: Path, ready: Callable[[], object], **env: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Context with a background process, started once `ready()` raises no OSError; its children end with it."""
    with log.open("wb") as output:
        process = subprocess.Popen(arguments, env={**os.environ, **env}, stdout=output, stderr=output, cwd=log.parent)
    try:
        deadline = time.monotonic() + 300
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
