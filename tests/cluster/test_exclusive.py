"""Exclusive tasks on a real Ray: progress, errors, threads, and the loss of a worker."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from raydistill.cluster.exclusive import run_exclusive
from raydistill.core.console import ProgressBar, print_progress
from raydistill.core.errors import UserError
from tests.factories.workspace import ray_for_commands

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def ray_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    home = tmp_path_factory.mktemp("exclusive") / "outputs"
    with ray_for_commands(home, cpus=2, PYTHONPATH=str(ROOT)):  # the workers import the functions of this file
        yield


def report_and_wait(started: Path, device: str, threads: int) -> tuple[str, int, bool]:
    """Print a line, and end after the file `started` exists."""
    print_progress("first line")
    deadline = time.monotonic() + 60
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    bar = ProgressBar("rows", 2)
    bar.advance(2, "2/2 rows")
    bar.close()
    return device, torch.get_num_threads(), started.exists()


class Lines:
    """A text stream that creates a file when the first line is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.texts: list[str] = []

    def write(self, text: str) -> None:
        self.texts.append(text)
        self.path.touch()

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


@pytest.mark.parametrize("threads", [1, 2])
def test_lines_appear_while_the_task_runs(threads, tmp_path, monkeypatch):
    """The task ends only after its first line has reached this process."""
    lines = Lines(tmp_path / "started")
    monkeypatch.setattr(sys, "stderr", lines)
    result = run_exclusive(report_and_wait, lines.path, device="cpu", threads=threads)
    assert result == ("cpu", threads, True)
    assert "".join(lines.texts) == "first line\n  rows: 2/2 rows, 0 s left\n"


def fail(device: str, threads: int) -> None:
    print_progress("before the error")
    raise UserError("the file is not readable")


def test_error_of_the_function_is_raised_after_its_lines(capsys):
    with pytest.raises(UserError, match="the file is not readable"):
        run_exclusive(fail, device="cpu")
    assert capsys.readouterr().err == "before the error\n"


def print_and_die_once(marker: Path, device: str, threads: int) -> str:
    """The first call prints three lines and kills its process; the second prints one line."""
    if marker.exists():
        print_progress("second call")
        return "done"
    marker.touch()
    for number in range(3):
        print_progress(f"line {number} of the first call")
    time.sleep(1)  # the lines leave the process
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("the process is killed")


def test_task_of_a_killed_worker_is_started_again(tmp_path, capsys):
    assert run_exclusive(print_and_die_once, tmp_path / "marker", device="cpu") == "done"
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == [f"line {number} of the first call" for number in range(3)]
    assert "a worker process was lost (WorkerCrashedError)" in lines[3]
    assert lines[4:] == ["second call"]
