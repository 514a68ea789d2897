"""Atomic writes, validated reads, schema versions, and paths that must stay in a folder."""

import json

import numpy as np
import pytest

from raydistill.core.errors import UserError
from raydistill.core.files import (
    SCHEMA_VERSION,
    atomic_path,
    check_schema,
    check_symlinks,
    corrupt_file_error,
    path_exists,
    read_json,
    safe_join,
    write_json_atomic,
)
from tests.factories.kills import record_syncs_and_renames


def test_atomic_path_replaces_the_file_at_the_end_of_the_block(tmp_path):
    path = tmp_path / "folder" / "x.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("old")
        assert not path.exists()
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_atomic_path_leaves_nothing_if_the_block_raises(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")

    def fail():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_path_syncs_new_parent_folders_in_their_parents(tmp_path, monkeypatch):
    events = record_syncs_and_renames(monkeypatch)
    with atomic_path(tmp_path / "a" / "b" / "x.txt") as temporary:
        temporary.write_text("text")
    created = [("fsync", str(folder)) for folder in (tmp_path, tmp_path / "a")]
    assert events[:2] == created
    assert events[-1] == ("fsync", str(tmp_path / "a" / "b"))


def test_json_round_trip_of_numpy_values_and_paths(tmp_path):
    write_json_atomic(tmp_path / "x.json", {"a": np.float32(0.5), "b": np.arange(2), "c": tmp_path, "d": "é"})
    assert read_json(tmp_path / "x.json") == {"a": 0.5, "b": [0, 1], "c": str(tmp_path), "d": "é"}


def test_json_is_written_atomically_and_nan_is_rejected(tmp_path):
    path = tmp_path / "x.json"
    write_json_atomic(path, {"a": np.float32(0.5)})
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomic(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 0.5}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_values_that_json_does_not_have_are_not_written(value, tmp_path):
    with pytest.raises((ValueError, TypeError)):
        write_json_atomic(tmp_path / "x.json", {"a": value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "expected a JSON object, got list"),
        ('{"a": 1e999}', "1e999 is not a finite number"),
        ('{"a": NaN}', "NaN is not a finite number"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        ("{", "Expecting property name"),
    ],
)
def test_read_json_error_names_file_reason_and_remedy(content, reason, tmp_path):
    path = tmp_path / "folder" / "x.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: damaged: ")
    assert reason in str(caught.value)
    assert str(caught.value).endswith(f"Delete {path.parent} and run the command again")


def test_missing_file_is_reported_as_missing(tmp_path):
    with pytest.raises(UserError, match=r"x\.json: no such file$"):
        read_json(tmp_path / "x.json")


def test_corrupt_file_error_converts_parse_errors_only(tmp_path):
    with (
        pytest.raises(UserError, match=r"damaged: KeyError 'rows'\. Copy it again"),
        corrupt_file_error(tmp_path, "Copy it again"),
    ):
        json.loads("{}")["rows"]
    with pytest.raises(ImportError), corrupt_file_error(tmp_path):
        raise ImportError


@pytest.mark.parametrize(("record", "version"), [({}, 1), ({"schema": 1}, 1), ({"schema": SCHEMA_VERSION + 1}, 3)])
def test_record_of_another_schema_version_is_rejected_with_a_remedy(record, version, tmp_path):
    path = tmp_path / "sweep.json"
    with pytest.raises(UserError) as caught:
        check_schema(path, record)
    assert str(caught.value) == (
        f"{path}: schema version {version}, but this version of raydistill reads {SCHEMA_VERSION}. "
        f"Move {tmp_path} away or delete it, and run the command again to create it"
    )
    check_schema(path, {"schema": SCHEMA_VERSION})


def test_path_exists_is_false_for_impossible_names(tmp_path):
    assert path_exists(tmp_path)
    assert not path_exists(tmp_path / ("x" * 1000))


@pytest.mark.parametrize("name", ["../out", "/etc/passwd", "a/../../out", "link", "link/x", "a\0b"])
def test_safe_join_rejects_paths_outside_the_folder(tmp_path, name):
    folder = tmp_path / "in"
    (folder / "a").mkdir(parents=True)
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="is outside"):
        safe_join(folder, name)
    assert safe_join(folder, "a/b") == folder / "a" / "b"


def test_check_symlinks_allows_links_within_the_folder(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "x").write_text("x")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "own").write_text("x")
    (tmp_path / "a" / "within").symlink_to("own")
    (tmp_path / "a" / "blob").symlink_to("../blobs/x")
    check_symlinks(tmp_path / "a", tmp_path / "blobs")
    with pytest.raises(UserError, match="blob: symbolic link to a file outside"):
        check_symlinks(tmp_path / "a")
