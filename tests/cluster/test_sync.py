"""Write-once files of machines that share no folder, through a storage in a folder and in S3."""

import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import S3FileSystem

from raydistill.cluster import snapshots, sync
from raydistill.core.errors import TransientError, UserError
from tests.factories.kills import record_syncs_and_renames
from tests.factories.machines import files_under, write_file

UseMachine = Callable[[str], Path]


def test_pull_downloads_what_another_machine_pushed_without_local_files(use_machine: UseMachine) -> None:
    home = use_machine("one")
    write_file(home / "labels/x/out/batch-1.parquet", "a\n")
    write_file(home / "labels/x/plan/manifest.json", "{}")
    write_file(home / "labels/x/.lock", "")
    write_file(home / "labels/x/.plan.1234abcd.tmp/part", "unfinished")
    sync.push(home / "labels/x")
    other = use_machine("other")
    sync.pull(other / "labels")
    assert files_under(other) == {"labels/x/out/batch-1.parquet": "a\n", "labels/x/plan/manifest.json": "{}"}


def test_only_missing_files_are_transferred(use_machine: UseMachine) -> None:
    write_file(use_machine("one") / "x/a.json", "1")
    sync.push(use_machine("one") / "x")
    sync.pull(use_machine("other") / "x")
    before = (use_machine("other") / "x/a.json").stat()
    write_file(use_machine("one") / "x/b.json", "2")
    sync.push(use_machine("one") / "x")
    sync.pull(use_machine("other") / "x")
    assert files_under(use_machine("other") / "x") == {"a.json": "1", "b.json": "2"}
    assert (use_machine("other") / "x/a.json").stat().st_ino == before.st_ino


def test_push_does_not_overwrite_a_stored_file(use_machine: UseMachine) -> None:
    """As by an actor that was cut off, and writes a batch that was labelled again meanwhile."""
    sync.push(write_file(use_machine("one") / "out/batch-1", "first"))
    sync.push(write_file(use_machine("two") / "out/batch-1", "second, longer"))
    sync.pull(use_machine("third") / "out", use_machine("third") / "absent")
    assert files_under(use_machine("third") / "out") == {"batch-1": "first"}


def test_pull_replaces_a_truncated_file(use_machine: UseMachine) -> None:
    path = write_file(use_machine("one") / "x/part", "complete")
    sync.push(path)
    path.write_text("comp")
    sync.pull(path)
    assert path.read_text() == "complete"


@pytest.mark.parametrize("call", [sync.push, sync.pull, snapshots.save, snapshots.pull, snapshots.pull_records])
def test_unreachable_storage_raises_a_transient_error(
    call: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filesystem = S3FileSystem(
        access_key="a", secret_key="b", region="us-east-1", scheme="http", endpoint_override="127.0.0.1:9"
    )
    folder = write_file(tmp_path / "x/a.json", "1").parent
    monkeypatch.setattr(sync, "open_storage", lambda: sync.Storage(filesystem, "shared/x", tmp_path))
    with pytest.raises(TransientError, match="Nothing is lost: run the same command again"):
        call(folder)


def test_two_writers_of_one_object_in_a_folder_do_not_share_a_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second writer replaces the object while the first one is in the middle, and nobody reads a mix."""
    (tmp_path / "storage").mkdir()
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv(sync.STORAGE_ENV, f"file://{tmp_path / 'storage'}")
    storage = sync.open_storage()
    assert storage is not None
    write = storage.write

    class Interrupted(BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() == 0:
                write(b"second, longer", "out/batch-1")
            return super().read(size)

    events = record_syncs_and_renames(monkeypatch)
    assert storage.write_stream(Interrupted(b"first"), "out/batch-1") == 5
    assert storage.read("out/batch-1") == b"first"
    assert [path.name for path in (tmp_path / "storage/out").iterdir()] == ["batch-1"]
    synced = [path for kind, path in events if kind == "fsync"]
    assert sum("batch-1" in path for path in synced) == 2, "both contents are on disk before they get their name"
    assert synced.count(str(tmp_path / "storage/out")) == 2


def test_delete_removes_a_folder_from_the_storage(use_machine: UseMachine) -> None:
    sync.push(write_file(use_machine("one") / "work/out/a", "1").parent.parent)
    sync.delete(use_machine("one") / "work")
    sync.delete(use_machine("one") / "absent")
    sync.pull(use_machine("other") / "work")
    assert files_under(use_machine("other")) == {}


def test_pull_by_name_downloads_only_files_of_that_name(use_machine: UseMachine) -> None:
    for name in ("cache/a/about.json", "cache/a/states/part-1", "cache/b/about.json"):
        write_file(use_machine("one") / name, name)
    sync.push(use_machine("one") / "cache")
    sync.pull(use_machine("other") / "cache", names=["about.json"])
    assert set(files_under(use_machine("other"))) == {"cache/a/about.json", "cache/b/about.json"}


@pytest.mark.parametrize("method", ["push", "pull"])
def test_completion_markers_are_transferred_last_and_not_after_a_failure(
    use_machine: UseMachine, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a-part", "manifest.json", "z-part"):
        write_file(use_machine("one") / "set" / name, name)
    if method == "pull":
        sync.push(use_machine("one") / "set")
        use_machine("other")
    transfer_name = {"push": "upload", "pull": "download"}[method]
    transfer, transferred = getattr(sync.Storage, transfer_name), []

    def transfer_or_fail(self: sync.Storage, source: Any, target: Any) -> None:
        name = str(source).rpartition("/")[2]
        if name == "z-part":
            raise OSError("no space left on device")
        transfer(self, source, target)
        transferred.append(name)

    monkeypatch.setattr(sync.Storage, transfer_name, transfer_or_fail)
    home = Path(os.environ["RAYDISTILL_HOME"])
    with pytest.raises(UserError, match=r"no space left.*run the same command again"):
        getattr(sync, method)(home / "set")
    assert transferred == ["a-part"]
    monkeypatch.setattr(sync.Storage, transfer_name, transfer)
    getattr(sync, method)(home / "set")
    sync.pull(use_machine("third") / "set")
    assert set(files_under(use_machine("third") / "set")) == {"a-part", "manifest.json", "z-part"}


def test_paths_outside_the_home_are_not_synced(use_machine: UseMachine, tmp_path: Path) -> None:
    use_machine("one")
    path = write_file(tmp_path / "elsewhere/labels", "mine")
    sync.push(path)
    snapshots.save(path)
    sync.pull(path)
    snapshots.pull(path)
    with snapshots.writer(path):
        assert path.read_text() == "mine"
    other = use_machine("other")
    sync.pull(other / "elsewhere")
    snapshots.pull(other / "elsewhere")
    assert files_under(other) == {}


def test_without_a_storage_nothing_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(sync.STORAGE_ENV, raising=False)
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path))
    for call in (sync.pull, sync.push, sync.delete, snapshots.pull, snapshots.save, snapshots.pull_records):
        call(tmp_path / "x")
    with snapshots.writer(tmp_path / "x"):
        pass
    assert list(tmp_path.iterdir()) == []
    assert sync.ray_storage_options(tmp_path / "x/.ray") == {"storage_path": str(tmp_path / "x/.ray")}


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("s3://KEY:c2VjcmV0@bucket/x", "holds a password"),
        ("ftp://host/x", "cannot be read.*Expected an address such as s3://"),
        ("bucket/x", "cannot be read.*Expected an address"),
        ("file://{tmp_path}/a-file", "is a file; give a folder"),
    ],
)
def test_invalid_storage_address_is_refused(
    address: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a-file").write_text("")
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path))
    monkeypatch.setenv(sync.STORAGE_ENV, address.format(tmp_path=tmp_path))
    with pytest.raises(UserError, match=reason) as error:
        sync.pull(tmp_path / "x")
    assert "c2VjcmV0" not in str(error.value)


@pytest.mark.parametrize("call", [sync.pull, snapshots.pull_records])
def test_object_whose_name_leads_out_of_the_home_is_refused(
    call: Callable[[Path], None], bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    server = bucket.partition("endpoint_override=")[2].partition("&")[0]
    s3 = boto3.client("s3", endpoint_url=f"http://{server}", region_name="us-east-1")
    for key in ("evil/sweeps/../../out", "evil/.snapshots/sweeps/../../../trials/x/1.json"):
        s3.put_object(Bucket="shared", Key=key, Body=b"x")
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv(sync.STORAGE_ENV, bucket % "evil")
    with pytest.raises(UserError, match="is outside"):
        call(tmp_path / "home/sweeps")
    assert not (tmp_path / "out").exists()


def test_ray_state_is_placed_in_the_storage_and_not_pulled(use_machine: UseMachine) -> None:
    from ray.train import RunConfig

    arguments = sync.ray_storage_options(use_machine("one") / "sweeps/s/.ray")
    files: Any = arguments["storage_filesystem"]
    folder = arguments["storage_path"]
    assert RunConfig(name="t", **arguments).storage_filesystem == files
    files.create_dir(folder)
    with files.open_output_stream(f"{folder}/x") as file:
        file.write(b"state")
    sync.pull(use_machine("other") / "sweeps")
    snapshots.pull_records(use_machine("other") / "sweeps")
    assert files_under(use_machine("other")) == {}, "machines do not download Ray's state"
