"""Synchronisation of machines that share no folder, through a storage in a folder and in S3."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import S3FileSystem

from raydistill.cluster import sync
from raydistill.core.errors import TransientError, UserError

UseMachine = Callable[[str], Path]


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket of moto's S3 server: the pattern of its address for pyarrow, with %s for the folder."""
    boto3 = pytest.importorskip("boto3")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=f"http://{host}:{port}", **keys).create_bucket(Bucket="shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        yield f"s3://shared/%s?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    server.stop()


@pytest.fixture(params=["folder", "s3"])
def use_machine(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> UseMachine:
    """Return a function that switches to the machine with a name and returns its home; all share one storage."""
    if request.param == "s3":
        address = request.getfixturevalue("bucket") % tmp_path.name
    else:
        (tmp_path / "storage").mkdir()
        address = f"file://{tmp_path / 'storage'}"
    monkeypatch.setenv(sync.STORAGE_ENV, address)

    def switch(name: str) -> Path:
        home = tmp_path / name
        home.mkdir(exist_ok=True)
        monkeypatch.setenv("RAYDISTILL_HOME", str(home))
        return home

    return switch


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def files_under(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_pull_downloads_what_another_machine_pushed_without_local_files(use_machine: UseMachine) -> None:
    home = use_machine("one")
    write(home / "sweeps/s/trials/t/metrics.jsonl", "a\n")
    write(home / "sweeps/s/trials/t/best/model.safetensors", "weights")
    write(home / "sweeps/s/trials/t/.lock", "")
    write(home / "sweeps/s/.ray/state", "Ray's own")
    sync.push(home / "sweeps/s/trials/t")
    other = use_machine("other")
    sync.pull(other / "sweeps/s")
    assert files_under(other) == {
        "sweeps/s/trials/t/metrics.jsonl": "a\n",
        "sweeps/s/trials/t/best/model.safetensors": "weights",
    }


def test_only_changed_files_are_transferred(use_machine: UseMachine) -> None:
    write(use_machine("one") / "x/a.json", "1")
    write(use_machine("one") / "x/b.json", "1")
    sync.push(use_machine("one") / "x")
    sync.pull(use_machine("other") / "x")
    before = (use_machine("other") / "x/b.json").stat()
    time.sleep(1.1)  # S3 stores times in whole seconds
    write(use_machine("one") / "x/a.json", "2")
    sync.push(use_machine("one") / "x")
    sync.pull(use_machine("other") / "x")
    assert files_under(use_machine("other") / "x") == {"a.json": "2", "b.json": "1"}
    assert (use_machine("other") / "x/b.json").stat().st_ino == before.st_ino


def test_pull_does_not_overwrite_a_newer_local_file(use_machine: UseMachine) -> None:
    path = write(use_machine("one") / "metrics.jsonl", "a\n")
    sync.push(path)
    time.sleep(1.1)
    write(path, "a\nb\n")
    sync.pull(path)
    assert path.read_text() == "a\nb\n"


def test_push_does_not_overwrite_a_file_that_another_machine_pushed_later(use_machine: UseMachine) -> None:
    """As by a driver that restarts a trial whose worker has continued on another machine."""
    sync.push(write(use_machine("one") / "t/state.json", "100"))
    other = use_machine("other") / "t"
    sync.pull(other)
    time.sleep(2.1)  # S3 stores times in whole seconds, and clocks may differ by one second
    sync.push(write(use_machine("one") / "t/state.json", "200"))
    use_machine("other")
    write(other / "run.json", "{}")
    sync.push(other)
    sync.pull(use_machine("third") / "t")
    assert files_under(use_machine("third") / "t") == {"state.json": "200", "run.json": "{}"}


def test_push_uploads_a_new_file_with_an_old_modification_time(use_machine: UseMachine) -> None:
    """As after `rsync -a` or `tar` replaced a teacher that had been pushed after the new one was created."""
    path = write(use_machine("one") / "teacher/config.json", "monday")
    sync.push(path)
    time.sleep(1.1)
    write(path, "tuesday, longer")
    os.utime(path, (1e9, 1e9))
    sync.push(path)
    sync.pull(use_machine("other") / "teacher")
    assert files_under(use_machine("other") / "teacher") == {"config.json": "tuesday, longer"}


@pytest.mark.parametrize("method", ["push", "pull"])
def test_unreachable_storage_raises_a_transient_error(method: str, tmp_path: Path) -> None:
    filesystem = S3FileSystem(
        access_key="a", secret_key="b", region="us-east-1", scheme="http", endpoint_override="127.0.0.1:9"
    )
    folder = write(tmp_path / "x/a.json", "1").parent
    with pytest.raises(TransientError, match="Nothing is lost: run the same command again"):
        getattr(sync.Storage(filesystem, "shared/x", tmp_path), method)(folder)


def test_mirror_deletes_files_that_were_replaced(use_machine: UseMachine) -> None:
    folder = use_machine("one") / "run"
    write(folder / "checkpoint-1/model", "old")
    sync.push(folder, mirror=True)
    (folder / "checkpoint-1/model").unlink()
    write(folder / "checkpoint-2/model", "new")
    sync.push(folder, mirror=True)
    sync.pull(use_machine("other") / "run")
    assert files_under(use_machine("other") / "run") == {"checkpoint-2/model": "new"}
    sync.delete(use_machine("other") / "run")
    sync.pull(use_machine("third") / "run")
    assert files_under(use_machine("third")) == {}


def test_pull_with_patterns_downloads_only_matching_files(use_machine: UseMachine) -> None:
    for name in ("trials/a/metrics.jsonl", "trials/a/best/model", "trials/b/metrics.jsonl"):
        write(use_machine("one") / name, name)
    sync.push(use_machine("one") / "trials")
    sync.pull(use_machine("other") / "trials", patterns=["metrics.jsonl"])
    assert set(files_under(use_machine("other"))) == {"trials/a/metrics.jsonl", "trials/b/metrics.jsonl"}


@pytest.mark.parametrize("method", ["push", "pull"])
def test_completion_markers_are_transferred_last_and_not_after_a_failure(
    use_machine: UseMachine, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a-part", "manifest.json", "z-part"):
        write(use_machine("one") / "set" / name, name)
    if method == "pull":
        sync.push(use_machine("one") / "set")
        use_machine("other")
    transfer_name = {"push": "_upload", "pull": "_download"}[method]
    transfer, transferred = getattr(sync.Storage, transfer_name), []

    def transfer_or_fail(self: sync.Storage, path: Path, info: object) -> None:
        if path.name == "z-part":
            raise OSError("no space left on device")
        transfer(self, path, info)
        transferred.append(path.name)

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
    path = write(tmp_path / "elsewhere/labels", "mine")
    sync.push(path)
    sync.pull(path)
    assert path.read_text() == "mine"
    sync.pull(use_machine("other"))
    assert files_under(use_machine("other")) == {}


def test_without_a_storage_nothing_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(sync.STORAGE_ENV, raising=False)
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path))
    sync.pull(tmp_path / "x")
    sync.push(tmp_path / "x")
    sync.delete(tmp_path / "x")
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


def test_object_whose_name_leads_out_of_the_home_is_refused(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    server = bucket.partition("endpoint_override=")[2].partition("&")[0]
    s3 = boto3.client("s3", endpoint_url=f"http://{server}", region_name="us-east-1")
    s3.put_object(Bucket="shared", Key="evil/sweeps/../../out", Body=b"x")
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv(sync.STORAGE_ENV, bucket % "evil")
    with pytest.raises(UserError, match="is outside"):
        sync.pull(tmp_path / "home/sweeps")
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
    assert files_under(use_machine("other")) == {}, "machines do not download Ray's state"
