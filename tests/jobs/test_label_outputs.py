"""Outputs of batches: truncated files are deleted, engines are not mixed, and the actors' counts are added up."""

import json

import pyarrow.parquet as pq
import pytest

from raydistill.config.run import Dataset
from raydistill.core import artifact
from raydistill.core.artifact import LockHeld
from raydistill.core.errors import UserError
from raydistill.data.corpus import Row
from raydistill.data.streaming import scan_split, usable_rows
from raydistill.evaluation import metrics
from raydistill.evaluation.metrics import ScoreAccumulator, score
from raydistill.jobs import label_outputs
from raydistill.jobs.label_outputs import (
    EngineRecord,
    LabelStats,
    batch_output_path,
    check_same_engine,
    count_batch,
    engine_path,
    is_batch_complete,
    merge_outputs,
    write_batch_output,
)
from raydistill.label_sets.batch_plan import make_plan
from raydistill.label_sets.label_set import read_candidates, read_label_set, read_pseudolabel_manifest
from raydistill.label_sets.manifest import DataRecord, LabelDescription, TeacherRecord

WORDS = ["a", "dog", "runs", "over", "the", "green", "field", "while", "two", "men", "look", "at", "him"]
ENGINE = EngineRecord(engine="ctranslate2 fp32", fallback_reason="")
DESCRIPTION = LabelDescription(
    teacher=TeacherRecord(name="t", fingerprint="f"),
    data=DataRecord(name="d", split="train", fingerprint="f", skipped=0, dataset={}),
    decoding={},
    n_best=2,
)


def candidates_of(row_id):
    """Two candidates of a row, and their scores."""
    number = int(row_id[1:])
    return ["" if number == 7 else " ".join(WORDS[number % 5 :]), f"other {number}"], [-number / 7, -number / 3]


@pytest.fixture
def labelled_job(tmp_path):
    """A plan over 25 rows in three windows and ten batches, and the outputs of all batches, written in any order."""
    rows = [Row(("f", i), f"r{i}", "x" * (1 + 7 * i % 11), " ".join(WORDS[: 3 + i % 9])) for i in range(25)]
    plan = make_plan(iter(rows), tmp_path / "plan", window_rows=10, batch_rows=3)
    assert (len(plan), plan.num_windows) == (10, 3)
    check_same_engine(tmp_path, ENGINE)
    (tmp_path / "out").mkdir()
    for number in reversed(range(len(plan))):
        write_output(plan, tmp_path, number)
    return plan, rows


def write_output(plan, work_dir, number, engine=ENGINE.engine, ids=None, metric="rouge2"):
    """Write the output of a batch as an actor does."""
    batch = plan.read_batch(number)
    targets, scores = zip(*map(candidates_of, batch["ids"]), strict=True)
    labels = [texts[0] for texts in targets]
    counts = count_batch(labels, batch, metric, engine=engine, device_seconds=0.25)
    columns = {"id": ids or batch["ids"], "targets": list(targets), "scores": list(scores)}
    write_batch_output(work_dir, number, columns, counts)


def merge(plan, work_dir, metric="rouge2", labelled=True):
    """Merge the outputs, and return the candidates by id and the manifest."""
    folder = work_dir / "set"
    merge_outputs(plan, work_dir, folder, DESCRIPTION, LabelStats(metric, labelled), allow_repetitive=False)
    return list(read_candidates(folder)), read_pseudolabel_manifest(folder)


@pytest.mark.parametrize("metric", ["rouge2", "bleu"])
def test_the_driver_merges_labels_that_the_actors_scored(metric, labelled_job, tmp_path, monkeypatch):
    plan, rows = labelled_job
    for number in range(len(plan)):
        write_output(plan, tmp_path, number, metric=metric)
    labels, originals = [candidates_of(row.id)[0][0] for row in rows], [row.target for row in rows]
    expected = score(metric, labels, originals).metrics

    def fail(*_):
        raise AssertionError("the driver scores a row")

    for name in ("bleu_rows", "rouge_rows"):
        monkeypatch.setattr(metrics, name, fail)
    monkeypatch.setattr(ScoreAccumulator, "add", fail)
    candidates, manifest = merge(plan, tmp_path, metric)
    assert [(row_id, [tuple(c) for c in ranked]) for row_id, ranked in candidates] == [
        (row.id, list(zip(*candidates_of(row.id), strict=True))) for row in rows
    ]
    assert manifest.quality == pytest.approx(expected, rel=1e-12)
    assert (manifest.rows, manifest.empty, manifest.metric, manifest.engine) == (25, 1, metric, ENGINE.engine)
    assert manifest.target_words_mean == sum(len(text.split()) for text in labels) / 25
    assert manifest.original_words_mean == sum(len(text.split()) for text in originals) / 25
    assert manifest.device_hours == pytest.approx(10 * 0.25 / 3600)
    assert sum(manifest.hosts.values()) == 25


def test_each_file_is_read_once_by_the_merge(labelled_job, tmp_path, monkeypatch):
    plan, _ = labelled_job
    read_table, paths = pq.read_table, []

    def count(path, *args, **options):
        paths.append(path.name)
        return read_table(path, *args, **options)

    monkeypatch.setattr(pq, "read_table", count)
    merge_outputs(plan, tmp_path, tmp_path / "set", DESCRIPTION, LabelStats("rouge2", True), allow_repetitive=False)
    assert len(paths) == len(set(paths)) == len(plan) + plan.num_windows


def test_batches_that_an_earlier_command_scored_with_another_metric_are_scored_again(labelled_job, tmp_path):
    plan, rows = labelled_job
    for number in (1, 4, 9):
        write_output(plan, tmp_path, number, metric="bleu")
    labels, originals = [candidates_of(row.id)[0][0] for row in rows], [row.target for row in rows]
    _, manifest = merge(plan, tmp_path, "rouge2")
    assert manifest.quality == pytest.approx(score("rouge2", labels, originals).metrics, rel=1e-12)
    assert (manifest.rows, manifest.empty, sum(manifest.hosts.values())) == (25, 1, 25)
    assert manifest.device_hours == pytest.approx(10 * 0.25 / 3600)


def test_a_users_metric_reads_the_sources_in_the_actors_and_when_batches_are_scored_again(
    labelled_job, tmp_path, monkeypatch
):
    plan, rows = labelled_job
    module = (
        "def share(rows):\n    return [[len(row.source), len(row.prediction) + len(row.reference)] for row in rows]\n"
    )
    (tmp_path / "label_share.py").write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path))
    for number in range(0, len(plan), 2):
        write_output(plan, tmp_path, number, metric="label_share:share")
    _, manifest = merge(plan, tmp_path, "label_share:share")
    labels = [candidates_of(row.id)[0][0] for row in rows]
    lengths = sum(len(label) + len(row.target) for label, row in zip(labels, rows, strict=True))
    ratio = sum(len(row.source) for row in rows) / lengths
    assert manifest.quality == {"label_share:share": pytest.approx(ratio, rel=1e-12)}


def test_data_without_targets_have_no_scores(labelled_job, tmp_path):
    plan, _ = labelled_job
    for number in range(len(plan)):
        write_output(plan, tmp_path, number, metric=None)
    _, manifest = merge(plan, tmp_path, labelled=False)
    assert manifest.quality is None
    assert manifest.original_words_mean is None
    assert manifest.rows == 25


def test_outputs_that_do_not_hold_each_row_once_are_refused(labelled_job, tmp_path):
    plan, _ = labelled_job
    ids = plan.read_batch(1)["ids"]
    write_output(plan, tmp_path, 1, ids=[ids[0], ids[0], ids[2]])
    with pytest.raises(UserError, match="the outputs do not match the batch plan"):
        merge(plan, tmp_path)
    write_output(plan, tmp_path, 1, engine="transformers fp32")
    with pytest.raises(UserError, match="two engines wrote the outputs"):
        merge(plan, tmp_path)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("fault", ["no counts", "wrong count", "no candidate", "lists"])
def test_damaged_output_is_reported_with_the_file_to_delete(fault, labelled_job, tmp_path):
    plan, _ = labelled_job
    path = batch_output_path(tmp_path, 4)
    table = pq.read_table(path)
    [(key, counts)] = table.schema.metadata.items()
    columns = table.to_pydict()
    if fault == "no candidate":
        columns["targets"][0], columns["scores"][0] = [], []
    if fault == "lists":
        columns["scores"][1] = columns["scores"][1][:1]
    if fault == "wrong count":
        counts = json.dumps({**json.loads(counts), "rows": 9})
    damaged = type(table).from_pydict(columns, schema=table.schema.remove_metadata())
    pq.write_table(damaged if fault == "no counts" else damaged.replace_schema_metadata({key: counts}), path)
    with pytest.raises(UserError, match=f"{path}: damaged: .* Delete {path} to have this batch labelled again"):
        merge(plan, tmp_path)


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
    batch = {"sources": ["s"] * 4, "targets": ["t"] * 4}
    counts = count_batch(labels, batch, "rouge2", engine="ctranslate2 fp32", device_seconds=1.0)
    write_batch_output(work_dir, 0, columns, counts)
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
