"""Folders with one writer at a time, as machines that share no folder see them through a storage."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raydistill.cluster import snapshots, sync
from raydistill.cluster.snapshots import FolderWriter, StoredFolder, is_record
from raydistill.core import artifact
from raydistill.core.artifact import LockHeld
from raydistill.core.errors import TransientError, UserError
from tests.factories.machines import files_under, write_file

UseMachine = Callable[[str], Path]


class Killed(BaseException):
    """Ends a writer in the middle, as a SIGKILL does."""


def stored_folder(path: Path) -> StoredFolder:
    storage = sync.open_storage()
    assert storage is not None
    return StoredFolder(storage, path)


def claim(path: Path) -> FolderWriter:
    """A claim to a folder, with the newest snapshot in the local folder."""
    writer = FolderWriter(stored_folder(path))
    writer.pull()
    return writer


def pulled(home: Path, name: str) -> dict[str, str]:
    """The files of a folder, after a pull to the machine with this home."""
    snapshots.pull(home / name)
    return files_under(home / name)


def count_objects(folder: StoredFolder) -> int:
    return len(folder.storage.list_objects(f"{snapshots.OBJECTS}/{folder.name}"))


def test_pull_brings_the_newest_snapshot_and_deletes_other_files(use_machine: UseMachine) -> None:
    run = use_machine("one") / "runs/r"
    write_file(run / "checkpoint-1/model", "old")
    write_file(run / "state.json", "1")
    write_file(run / ".lock", "")
    write_file(run / ".ray/state", "Ray's own")
    snapshots.save(run)
    assert pulled(use_machine("two"), "runs/r") == {"checkpoint-1/model": "old", "state.json": "1"}
    use_machine("one")
    (run / "checkpoint-1/model").unlink()
    write_file(run / "checkpoint-2/model", "new")
    write_file(run / "state.json", "2")
    snapshots.save(run)
    assert pulled(use_machine("two"), "runs/r") == {"checkpoint-2/model": "new", "state.json": "2"}
    assert not (use_machine("two") / "runs/r/checkpoint-1").exists(), "no empty folder is left"


def test_pull_keeps_exports_that_were_made_on_this_machine_only(use_machine: UseMachine) -> None:
    """`choose` on a second machine exports a student without saving the sweep."""
    sweep = use_machine("one") / "sweeps/s"
    write_file(sweep / "sweep.json", "1")
    write_file(sweep / "exports/a/model", "new")
    snapshots.save(sweep)
    other = use_machine("two") / "sweeps/s"
    write_file(other / "exports/b/model", "made here")
    write_file(other / "exports/a/model", "old")
    write_file(other / "exports/a/left", "old")
    files = {"sweep.json": "1", "exports/a/model": "new", "exports/b/model": "made here"}
    assert pulled(use_machine("two"), "sweeps/s") == files
    snapshots.save(other)
    assert pulled(use_machine("one"), "sweeps/s") == files


def test_unchanged_files_are_neither_uploaded_nor_downloaded_again(
    use_machine: UseMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = use_machine("one") / "runs/r"
    write_file(run / "best/model", "weights")
    write_file(run / "metrics.jsonl", "1")
    snapshots.save(run)
    assert pulled(use_machine("two"), "runs/r")
    transferred: list[str] = []
    for name in ("upload", "download"):
        transfer = getattr(sync.Storage, name)

        def record(self: sync.Storage, *args: Any, transfer: Any = transfer) -> Any:
            transferred.append(next(str(arg) for arg in args if isinstance(arg, Path)).rpartition("/")[2])
            return transfer(self, *args)

        monkeypatch.setattr(sync.Storage, name, record)
    with snapshots.writer(use_machine("three") / "runs/r"):  # downloads both files
        write_file(use_machine("three") / "runs/r/metrics.jsonl", "1, 2")
        snapshots.save(use_machine("three") / "runs/r")
    assert pulled(use_machine("two"), "runs/r") == {"best/model": "weights", "metrics.jsonl": "1, 2"}
    snapshots.save(use_machine("two") / "runs/r")
    assert sorted(transferred) == ["metrics.jsonl"] * 3 + ["model"]


def test_a_single_file_is_stored_like_a_folder(use_machine: UseMachine) -> None:
    snapshots.save(write_file(use_machine("one") / "latency.json", "1"))
    snapshots.pull(use_machine("two") / "latency.json")
    snapshots.save(write_file(use_machine("two") / "latency.json", "1, 2"))
    snapshots.pull(use_machine("one") / "latency.json")
    assert files_under(use_machine("one")) == {"latency.json": "1, 2"}


def test_a_folder_that_did_not_change_here_never_replaces_a_newer_snapshot(use_machine: UseMachine) -> None:
    snapshots.save(write_file(use_machine("one") / "teacher/config.json", "monday").parent)
    assert pulled(use_machine("two"), "teacher") == {"config.json": "monday"}
    snapshots.save(write_file(use_machine("one") / "teacher/config.json", "tuesday").parent)
    snapshots.save(use_machine("two") / "teacher")
    assert pulled(use_machine("three"), "teacher") == {"config.json": "tuesday"}


def test_save_uploads_a_new_file_with_an_old_modification_time(use_machine: UseMachine) -> None:
    """As after `rsync -a` or `tar` replaced a teacher that had been saved after the new one was created."""
    path = write_file(use_machine("one") / "teacher/config.json", "monday")
    snapshots.save(path.parent)
    write_file(path, "tuesday")
    os.utime(path, (1e9, 1e9))
    snapshots.save(path.parent)
    assert pulled(use_machine("two"), "teacher") == {"config.json": "tuesday"}


def test_pull_keeps_local_changes_that_are_newer_than_the_newest_snapshot(use_machine: UseMachine) -> None:
    """As after a kill between a validation and its upload."""
    path = write_file(use_machine("one") / "runs/r/metrics.jsonl", "1")
    snapshots.save(path.parent)
    write_file(path, "1, 2")
    snapshots.pull(path.parent)
    with snapshots.writer(path.parent):
        assert path.read_text() == "1, 2"


def test_a_deleted_local_folder_is_downloaded_again_and_stays_in_the_storage(use_machine: UseMachine) -> None:
    path = write_file(use_machine("one") / "runs/r/result.json", "{}")
    snapshots.save(path.parent)
    path.unlink()
    path.parent.rmdir()
    snapshots.save(path.parent)
    path.parent.mkdir()
    snapshots.save(path.parent)
    assert pulled(use_machine("one"), "runs/r") == {"result.json": "{}"}


def test_a_worker_with_a_lower_claim_neither_overwrites_nor_deletes(use_machine: UseMachine) -> None:
    run = write_file(use_machine("one") / "runs/r/state.json", "100").parent
    cut_off = claim(run)
    cut_off.save()
    other = use_machine("two") / "runs/r"
    successor = claim(other)
    assert files_under(other) == {"state.json": "100"}
    write_file(other / "state.json", "200")
    write_file(other / "result.json", "done")
    successor.save()
    use_machine("one")
    write_file(run / "state.json", "150")
    with pytest.raises(TransientError, match="another worker has taken over"):
        cut_off.save()
    assert pulled(use_machine("three"), "runs/r") == {"state.json": "200", "result.json": "done"}


def test_a_save_that_began_before_a_claim_is_ignored(use_machine: UseMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cut-off worker passed its check before the successor's claim, and writes everything after it."""
    run = write_file(use_machine("one") / "runs/r/state.json", "100").parent
    cut_off = claim(run)
    for step in ("100", "200", "300"):
        write_file(run / "state.json", step)
        write_file(run / f"checkpoint-{step}/model", step)
        cut_off.save()
    home = use_machine("two")
    successor = claim(home / "runs/r")
    use_machine("one")
    monkeypatch.setattr(cut_off, "_check_not_superseded", lambda newest: None)
    (run / "checkpoint-100/model").unlink()
    write_file(run / "state.json", "400")
    cut_off.save()
    use_machine("two")
    successor.save()
    newest = {"state.json": "300", **{f"checkpoint-{step}/model": step for step in ("100", "200", "300")}}
    assert pulled(use_machine("three"), "runs/r") == newest
    third = claim(use_machine("four") / "runs/r")
    assert files_under(use_machine("four") / "runs/r") == newest
    third.save()
    assert count_objects(third.folder) == len(newest), "objects of the cut-off worker are deleted"


def test_a_save_during_which_another_worker_claims_the_folder_fails(
    use_machine: UseMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the worker would end because it believes that its last save counts."""
    run = write_file(use_machine("one") / "runs/r/state.json", "100").parent
    cut_off = claim(run)
    cut_off.save()
    upload = FolderWriter._upload

    def upload_after_the_successor(self: FolderWriter, *args: Any) -> Any:
        monkeypatch.setattr(FolderWriter, "_upload", upload)
        successor = claim(use_machine("two") / "runs/r")
        write_file(successor.folder.path / "state.json", "200")
        successor.save()
        use_machine("one")
        return upload(self, *args)

    write_file(run / "state.json", "150!")
    monkeypatch.setattr(FolderWriter, "_upload", upload_after_the_successor)
    with pytest.raises(TransientError, match="another worker has taken over"):
        cut_off.save()
    assert pulled(use_machine("three"), "runs/r") == {"state.json": "200"}
    assert pulled(use_machine("one"), "runs/r") == {"state.json": "200"}


@pytest.mark.parametrize("saves", [1, 2, 4])
def test_a_claim_adopts_what_its_predecessor_saves_during_the_claim(
    use_machine: UseMachine, monkeypatch: pytest.MonkeyPatch, saves: int
) -> None:
    """No snapshot that a claim adopts refers to an object that the predecessor deletes."""
    run = write_file(use_machine("one") / "runs/r/state.json", "0").parent
    predecessor = claim(run)
    predecessor.save()
    read_newest = StoredFolder.read_newest
    num_reads = 0

    def read_and_save(self: StoredFolder, *args: Any, **kwargs: Any) -> Any:
        nonlocal num_reads
        num_reads += 1
        newest = read_newest(self, *args, **kwargs)
        if num_reads == 1:  # the successor has read the newest snapshot and not yet written its claim
            for step in range(1, saves + 1):
                write_file(run / "state.json", str(step) * (step + 1))
                predecessor.save()
        return newest

    use_machine("two")
    monkeypatch.setattr(StoredFolder, "read_newest", read_and_save)
    claim(use_machine("two") / "runs/r")
    monkeypatch.undo()
    assert files_under(run.parents[2] / "two/runs/r") == {"state.json": str(saves) * (saves + 1)}


def test_the_lower_of_two_equal_claims_stops(use_machine: UseMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = iter(["aaaaaaaa", "bbbbbbbb"])
    monkeypatch.setattr(snapshots, "secrets", SimpleNamespace(token_hex=lambda _: next(tokens)))
    read_newest = StoredFolder.read_newest
    claims: list[FolderWriter] = []

    def read_and_claim(self: StoredFolder, *args: Any, **kwargs: Any) -> Any:
        newest = read_newest(self, *args, **kwargs)
        if not claims and not args and not kwargs:
            monkeypatch.setattr(StoredFolder, "read_newest", read_newest)
            claims.append(FolderWriter(stored_folder(self.path)))  # takes the lower token
        return newest

    run = write_file(use_machine("one") / "runs/r/a", "1").parent
    monkeypatch.setattr(StoredFolder, "read_newest", read_and_claim)
    higher = FolderWriter(stored_folder(run))
    [lower] = claims
    assert (lower.prefix, higher.prefix) == ("00000001-aaaaaaaa", "00000001-bbbbbbbb")
    higher.save()
    with pytest.raises(TransientError, match="another worker has taken over"):
        lower.save()
    assert pulled(use_machine("two"), "runs/r") == {"a": "1"}


def write_two_snapshots(run: Path) -> None:
    with snapshots.writer(run):
        for text in ("new", "newer"):
            write_file(run / "checkpoint-1/model", text)
            write_file(run / "state", text)
            snapshots.save(run)
    raise Killed


SNAPSHOT_STEPS = 9  # uploads and deletions of two snapshots


@pytest.mark.parametrize("step", range(SNAPSHOT_STEPS + 1))
def test_a_writer_killed_at_any_step_leaves_the_old_or_the_new_snapshot(
    use_machine: UseMachine, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    run = write_file(use_machine("one") / "runs/r/state", "old").parent
    write_file(run / "checkpoint-1/model", "old")
    snapshots.save(run)
    lock, count = threading.Lock(), 0

    def counted(method: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal count
            with lock:
                count += 1
            if count > step:
                raise Killed
            return method(*args)

        return call

    with monkeypatch.context() as patch:
        for name in ("upload", "write", "delete"):
            patch.setattr(sync.Storage, name, counted(getattr(sync.Storage, name)))
        with pytest.raises(Killed):
            write_two_snapshots(run)
    assert (count > step) == (step < SNAPSHOT_STEPS), "a kill at every step, and no step more"
    texts = set(pulled(use_machine("two"), "runs/r").values())
    assert len(texts) == 1
    with snapshots.writer(use_machine("two") / "runs/r"):
        write_file(use_machine("two") / "runs/r/state", "newest")
        snapshots.save(use_machine("two") / "runs/r")
    assert pulled(use_machine("three"), "runs/r") == {"state": "newest", "checkpoint-1/model": texts.pop()}


def test_a_reader_whose_snapshot_is_replaced_meanwhile_takes_the_newer_one(
    use_machine: UseMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_file(use_machine("one") / "runs/r/state.json", "1").parent
    writer = claim(run)
    writer.save()
    reader = stored_folder(use_machine("two") / "runs/r")
    download = StoredFolder.download

    def save_and_download(self: StoredFolder, snapshot: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(StoredFolder, "download", download)
        for step in ("2", "33", "444"):
            write_file(run / "state.json", step)
            writer.save()
        download(self, snapshot, **kwargs)

    monkeypatch.setattr(StoredFolder, "download", save_and_download)
    reader.pull()
    assert files_under(reader.path) == {"state.json": "444"}


def test_objects_that_no_snapshot_needs_are_deleted(use_machine: UseMachine) -> None:
    run = write_file(use_machine("one") / "runs/r/best/model", "weights").parent.parent
    for number in range(3):
        writer = claim(run)
        for step in range(5):
            write_file(run / "state", f"{number} {step}")
            writer.save()
            assert count_objects(writer.folder) <= 3
        names = writer.folder.snapshot_names()
        assert len(names) <= 3, names


def test_pull_records_brings_no_part_of_a_checkpoint(use_machine: UseMachine) -> None:
    trial = use_machine("one") / "sweeps/s/trials/k"
    for name in ("run.json", "metrics.jsonl", "state/tensors.safetensors", "checkpoint-2/config.json"):
        write_file(trial / name, name)
    snapshots.save(trial)
    write_file(use_machine("one") / "sweeps/s/study.log", "log")
    write_file(use_machine("one") / "sweeps/s/exports/k/config.json", "export")
    snapshots.save(use_machine("one") / "sweeps/s")
    snapshots.save(trial / "checkpoint-2", use_machine("one") / "sweeps/s/exports/k")  # as inputs of other runs
    home = use_machine("two")
    snapshots.pull_records(home / "sweeps/s")
    assert set(files_under(home / "sweeps/s")) == {"trials/k/run.json", "trials/k/metrics.jsonl", "study.log"}
    assert set(pulled(home, "sweeps/s/trials/k")) == set(files_under(use_machine("one") / "sweeps/s/trials/k"))


def test_pull_records_reads_only_the_snapshots_that_are_new(
    use_machine: UseMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in "abc":
        snapshots.save(write_file(use_machine("one") / f"sweeps/s/trials/{key}/metrics.jsonl", "1").parent)
    snapshots.pull_records(use_machine("two") / "sweeps/s/trials")
    write_file(use_machine("one") / "sweeps/s/trials/b/metrics.jsonl", "1, 2")
    snapshots.save(use_machine("one") / "sweeps/s/trials/b")
    read = sync.Storage.read
    names: list[str] = []

    def read_and_record(self: sync.Storage, name: str) -> bytes:
        names.append(name)
        return read(self, name)

    monkeypatch.setattr(sync.Storage, "read", read_and_record)
    snapshots.pull_records(use_machine("two") / "sweeps/s/trials")
    assert len(names) == 1
    assert (use_machine("two") / "sweeps/s/trials/b/metrics.jsonl").read_text() == "1, 2"


def test_readers_on_the_writers_machine_do_not_touch_its_files(use_machine: UseMachine) -> None:
    run = write_file(use_machine("one") / "runs/r/metrics.jsonl", "1").parent
    with snapshots.writer(run):
        snapshots.save(run)
        StoredFolder(stored_folder(run).storage, run).write_marker(snapshots.Snapshot())
        write_file(run / "metrics.jsonl", "1, 2")
        snapshots.pull(run)
        snapshots.pull_records(run)
        assert (run / "metrics.jsonl").read_text() == "1, 2"


def test_messages_of_a_lock_name_the_folder_of_the_user(
    use_machine: UseMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock file itself is below HOME/.storage."""
    run = use_machine("one") / "runs/r"
    monkeypatch.setattr(snapshots, "LOCK_TIMEOUT_S", 0)
    with snapshots.writer(run):
        write_file(run / "state.json", "1")
        for other in (lambda: stored_folder(run).save(), snapshots.writer(run).__enter__):
            with pytest.raises(LockHeld, match=rf"^{run}: in use by process"):
                other()
        artifact.lock_path(stored_folder(run).state / "writer").unlink()  # as if the lock was given to another process
        with pytest.raises(TransientError, match=rf"^{run}: was written by another process"):
            artifact.remove(run / "best")


def test_a_file_that_the_storage_cannot_take_is_not_left_out_of_a_snapshot(
    use_machine: UseMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A storage reports a missing bucket or folder as the system reports a missing file."""
    run = write_file(use_machine("one") / "runs/r/result.json", "{}").parent
    write_file(run / "best/model", "weights")
    write = sync.Storage.write_stream

    def write_without_bucket(self: sync.Storage, source: Any, name: str) -> int:
        if name.endswith("best/model"):
            raise FileNotFoundError(2, "NO_SUCH_BUCKET")
        return write(self, source, name)

    with monkeypatch.context() as patch:
        patch.setattr(sync.Storage, "write_stream", write_without_bucket)
        with pytest.raises(TransientError, match="NO_SUCH_BUCKET"):
            snapshots.save(run)
    assert pulled(use_machine("two"), "runs/r") == {}
    use_machine("one")
    snapshots.save(run)
    assert pulled(use_machine("two"), "runs/r") == {"result.json": "{}", "best/model": "weights"}


def test_a_file_that_is_deleted_during_a_save_is_left_out(
    use_machine: UseMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_file(use_machine("one") / "runs/r/result.json", "{}").parent
    write_file(run / "checkpoint-1/model", "weights")
    scan = StoredFolder.scan

    def scan_and_delete(self: StoredFolder) -> Any:
        versions = scan(self)
        (run / "checkpoint-1/model").unlink(missing_ok=True)
        return versions

    writer = claim(run)
    with monkeypatch.context() as patch:
        patch.setattr(StoredFolder, "scan", scan_and_delete)
        writer.save()
    assert pulled(use_machine("two"), "runs/r") == {"result.json": "{}"}


@pytest.mark.parametrize(("step", "records_only"), [(0, False), (1, False), (2, False), (3, False), (1, True)])
def test_a_download_killed_at_any_step_leaves_no_complete_folder_of_two_snapshots(
    use_machine: UseMachine, monkeypatch: pytest.MonkeyPatch, step: int, records_only: bool
) -> None:
    markers = {name: name.partition("/")[0] for name in ("best/manifest.json", "result.json")}
    files = [*markers, "best/model", "metrics.jsonl"]
    for name in files:
        write_file(use_machine("one") / "runs/r" / name, "old")
    snapshots.save(use_machine("one") / "runs/r")
    local = use_machine("two") / "runs/r"
    pull = snapshots.pull_records if records_only else snapshots.pull
    pull(local)
    for name in files:
        write_file(use_machine("one") / "runs/r" / name, "newer")
    snapshots.save(use_machine("one") / "runs/r")
    use_machine("two")
    download, num_downloads = sync.Storage.download, 0

    def download_or_die(*args: Any) -> None:
        nonlocal num_downloads
        num_downloads += 1
        if num_downloads > step:
            raise Killed
        download(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sync, "MAX_TRANSFERS", 1)
        patch.setattr(sync.Storage, "download", download_or_die)
        with pytest.raises(Killed):
            pull(local)
    texts = files_under(local)
    for marker, part in markers.items():
        if marker in texts:
            assert {texts[name] for name in texts if part == "result.json" or name.startswith(part)} == {texts[marker]}
    pull(local)
    expected = ["metrics.jsonl", "result.json"] if records_only else files
    assert files_under(local) == dict.fromkeys(expected, "newer")


def test_a_killed_download_leaves_no_completion_marker_that_the_snapshot_lacks(
    use_machine: UseMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a run was deleted and started again on another machine."""
    run = write_file(use_machine("one") / "runs/r/result.json", "old").parent
    write_file(run / "metrics.jsonl", "old")
    snapshots.save(run)
    assert pulled(use_machine("two"), "runs/r")
    use_machine("one")
    (run / "result.json").unlink()
    write_file(run / "metrics.jsonl", "newer")
    snapshots.save(run)
    local = use_machine("two") / "runs/r"

    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(sync.Storage, "download", die)
        with pytest.raises(Killed):
            snapshots.pull(local)
    assert files_under(local) == {"metrics.jsonl": "old"}


def test_a_folder_of_which_only_records_are_here_cannot_be_saved(use_machine: UseMachine) -> None:
    run = write_file(use_machine("one") / "runs/r/result.json", "{}").parent
    write_file(run / "best/model", "weights")
    snapshots.save(run)
    copy = use_machine("two") / "runs/r"
    snapshots.pull_records(copy)
    write_file(copy / "served.json", "{}")
    with pytest.raises(UserError, match=f"{copy}: .*delete the folder"):
        snapshots.save(copy)


def test_a_damaged_snapshot_is_an_error_that_names_the_object(use_machine: UseMachine) -> None:
    run = write_file(use_machine("one") / "runs/r/state.json", "1").parent
    snapshots.save(run)
    folder = stored_folder(run)
    name = folder.snapshot_object("99999999-00000000-00000000")
    for content in (b"[]", b"{", b'{"schema": 2, "name": "x", "files": 3}'):
        folder.storage.write(content, name)
        with pytest.raises(UserError, match=f"{name}: .*Delete this object from the storage"):
            snapshots.pull(use_machine("two") / "runs/r")


@pytest.mark.parametrize("name", ["copy", "99999999-00000000-00000000"])
@pytest.mark.parametrize("content_name", ["copy", "00000001-00000000-00000000"])
def test_a_foreign_object_between_the_snapshots_is_an_error_that_names_the_object(
    use_machine: UseMachine, name: str, content_name: str
) -> None:
    run = write_file(use_machine("one") / "runs/r/state.json", "1").parent
    snapshots.save(run)
    folder = stored_folder(run)
    content = json.dumps(snapshots.Snapshot(name=content_name).to_json())
    folder.storage.write(content.encode(), folder.snapshot_object(name))
    write_file(run / "state.json", "2")
    for call in (snapshots.save, snapshots.pull):
        use_machine("one" if call is snapshots.save else "two")
        with pytest.raises(UserError, match=f"{folder.snapshot_object(name)}: .*Delete this object from the storage"):
            call(Path(os.environ["RAYDISTILL_HOME"]) / "runs/r")


def test_a_snapshot_with_a_file_outside_of_its_folder_is_refused(use_machine: UseMachine) -> None:
    run = write_file(use_machine("one") / "runs/r/state.json", "1").parent
    writer = claim(run)
    writer.save()
    file = writer.published[-1].files["state.json"]
    writer._publish({"../../out": file})
    with pytest.raises(UserError, match="is outside"):
        snapshots.pull(use_machine("two") / "runs/r")


@pytest.mark.parametrize(
    ("path", "expected"),
    [("result.json", True), ("tracking_id", True), ("state/manifest.json", False), ("best/config.json", False)],
)
def test_is_record(path: str, expected: bool) -> None:
    assert is_record(path) == expected
