"""Outputs of batches: truncated files are deleted, and engines are not mixed."""

import pytest

from raydistill.core import artifact
from raydistill.core.artifact import LockHeld
from raydistill.core.errors import UserError
from raydistill.jobs import label_outputs
from raydistill.jobs.label_outputs import EngineRecord, check_same_engine, engine_path, is_batch_complete


def test_io_error_deletes_no_batch(tmp_path, monkeypatch):
    """A truncated file is deleted and written again; an I/O error says nothing about the file."""
    path = tmp_path / "batch.parquet"
    path.write_bytes(b"PAR1 truncated")
    monkeypatch.setattr("pyarrow.parquet.read_metadata", lambda _: (_ for _ in ()).throw(OSError(5, "I/O error")))
    with pytest.raises(OSError, match="I/O error"):
        is_batch_complete(path)
    assert path.is_file()
    monkeypatch.undo()
    assert not is_batch_complete(path)
    assert not path.exists()


def test_a_lock_of_the_engine_that_is_not_released_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(label_outputs, "LOCK_TIMEOUT_S", 0.1)
    with artifact.lock(engine_path(tmp_path)), pytest.raises(LockHeld, match=r"engine\.json: in use by process"):
        check_same_engine(tmp_path, EngineRecord(engine="ctranslate2 fp32", fallback_reason=""))


def test_outputs_of_two_engines_are_not_mixed(tmp_path):
    first = EngineRecord(engine="ctranslate2 fp32", fallback_reason="")
    check_same_engine(tmp_path, first)
    check_same_engine(tmp_path, first)
    with pytest.raises(UserError, match="written by ctranslate2 fp32, and this machine opens transformers fp32"):
        check_same_engine(tmp_path, EngineRecord(engine="transformers fp32", fallback_reason="no ctranslate2"))
    assert EngineRecord.read(engine_path(tmp_path)) == first
