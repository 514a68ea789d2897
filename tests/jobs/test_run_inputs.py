"""The inputs that runs share: decisions about the teacher cache are made once and kept over a restart."""

from pathlib import Path

import pytest

from raydistill.config.run import Dataset, Decoding, ExtraSources, PseudoLabeling, Run, Student
from raydistill.core.errors import UserError
from raydistill.core.files import read_json
from raydistill.jobs import run_inputs
from raydistill.jobs.teacher_cache import cache_group_key, resolve_auto_precision
from raydistill.label_sets.label_set import read_candidates, read_pseudolabel_manifest
from raydistill.teacher_cache import store
from raydistill.training.inputs import EXTRA_SOURCES, extra_labels
from tests.factories.data_files import write_jsonl
from tests.factories.local_jobs import local_jobs
from tests.factories.models import sentences
from tests.factories.teacher_cache import cached_run
from tests.factories.workspace import make_world


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with a tiny teacher and a corpus, and a home in which jobs run in this process."""
    root = tmp_path_factory.mktemp("workspace")
    make_world(root)
    with local_jobs(root / "home"):
        yield root


def test_cache_mode_of_an_interrupted_build_is_kept_by_the_next_command(workspace, tmp_path, monkeypatch):
    """Caching pays for 1,000 epochs and never for one: the second command must keep the decision of the first."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_inputs, "build_teacher_cache", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_inputs.prepare_run_inputs(cached_run(workspace, "sft", epochs=1000), "cpu", tmp_path)
    run = cached_run(workspace, "sft", epochs=1)
    decided = read_json(tmp_path / "cache.json")["groups"][cache_group_key(run)]
    inputs = run_inputs.prepare_run_inputs(run, "cpu", tmp_path)
    assert inputs.cache_mode == "encoder"
    built = read_json(tmp_path / "cache.json")["groups"][cache_group_key(run)]
    sizes = {"bytes": built.pop("bytes"), "device_seconds": built.pop("device_seconds")}
    assert built.items() <= decided.items()
    [info] = store.list_stores(inputs.cache_root)
    assert (info.arrays, info.size_bytes) == (["states"], sizes["bytes"])
    assert sizes["device_seconds"].keys() == {f"{info.folder.name}/states"}
    assert inputs.store_folders == (info.folder,)


def test_compute_dtype_of_auto_precision_is_asked_of_a_worker_once(workspace, tmp_path, monkeypatch):
    calls, record_path = [], tmp_path / "cache.json"
    monkeypatch.setattr(
        run_inputs, "run_exclusive", lambda function, device: calls.append((function, device)) or "bf16"
    )
    run = cached_run(workspace, "sft", precision="auto")
    assert run_inputs._resolve_compute_dtype([cached_run(workspace, "sft")], "cuda", record_path) is None
    for _ in range(2):
        assert run_inputs._resolve_compute_dtype([run], "cuda", record_path) == "bf16"
    assert calls == [(resolve_auto_precision, "cuda")]


def test_cache_record_of_another_schema_version_is_refused(workspace, tmp_path):
    (tmp_path / "cache.json").write_text('{"groups": {}}')
    with pytest.raises(UserError, match=r"cache\.json: schema version 1"):
        run_inputs.prepare_run_inputs(cached_run(workspace, "sft", epochs=1), "cpu", tmp_path)


def test_extra_sources_are_labelled_once_and_shared_by_runs_of_other_numbers_of_rows(workspace):
    """Three runs on 4 of 6, all and none of the extra rows: one label set of 6 rows, and two thirds of its hours."""
    path = write_jsonl(
        workspace / "more.jsonl", [{"source": f"Extra text {i} {text}"} for i, text in enumerate(sentences(6, seed=7))]
    )
    runs = [
        cached_run(workspace, "kd").model_copy(
            update={"pseudo": PseudoLabeling(extra=ExtraSources(name=str(path)), extra_rows=count)}
        )
        for count in (4, None, 0)
    ]
    extra = run_inputs.ensure_extra_sources(runs)
    folders, hours = run_inputs.make_label_sets(runs, "cpu", extra)
    four, everything, none = (folders[run.label_key] for run in runs)
    assert four == everything
    assert none == {"pseudo": four["pseudo"], EXTRA_SOURCES: str(extra)}
    extra_set = Path(four[extra_labels("pseudo")])
    manifest = read_pseudolabel_manifest(extra_set)
    assert (manifest.rows, manifest.data.name) == (6, f"{extra}/more.parquet")
    assert [row_id for row_id, _ in read_candidates(extra_set)] == [f"extra:{i}" for i in range(6)]
    assert hours[runs[1].label_key][extra_set.name] == manifest.device_hours > 0
    assert hours[runs[0].label_key][extra_set.name] == pytest.approx(manifest.device_hours * 4 / 6)
    assert extra_set.name not in hours[runs[2].label_key]
    described = run_inputs.describe_label_sets(runs, folders)
    assert described[extra_set.name].rows == 6
    assert run_inputs.describe_extra_sources(extra).rows == 6
    assert run_inputs.ensure_extra_sources(runs[2:]) is None


def test_label_job_of_another_teacher_has_its_own_prefix_and_decoding():
    run = Run(
        name="r",
        teacher="t5",
        dataset=Dataset(name="cnn_dailymail", source_prefix="headline: "),
        decoding=Decoding(beams=2),
        student=Student(size="6-3"),
    )
    own, other = run_inputs.label_job(run), run_inputs.label_job(run, "bart")
    assert (own.teacher, own.dataset, own.decoding) == ("t5", run.dataset, run.decoding)
    assert (other.teacher, other.dataset, other.decoding) == ("bart", Dataset(name="cnn_dailymail"), Decoding())
