"""Fault injection: kills a writer of an artifact at each of its steps, and records what the writer syncs to disk."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

Content = TypeVar("Content")
# Operations that change a folder, as Python's audit events name them. "open" is counted for writing only.
CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.utime", "os.link", "os.chmod"}


def run_killed_at(step: int, action: Callable[[], None], folder: Path) -> bool:
    """Run `action` in a child process that ends before the change number `step`; whether the child reached it."""
    child = os.fork()
    if child == 0:
        _die_at(step, folder)
        try:
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 9)
    return code == 9


def _die_at(step: int, folder: Path) -> None:
    """End this process like a SIGKILL does, before its change number `step` below the artifact's parent folder."""
    count = 0

    def change() -> None:
        nonlocal count
        count += 1
        if count == step:
            os._exit(9)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event != "open" or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if event in CHANGES and writes and str(args[0]).startswith(str(folder.parent)):
            change()

    fsync = os.fsync

    def counted_fsync(fd: int) -> None:
        change()
        fsync(fd)

    os.fsync = counted_fsync  # type: ignore[assignment]
    sys.addaudithook(hook)


def kill_at_every_step(
    action: Callable[[], None], prepare: Callable[[], None], folder: Path, content: Callable[[Path], Content]
) -> list[Content]:
    """What `content` reads from an artifact after a kill of `action` at each of its steps, and without a kill.

    Args:
        action: Writes or removes the artifact.
        prepare: Restores the state before `action`, in an empty parent folder.
        folder: The artifact.
        content: Reads a complete artifact, and fails for one that is half written.
    """
    contents = []
    step = 0
    while True:
        step += 1
        for path in folder.parent.iterdir():
            subprocess.run(["rm", "-rf", str(path)], check=True)
        prepare()
        killed = run_killed_at(step, action, folder)
        contents.append(content(folder))
        if not killed:
            return contents


def record_syncs_and_renames(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """A list to which every later fsync and rename of this process adds ("fsync" or "rename", path)."""
    events = []
    fsync, rename = os.fsync, os.rename

    def log_fsync(descriptor: int) -> None:
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def log_rename(source: Any, target: Any) -> None:
        events.append(("rename", str(source)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "rename", log_rename)
    return events


def check_synced_before_publication(events: list[tuple[str, str]], folder: Path) -> None:
    """Assert that all files and folders of an artifact were synced before its rename, and its parent folder after."""
    renames = [event for event in events if event[0] == "rename" and Path(event[1]).parent == folder.parent]
    rename = renames[0] if renames else None
    assert rename is not None, "the artifact was not renamed to its path"
    temporary = rename[1]
    before = {path for kind, path in events[: events.index(rename)] if kind == "fsync"}
    paths = [path for path in folder.rglob("*") if path != folder / "manifest.json"]
    assert {temporary} | {f"{temporary}/{path.relative_to(folder)}" for path in paths} <= before
    assert any(path.startswith(f"{temporary}/.manifest.json") for path in before)
    assert ("fsync", str(folder.parent)) in events[events.index(rename) :]
