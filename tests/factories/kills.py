"""Fault injection: kills a writer of an artifact at each of its steps, and records what a writer syncs and changes."""

import itertools
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

Content = TypeVar("Content")
# Operations that change a folder, as Python's audit events name them, with the position of the argument that holds the
# descriptor of the folder that the path is relative to. "open" is counted for writing only.
CHANGES = {
    **{"open": None, "os.truncate": None, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 2, "os.rename": 2},
    **{"os.link": 2, "os.chmod": 2, "os.utime": 3},
}


def run_killed_at(step: int, action: Callable[[], None], folder: Path) -> bool:
    """Run `action` in a child process that ends before the change number `step`; whether the child reached it."""
    steps = itertools.count(1)

    def die() -> None:
        if next(steps) == step:
            os._exit(9)

    code = _run_in_child(action, die, folder)
    assert code in (0, 9)
    return code == 9


def count_calls_before_changes(action: Callable[[], None], call: Callable[[], None], folder: Path) -> int:
    """Run `action` in a child process that calls `call` before each change; the number of changes.

    Fails if `action` or `call` fails.
    """
    reader, writer = os.pipe()

    def call_and_count() -> None:
        call()
        os.write(writer, b".")

    code = _run_in_child(action, call_and_count, folder)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        num_changes = len(pipe.read())
    assert code == 0, f"failed after {num_changes} changes"
    return num_changes


def _run_in_child(action: Callable[[], None], before_change: Callable[[], None], folder: Path) -> int:
    """The exit code of a child process that runs `action`; 1 if `action` raises."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _call_before_changes(before_change, folder)
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _call_before_changes(call: Callable[[], None], folder: Path) -> None:
    """From now on, call a function before each change of this process below the artifact's parent folder."""
    is_calling = False

    def change() -> None:
        nonlocal is_calling
        if not is_calling:  # the function may change the folder itself
            is_calling = True
            call()
            is_calling = False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in CHANGES or (event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        if _changed_path(event, args).startswith(str(folder.parent)):
            change()

    fsync = os.fsync

    def fsync_after_call(fd: int) -> None:
        change()
        fsync(fd)

    os.fsync = fsync_after_call  # type: ignore[assignment]
    sys.addaudithook(hook)


def _changed_path(event: str, args: tuple[Any, ...]) -> str:
    """The path that an audit event names. `shutil.rmtree` deletes by name and the descriptor of the parent folder."""
    if isinstance(args[0], int):
        return os.readlink(f"/proc/self/fd/{args[0]}")
    position = CHANGES[event]
    descriptor = -1 if position is None else args[position]
    parent = os.readlink(f"/proc/self/fd/{descriptor}") if descriptor >= 0 else ""
    return os.path.join(parent, os.fsdecode(args[0]))


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
        shutil.rmtree(folder.parent)
        folder.parent.mkdir()
        prepare()
        killed = run_killed_at(step, action, folder)
        contents.append(content(folder))
        if not killed:
            return contents


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    """The inode and the modification time of every file: both change if a file is written again."""
    status = {path: path.stat() for path in sorted(folder.rglob("*"))}
    return {str(path.relative_to(folder)): (s.st_ino, s.st_mtime_ns) for path, s in status.items()}


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
