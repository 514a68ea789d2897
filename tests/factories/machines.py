"""Machines that share a storage but no folder: processes with their own homes."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from raydistill.cluster import snapshots
from raydistill.cluster.sync import STORAGE_ENV


def use_home(home: Path, storage: Path) -> None:
    """Make this process a process of the machine with this home."""
    home.mkdir(parents=True, exist_ok=True)
    storage.mkdir(exist_ok=True)
    os.environ |= {"RAYDISTILL_HOME": str(home), STORAGE_ENV: f"file://{storage}", "OMP_NUM_THREADS": "1"}


def machine_switch(parent: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A function that makes this process one of the machine with a name, and returns the machine's home in `parent`."""

    def switch(name: str) -> Path:
        home = parent / name
        home.mkdir(exist_ok=True)
        monkeypatch.setenv("RAYDISTILL_HOME", str(home))
        return home

    return switch


def start_on_machine(home: Path, storage: Path, function: Callable[..., object], *arguments: Any) -> BaseProcess:
    """Start a function in a process of the machine with this home; the result of the function is ignored."""
    context = multiprocessing.get_context("forkserver")  # imports these modules once for all processes
    context.set_forkserver_preload(["tests.factories.training", "raydistill.jobs.train"])
    process = context.Process(target=_call, args=(home, storage, function, arguments), daemon=True)
    process.start()
    return process


def run_on_machine(home: Path, storage: Path, function: Callable[..., object], *arguments: Any) -> int | None:
    """`start_on_machine`, and wait; returns the exit code."""
    process = start_on_machine(home, storage, function, *arguments)
    process.join(120)
    return process.exitcode


def _call(home: Path, storage: Path, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    use_home(home, storage)
    function(*arguments)


def write_file(path: Path, text: str) -> Path:
    """Write a file, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def files_under(folder: Path) -> dict[str, str]:
    """The text of every file in a folder, without hidden folders, by path."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        str(name): path.read_text(errors="replace")
        for name, path in files.items()
        if name.parts[0] != snapshots.LOCAL_STATE
    }
