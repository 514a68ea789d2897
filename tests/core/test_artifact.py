"""Artifacts: complete or absent after a kill at any step, one writer at a time, clear errors for damaged folders."""

import json
import math
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from raydistill.core import artifact
from raydistill.core.artifact import LockHeld, Manifest
from raydistill.core.errors import TransientError, UserError
from raydistill.core.files import atomic_path, write_atomic
from tests.factories.kills import (
    check_synced_before_publication,
    count_calls_before_changes,
    kill_at_every_step,
    record_syncs_and_renames,
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


# The changes of a build. Temporary folder, inner folder, two files; fsync of two files and two folders; open, fsync,
# rename, fsync and unlink for the manifest; the rename and its fsync; the unlink of what is left. An old artifact adds
# its rename and the deletion of its manifest, two files and two folders.
BUILD_STEPS = {"old": 22, None: 16}


@pytest.mark.parametrize("old", ["old", None])
def test_a_kill_at_any_step_of_a_build_leaves_the_old_or_the_new_artifact(old, tmp_path):
    folder = tmp_path / "home" / "x"
    folder.parent.mkdir()

    def prepare():
        if old:
            make(folder, old)

    contents = kill_at_every_step(lambda: make(folder, "new"), prepare, folder, content)
    assert len(contents) == BUILD_STEPS[old] + 1
    switch = contents.index("new")
    assert set(contents[:switch]) == {old}
    assert set(contents[switch:]) == {"new"}


@pytest.mark.parametrize("old", ["old", None])
def test_a_reader_at_any_step_of_a_build_sees_the_old_or_the_new_artifact_and_does_not_disturb_the_build(old, tmp_path):
    folder = tmp_path / "x"
    if old:
        make(folder, old)
    log = tmp_path / "log"
    log.touch()

    def read():
        with log.open("a") as file:
            file.write(f"{content(folder)}\n")

    num_steps = count_calls_before_changes(lambda: make(folder, "new"), read, folder)
    texts = log.read_text().split()
    assert num_steps == len(texts) == BUILD_STEPS[old]
    switch = texts.index("new")
    assert set(texts[:switch]) == {str(old)}
    assert set(texts[switch:]) == {"new"}
    assert content(folder) == "new"
    assert leftovers(folder) == ["log"]


@pytest.mark.parametrize("old", ["old", None])
def test_a_build_after_a_kill_succeeds_and_removes_what_the_kill_left(old, tmp_path):
    folder = tmp_path / "home" / "x"
    folder.parent.mkdir()

    def prepare():
        if old:
            make(folder, old)

    def rebuild(_):
        with artifact.lock(folder):
            make(folder, "newest")
        assert leftovers(folder) == []
        return content(folder)

    contents = kill_at_every_step(lambda: make(folder, "new"), prepare, folder, rebuild)
    assert contents == ["newest"] * (BUILD_STEPS[old] + 1)


def test_a_kill_at_any_step_of_a_removal_leaves_the_artifact_or_nothing(tmp_path):
    folder = tmp_path / "home" / "x"
    folder.parent.mkdir()
    contents = kill_at_every_step(lambda: artifact.remove(folder), lambda: make(folder, "old"), folder, content)
    # Steps: the rename and its fsync, the manifest, two files, two folders
    assert contents == ["old"] + [None] * 7
    assert leftovers(folder) == []


def test_a_kill_while_a_folder_is_sealed_leaves_it_incomplete_or_complete(tmp_path):
    folder = tmp_path / "home" / "x"
    folder.parent.mkdir()

    def prepare():
        folder.mkdir()
        (folder / "a.txt").write_text("parts")

    def state(folder):
        return content(folder) if artifact.is_complete(folder) else "incomplete"

    states = kill_at_every_step(lambda: artifact.seal(folder, Manifest(kind=KIND, key="parts")), prepare, folder, state)
    # Steps: the fsyncs of file and folder; open, fsync, rename and fsync of the manifest; the unlink of its old name
    assert states == ["incomplete"] * 5 + ["parts"] * 3


def test_every_file_and_folder_is_synced_before_the_rename_that_publishes_it(tmp_path, monkeypatch):
    events = record_syncs_and_renames(monkeypatch)
    make(tmp_path / "x", "text")
    assert sorted(p.name for p in (tmp_path / "x").rglob("*")) == ["a.txt", "b.txt", "inner", "manifest.json"]
    check_synced_before_publication(events, tmp_path / "x")


def test_new_parent_folders_are_synced_in_their_parents(tmp_path, monkeypatch):
    events = record_syncs_and_renames(monkeypatch)
    make(tmp_path / "a" / "b" / "x", "text")
    for folder in (tmp_path, tmp_path / "a", tmp_path / "a" / "b"):
        assert ("fsync", str(folder)) in events


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
    publish = artifact.publish

    def publish_after_the_successor(*args):
        monkeypatch.undo()
        make(folder, "successor")
        publish(*args)

    monkeypatch.setattr(artifact, "publish", publish_after_the_successor)
    with pytest.raises(TransientError, match="written by another process"):
        make(folder, "cut off")
    assert content(folder) == "successor"
    assert leftovers(folder) == []


def give_lock_to_a_successor(folder: Path, server: str) -> None:
    """What a file server does that misses the owner of a lock; the successor writes its owner line and a build."""
    path = artifact.lock_path(folder)
    if server == "deletes the file":
        path.unlink()
        with ThreadPoolExecutor(1) as pool:  # a thread holds locks of its own
            pool.submit(lock_and_make, folder, "successor").result()
    else:
        path.write_text("process 1 on other since 2026-01-01T00:00:00+00:00\n0123456789abcdef")
        with ThreadPoolExecutor(1) as pool:
            pool.submit(make, folder, "successor").result()


def lock_and_make(folder: Path, text: str) -> None:
    with artifact.lock(folder):
        make(folder, text)


CHANGES = {
    "build": lambda folder: make(folder, "cut off"),
    "seal": lambda folder: artifact.seal(folder, Manifest(kind=KIND, key="cut off")),
    "remove": artifact.remove,
    "remove leftovers": artifact.remove_leftovers,
    "write a record": lambda folder: Manifest(kind=KIND, key="cut off").write(folder / artifact.MANIFEST),
    "write in a new folder": lambda folder: write_atomic(folder.with_name("new") / "a.txt", b"cut off"),
}


@pytest.mark.parametrize("server", ["deletes the file", "keeps the file"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_process_that_lost_its_lock_before_a_change_changes_nothing(change, server, tmp_path):
    folder = tmp_path / "x"
    make(folder, "old")
    with artifact.lock(folder):
        give_lock_to_a_successor(folder, server)
        owner = artifact.lock_path(folder).read_text()
        (tmp_path / ".x.01234567.tmp").mkdir()  # of a second build by the successor
        with pytest.raises(TransientError, match=f"{folder}: was written by another process"):
            CHANGES[change](folder)
    assert content(folder) == "successor"
    assert leftovers(folder) == [".x.01234567.tmp"]
    assert artifact.lock_path(folder).read_text() == owner, "the end of the lost lock leaves the successor's line"
    lock_and_make(folder, "newest")
    assert content(folder) == "newest"


def test_a_process_that_lost_its_lock_while_it_wrote_a_file_leaves_the_file_of_its_successor(tmp_path):
    folder, file = tmp_path / "x", tmp_path / "x" / "a.txt"
    with artifact.lock(folder), pytest.raises(TransientError, match="written by another process"):
        write_after_the_successor(folder, file)
    assert file.read_text() == "successor"
    assert leftovers(folder) == []
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "inner", "manifest.json"]


def write_after_the_successor(folder: Path, file: Path) -> None:
    with atomic_path(file) as temporary:
        temporary.write_text("cut off")
        give_lock_to_a_successor(folder, "keeps the file")
        temporary.parent.mkdir(exist_ok=True)
        temporary.write_text("cut off")


def test_locks_of_other_threads_and_released_locks_do_not_prevent_a_build(tmp_path):
    lock_and_make(tmp_path / "x", "first")
    artifact.lock_path(tmp_path / "x").unlink()
    with artifact.lock(tmp_path / "y"), artifact.lock(tmp_path / "x"):
        make(tmp_path / "x", "second")
        artifact.lock_path(tmp_path / "y").unlink()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(make, tmp_path / "z", "third").result()
    assert [content(tmp_path / name) for name in "xz"] == ["second", "third"]


def test_a_lock_is_released_if_its_owner_cannot_be_erased(tmp_path, monkeypatch):
    def fail(descriptor, length):
        raise OSError(5, "Input/output error")

    def hold():
        with artifact.lock(tmp_path / "x"):
            monkeypatch.setattr(os, "ftruncate", fail)

    with pytest.raises(OSError, match="Input/output") as error:
        hold()
    monkeypatch.undo()
    assert error.tb is not None, "the traceback keeps the lock object alive"
    with artifact.lock(tmp_path / "x"):
        pass


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
