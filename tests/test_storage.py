"""The storage of machines that share no folder: two homes and what goes between them, over a folder and over S3."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import S3FileSystem

from raydistill.cluster import sync
from raydistill.core.errors import PassingError, UserError

At = Callable[[str], Path]


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket of moto's S3 server, as an address for pyarrow."""
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
def at(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> At:
    """Be on the machine of a name: its home is returned, and the storage is the same for all."""
    if request.param == "s3":
        address = request.getfixturevalue("bucket") % tmp_path.name
    else:
        (tmp_path / "storage").mkdir()
        address = f"file://{tmp_path / 'storage'}"
    monkeypatch.setenv(sync.STORAGE, address)

    def here(name: str) -> Path:
        place = tmp_path / name
        place.mkdir(exist_ok=True)
        monkeypatch.setenv("RAYDISTILL_HOME", str(place))
        return place

    return here


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def files_under(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_what_one_machine_keeps_another_fetches(at: At) -> None:
    one = at("one")
    write(one / "sweeps/s/trials/t/metrics.jsonl", "a\n")
    write(one / "sweeps/s/trials/t/best/model.safetensors", "weights")
    write(one / "sweeps/s/trials/t/.lock", "")
    write(one / "sweeps/s/.ray/state", "Ray's own")
    sync.keep(one / "sweeps/s/trials/t")
    other = at("other")
    sync.fetch(other / "sweeps/s")
    assert files_under(other) == {
        "sweeps/s/trials/t/metrics.jsonl": "a\n",
        "sweeps/s/trials/t/best/model.safetensors": "weights",
    }


def test_a_file_that_changed_goes_over_and_one_that_did_not_stays_where_it_is(at: At) -> None:
    write(at("one") / "x/a.json", "1")
    write(at("one") / "x/b.json", "1")
    sync.keep(at("one") / "x")
    sync.fetch(at("other") / "x")
    before = (at("other") / "x/b.json").stat()
    time.sleep(1.1)  # S3 tells times in whole seconds
    write(at("one") / "x/a.json", "2")
    sync.keep(at("one") / "x")
    sync.fetch(at("other") / "x")
    assert files_under(at("other") / "x") == {"a.json": "2", "b.json": "1"}
    assert (at("other") / "x/b.json").stat().st_ino == before.st_ino


def test_what_was_written_here_since_is_not_overwritten_by_what_is_older(at: At) -> None:
    path = write(at("one") / "metrics.jsonl", "a\n")
    sync.keep(path)
    time.sleep(1.1)
    write(path, "a\nb\n")
    sync.fetch(path)
    assert path.read_text() == "a\nb\n"


def test_what_another_machine_kept_since_is_not_overwritten_by_what_was_fetched_before(at: At) -> None:
    """As by a driver that launches a trial again, whose worker had gone on elsewhere."""
    sync.keep(write(at("one") / "t/state.json", "100"))
    other = at("other") / "t"
    sync.fetch(other)
    time.sleep(2.1)  # S3 tells times in whole seconds, and clocks may differ by one
    sync.keep(write(at("one") / "t/state.json", "200"))
    at("other")
    write(other / "run.json", "{}")
    sync.keep(other)
    sync.fetch(at("third") / "t")
    assert files_under(at("third") / "t") == {"state.json": "200", "run.json": "{}"}


def test_a_copy_that_carries_an_old_time_goes_over(at: At) -> None:
    """As a teacher that `rsync -a` or `tar` put in the place of one that was kept later than this one was made."""
    path = write(at("one") / "teacher/config.json", "monday")
    sync.keep(path)
    time.sleep(1.1)
    write(path, "tuesday, longer")
    os.utime(path, (1e9, 1e9))
    sync.keep(path)
    sync.fetch(at("other") / "teacher")
    assert files_under(at("other") / "teacher") == {"config.json": "tuesday, longer"}


@pytest.mark.parametrize("way", ["keep", "fetch"])
def test_a_storage_that_does_not_answer_any_more_is_said_in_one_line(way: str, tmp_path: Path) -> None:
    nobody = S3FileSystem(
        access_key="a", secret_key="b", region="us-east-1", scheme="http", endpoint_override="127.0.0.1:9"
    )
    place = write(tmp_path / "x/a.json", "1").parent
    with pytest.raises(PassingError, match="Nothing is lost: run the same command again"):
        getattr(sync.Storage(nobody, "shared/x", tmp_path), way)(place)


def test_a_mirror_drops_what_made_way(at: At) -> None:
    folder = at("one") / "run"
    write(folder / "checkpoint-1/model", "old")
    sync.keep(folder, mirror=True)
    (folder / "checkpoint-1/model").unlink()
    write(folder / "checkpoint-2/model", "new")
    sync.keep(folder, mirror=True)
    sync.fetch(at("other") / "run")
    assert files_under(at("other") / "run") == {"checkpoint-2/model": "new"}
    sync.drop(at("other") / "run")
    sync.fetch(at("third") / "run")
    assert files_under(at("third")) == {}


def test_only_files_of_some_names_are_fetched_where_these_are_asked_for(at: At) -> None:
    for name in ("trials/a/metrics.jsonl", "trials/a/best/model", "trials/b/metrics.jsonl"):
        write(at("one") / name, name)
    sync.keep(at("one") / "trials")
    sync.fetch(at("other") / "trials", names=["metrics.jsonl"])
    assert set(files_under(at("other"))) == {"trials/a/metrics.jsonl", "trials/b/metrics.jsonl"}


@pytest.mark.parametrize("way", ["keep", "fetch"])
def test_what_says_finished_goes_last_and_not_at_all_where_something_failed(
    at: At, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a-part", "manifest.json", "z-part"):
        write(at("one") / "set" / name, name)
    if way == "fetch":
        sync.keep(at("one") / "set")
        at("other")
    method = {"keep": "_put", "fetch": "_bring"}[way]
    real, done = getattr(sync.Storage, method), []

    def breaks(self: sync.Storage, path: Path, info: object) -> None:
        if path.name == "z-part":
            raise OSError("no space left on device")
        real(self, path, info)
        done.append(path.name)

    monkeypatch.setattr(sync.Storage, method, breaks)
    home = Path(os.environ["RAYDISTILL_HOME"])
    with pytest.raises(UserError, match=r"no space left.*run the same command again"):
        getattr(sync, way)(home / "set")
    assert done == ["a-part"]
    monkeypatch.setattr(sync.Storage, method, real)
    getattr(sync, way)(home / "set")
    sync.fetch(at("third") / "set")
    assert set(files_under(at("third") / "set")) == {"a-part", "manifest.json", "z-part"}


def test_places_outside_the_home_are_each_machines_own(at: At, tmp_path: Path) -> None:
    at("one")
    path = write(tmp_path / "elsewhere/labels", "mine")
    sync.keep(path)
    sync.fetch(path)
    assert path.read_text() == "mine"
    sync.fetch(at("other"))
    assert files_under(at("other")) == {}


def test_without_a_storage_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(sync.STORAGE, raising=False)
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path))
    sync.fetch(tmp_path / "x")
    sync.keep(tmp_path / "x")
    sync.drop(tmp_path / "x")
    assert sync.for_ray(tmp_path / "x/.ray") == {"storage_path": str(tmp_path / "x/.ray")}


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("s3://KEY:c2VjcmV0@bucket/x", "holds a password"),
        ("ftp://host/x", "cannot be read.*Expected an address such as s3://"),
        ("bucket/x", "cannot be read.*Expected an address"),
        ("file://{tmp_path}/a-file", "is a file; give a folder"),
    ],
)
def test_an_address_that_will_not_do_is_refused(
    address: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a-file").write_text("")
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path))
    monkeypatch.setenv(sync.STORAGE, address.format(tmp_path=tmp_path))
    with pytest.raises(UserError, match=reason) as caught:
        sync.fetch(tmp_path / "x")
    assert "c2VjcmV0" not in str(caught.value)


def test_an_object_whose_name_leads_out_of_the_home_is_refused(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    server = bucket.partition("endpoint_override=")[2].partition("&")[0]
    s3 = boto3.client("s3", endpoint_url=f"http://{server}", region_name="us-east-1")
    s3.put_object(Bucket="shared", Key="evil/sweeps/../../out", Body=b"x")
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv(sync.STORAGE, bucket % "evil")
    with pytest.raises(UserError, match="leads out of"):
        sync.fetch(tmp_path / "home/sweeps")
    assert not (tmp_path / "out").exists()


def test_ray_keeps_its_own_state_there_too(at: At) -> None:
    from ray.train import RunConfig

    arguments = sync.for_ray(at("one") / "sweeps/s/.ray")
    files: Any = arguments["storage_filesystem"]
    place = arguments["storage_path"]
    assert RunConfig(name="t", **arguments).storage_filesystem == files
    files.create_dir(place)
    with files.open_output_stream(f"{place}/x") as file:
        file.write(b"state")
    sync.fetch(at("other") / "sweeps")
    assert files_under(at("other")) == {}, "Ray's state is not fetched by machines"
