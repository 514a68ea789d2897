"""Outputs of batches: truncated files are deleted, and engines are not mixed."""

import json

import pytest

from raydistill.config.run import Dataset
from raydistill.core import artifact
from raydistill.core.artifact import LockHeld
from raydistill.core.errors import UserError
from raydistill.data.streaming import scan_split, usable_rows
from raydistill.jobs import label_outputs
from raydistill.jobs.label_outputs import (
    EngineRecord,
    LabelStats,
    batch_output_path,
    check_same_engine,
    engine_path,
    is_batch_complete,
    merge_outputs,
    write_batch_output,
)
from raydistill.label_sets.batch_plan import make_plan
from raydistill.label_sets.label_set import read_label_set
from raydistill.label_sets.manifest import DataRecord, LabelDescription, TeacherRecord


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


def test_labels_of_which_most_repeat_themselves_are_refused_and_merged_once_they_are_allowed(tmp_path, capsys):
    """The outputs of the batches remain, so that no text is generated again."""
    rows = [{"id": f"r{i}", "source": f"s {i}", "target": "t"} for i in range(4)]
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = Dataset(name=str(tmp_path / "train.jsonl"))
    scan = scan_split(data, "train")
    work_dir, folder = tmp_path / "work", tmp_path / "labels"
    plan = make_plan(usable_rows(data, "train", scan), work_dir / "plan")
    check_same_engine(work_dir, EngineRecord(engine="ctranslate2 fp32", fallback_reason=""))
    labels = ["no no no no no", "a fine label", "so so so so", "it is it is it is it is"]
    columns = {"id": [f"r{i}" for i in range(4)], "targets": [[text] for text in labels], "scores": [[0.0]] * 4}
    write_batch_output(work_dir, 0, columns, "ctranslate2 fp32", 1.0)
    description = LabelDescription(
        teacher=TeacherRecord(name="my-teacher", path="t", fingerprint="f", settings="s"),
        data=DataRecord(name="d", split="train", fingerprint=scan.fingerprint, skipped=0, dataset={}),
        decoding={"beams": 1},
        n_best=1,
    )
    with pytest.raises(UserError, match=r"75% of the outputs of the teacher my-teacher repeat .* --allow-repetitive"):
        merge_outputs(plan, work_dir, folder, description, LabelStats("rouge2", True), allow_repetitive=False)
    assert not folder.exists()
    assert is_batch_complete(batch_output_path(work_dir, 0))
    merge_outputs(plan, work_dir, folder, description, LabelStats("rouge2", True), allow_repetitive=True)
    assert list(read_label_set(folder).targets.values()) == labels
    assert "warning: 75% of the outputs of teacher my-teacher repeat themselves" in capsys.readouterr().err
