"""Machines that share a storage, in a folder or in a bucket, but no folder."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from raydistill.cluster import sync
from tests.factories.machines import machine_switch


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
def use_machine(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Path]:
    """Return a function that switches to the machine with a name and returns its home; all share one storage."""
    if request.param == "s3":
        address = request.getfixturevalue("bucket") % tmp_path.name
    else:
        (tmp_path / "storage").mkdir()
        address = f"file://{tmp_path / 'storage'}"
    monkeypatch.setenv(sync.STORAGE_ENV, address)
    return machine_switch(tmp_path, monkeypatch)
