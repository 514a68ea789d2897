"""Artifacts: complete or absent after a kill at any step, one writer at a time, clear errors for damaged folders."""

import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from raydistill.core import artifact
from raydistill.core.artifact import LockHeld, Manifest
from raydistill.core.errors import TransientError, UserError
from tests.factories.kills import (
    check_synced_before_publication,
    kill_at_every_step,
    record_syncs_and_renames,
    run_killed_at,
)

KIND = "test artifact"


def make(folder: Path, text: str) -> None:
    with artifact.build(folder, lambda: Manifest(kind=KIND, key=text)) as temporary:
        (temporary / "inner").mkdir()
        for name in ("a.txt", "inner/b.txt"):
            (temporary / name).write_text(text)


def content(folder: Path) -> str | None:
    """The text of a whole artifact; None if there is none. Fails for anything in between."""
    if not artifact.is_complete(folder):
        assert not folder.exists()
        return None
    manifest = artifact.open_artifact(folder, Manifest, KIND)
    texts = {(folder / name).read_text() for name in manifest.files}
    assert texts == {manifest.key}
    return manifest.key


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.parent.iterdir() if p not in (folder, artifact.lock_path(folder))]


@pytest.mark.parametrize("old", ["old", None])
def test_a_kill_at_any_step_of_a_build_leaves_the_old_or_the_new_artifact(old, tmp_path):
    folder = tmp_path / "home" / "x"
    folder.parent.mkdir()

    def prepare():
        if old:
            make(folder, old)

    contents = kill_at_every_step(lambda: make(folder, "new"), prepare, folder, content)
    assert len(contents) > 15
    assert contents[0] == old
    assert contents[-1] == "new"
    switch = contents.index("new")
    assert set(contents[:switch]) == {old}
    assert set(contents[switch:]) == {"new"}


@pytest.mark.parametrize("step", range(1, 40))
def test_a_build_after_a_kill_succeeds_and_removes_what_the_kill_left(step, tmp_path):
    folder = tmp_path / "x"
    make(folder, "old")
    run_killed_at(step, lambda: make(folder, "new"), folder)
    with artifact.lock(folder):
        make(folder, "newest")
    assert content(folder) == "newest"
    assert leftovers(folder) == []


def test_a_kill_at_any_step_of_a_removal_leaves_the_artifact_or_nothing(tmp_path):
    folder = tmp_path / "home" / "x"
    folder.parent.mkdir()
    contents = kill_at_every_step(lambda: artifact.remove(folder), lambda: make(folder, "old"), folder, content)
    assert contents[0] == "old"
    assert contents[-1] is None
    assert leftovers(folder) == []


def test_a_kill_while_a_folder_is_sealed_leaves_it_incomplete_or_complete(tmp_path):
    folder = tmp_path / "home" / "x"
    folder.parent.mkdir()

    def prepare():
        folder.mkdir()
        (folder / "a.txt").write_text("parts")

    states = []
    for step in range(1, 20):
        for path in folder.parent.iterdir():
            subprocess.run(["rm", "-rf", str(path)], check=True)
        prepare()
        killed = run_killed_at(step, lambda: artifact.seal(folder, Manifest(kind=KIND, key="parts")), folder)
        states.append(content(folder) if artifact.is_complete(folder) else "incomplete")
        if not killed:
            break
    assert states[0] == "incomplete"
    assert states[-1] == "parts"
    assert len(states) > 4


def test_every_file_and_folder_is_synced_before_the_rename_that_publishes_it(tmp_path, monkeypatch):
    events = record_syncs_and_renames(monkeypatch)
    make(tmp_path / "x", "text")
    assert sorted(p.name for p in (tmp_path / "x").rglob("*")) == ["a.txt", "b.txt", "inner", "manifest.json"]
    check_synced_before_publication(events, tmp_path / "x")


def test_the_block_that_raises_leaves_the_old_artifact(tmp_path):
    make(tmp_path / "x", "old")

    def fail():
        with artifact.build(tmp_path / "x", lambda: Manifest(kind=KIND)) as temporary:
            (temporary / "a.txt").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert content(tmp_path / "x") == "old"
    assert leftovers(tmp_path / "x") == []


def test_a_failing_rename_restores_the_old_artifact(tmp_path, monkeypatch):
    folder = tmp_path / "x"
    make(folder, "old")
    rename = os.rename

    def fail(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        make(folder, "new")
    assert content(folder) == "old"
    assert leftovers(folder) == []


def test_a_writer_that_lost_its_lock_does_not_replace_its_successors_artifact(tmp_path):
    make(tmp_path / "x", "old")

    def write_cut_off():
        with artifact.build(tmp_path / "x", lambda: Manifest(kind=KIND, key="cut off")) as temporary:
            (temporary / "a.txt").write_text("cut off")
            os.rename(temporary, tmp_path / "aside")  # the successor would delete it, and the write would fail earlier
            make(tmp_path / "x", "successor")
            os.rename(tmp_path / "aside", temporary)

    with pytest.raises(TransientError, match="written by another process"):
        write_cut_off()
    assert content(tmp_path / "x") == "successor"


def build_with_a_successor(folder: Path, take_over, *, parents: bool) -> None:
    """Build an artifact while another process, to which the lock was given, takes over after the first file."""
    with artifact.build(folder, lambda: Manifest(kind=KIND, key="cut off")) as temporary:
        (temporary / "a.txt").write_text("cut off")
        take_over()
        (temporary / "inner").mkdir(parents=parents)
        (temporary / "inner" / "b.txt").write_text("cut off")


@pytest.mark.parametrize("old", ["old", None])
@pytest.mark.parametrize("parents", [True, False])
def test_a_writer_whose_temporary_folder_was_deleted_publishes_nothing(old, parents, tmp_path):
    """The successor has begun and not yet finished; with `parents` the writer creates its folder again, half empty."""
    folder = tmp_path / "x"
    if old:
        make(folder, old)
    with pytest.raises(TransientError, match="written by another process"):
        build_with_a_successor(folder, lambda: artifact.remove_leftovers(folder), parents=parents)
    assert content(folder) == old
    assert leftovers(folder) == []


@pytest.mark.parametrize("old", ["old", None])
def test_a_writer_that_was_cut_off_before_its_rename_leaves_its_successors_artifact(old, tmp_path, monkeypatch):
    folder = tmp_path / "x"
    if old:
        make(folder, old)
    publish = artifact._publish

    def publish_after_the_successor(*args):
        monkeypatch.undo()
        make(folder, "successor")
        publish(*args)

    monkeypatch.setattr(artifact, "_publish", publish_after_the_successor)
    with pytest.raises(TransientError, match="written by another process"):
        make(folder, "cut off")
    assert content(folder) == "successor"
    assert leftovers(folder) == []


def test_a_lost_lock_is_released_without_changing_its_successors_lock_file(tmp_path):
    path = artifact.lock_path(tmp_path / "x")
    with artifact.lock(tmp_path / "x"):
        path.unlink()
        successor = hold_lock(tmp_path / "x", 60)
        owner = path.read_text()
    try:
        assert path.read_text() == owner
        assert f"process {successor.pid}" in owner
    finally:
        successor.kill()
        successor.wait()
    with artifact.lock(tmp_path / "x"):
        path.unlink()


def test_generations_count_the_builds(tmp_path):
    for text in ("one", "two", "three"):
        make(tmp_path / "x", text)
    assert artifact.open_artifact(tmp_path / "x", Manifest, KIND).generation == 3


HOLD = """
import sys, time
from pathlib import Path
from raydistill.core import artifact
with artifact.lock(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def hold_lock(folder: Path, seconds: float) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), str(seconds)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"locked\n"
    return process


def test_a_held_lock_names_its_owner(tmp_path):
    process = hold_lock(tmp_path / "x", 60)
    try:
        with pytest.raises(LockHeld) as error, artifact.lock(tmp_path / "x"):
            pass
        host = os.uname().nodename
        assert f"{tmp_path / 'x'}: in use by process {process.pid} on {host} since 20" in str(error.value)
        assert "wait until that process ends, or stop it" in str(error.value)
    finally:
        process.kill()
        process.wait()
    with artifact.lock(tmp_path / "x"):  # the system released the dead process's lock
        pass


def test_waiting_for_a_lock_says_so_once_and_ends_when_the_lock_is_free(tmp_path):
    process = hold_lock(tmp_path / "x", 1)
    messages: list[str] = []
    with artifact.lock(tmp_path / "x", timeout=math.inf, on_wait=messages.append):
        assert process.wait(timeout=60) == 0
    assert len(messages) == 1
    assert messages[0].endswith("; waiting")


def test_a_timeout_ends_the_wait_for_a_lock(tmp_path):
    process = hold_lock(tmp_path / "x", 60)
    try:
        with pytest.raises(LockHeld), artifact.lock(tmp_path / "x", timeout=0.3):
            pass
    finally:
        process.kill()
        process.wait()


def test_a_reader_never_sees_a_half_replaced_artifact(tmp_path):
    folder = tmp_path / "x"
    make(folder, "0")
    done = threading.Event()
    problems = []

    def read():
        while not done.is_set():
            if not artifact.is_complete(folder):
                problems.append("absent")

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for i in range(1, 100):
            make(folder, str(i))
    finally:
        done.set()
        thread.join()
    assert content(folder) == "99"
    assert problems == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "a.txt").unlink(), "a.txt is missing"),
        (lambda folder: (folder / "a.txt").write_text("longer than before"), "a.txt has 18 bytes instead of 4"),
        (lambda folder: (folder / "manifest.json").unlink(), "no complete test artifact"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "damaged"),
        (lambda folder: edit_manifest(folder, kind="label set"), "holds a label set, not a test artifact"),
        (lambda folder: edit_manifest(folder, schema=1), "schema version 1"),
        (lambda folder: edit_manifest(folder, files={"a\0": 4}), "a\0 is missing"),
        (lambda folder: edit_manifest(folder, color="red"), "color: Extra inputs are not permitted"),
    ],
)
def test_a_damaged_artifact_is_an_error_that_names_the_folder(damage, message, tmp_path):
    make(tmp_path / "x", "text")
    damage(tmp_path / "x")
    with pytest.raises(UserError, match=message) as error:
        artifact.open_artifact(tmp_path / "x", Manifest, KIND)
    assert str(tmp_path / "x") in str(error.value)


def test_a_path_below_a_file_is_no_artifact(tmp_path):
    (tmp_path / "file").touch()
    assert not artifact.is_complete(tmp_path / "file" / "x")
    with pytest.raises(UserError, match="no complete test artifact"):
        artifact.open_artifact(tmp_path / "file" / "x", Manifest, KIND)


def edit_manifest(folder: Path, **values) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
