"""The teacher cache as a Ray job: the states of a build in one process, built once, in the mode that pays."""

import shutil
from dataclasses import replace

import pytest
import torch

from raydistill.jobs import teacher_cache
from raydistill.jobs.pseudolabel import LabelJob, pseudolabel
from raydistill.jobs.teacher_cache import CacheRequest, build_teacher_cache, resolve_auto_precision, resolve_cache_mode
from raydistill.models.loading import load_model
from raydistill.models.teacher import open_teacher
from raydistill.search import prepare
from raydistill.teacher_cache import store
from raydistill.teacher_cache.builder import build_cache
from raydistill.teacher_cache.policy import EpochTimes
from raydistill.training.inputs import RunInputs
from raydistill.training.run import train
from tests.factories.local_jobs import local_jobs
from tests.factories.sweeps import sweep_teacher
from tests.factories.teacher_cache import cached_run
from tests.factories.workspace import make_world

RAY_CPUS = 1


@pytest.fixture(scope="module")
def workspace(ray_here, tmp_path_factory):
    """A folder with a tiny teacher and a corpus, and a Ray cluster."""
    root = tmp_path_factory.mktemp("workspace")
    make_world(root)
    return root


def read_parts(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*.bin")}


def test_job_builds_the_parts_of_a_build_in_one_process_and_only_missing_ones(workspace, tmp_path):
    runs = [cached_run(workspace, method, teacher_cache="full") for method in ("kd", "sft")]
    root = tmp_path / "store"
    job = LabelJob(runs[0].teacher, runs[0].dataset, decoding=runs[0].decoding, allow_repetitive=True)
    with local_jobs(tmp_path):
        labels = pseudolabel(job, tmp_path / "labels", verbose=False)
        build_teacher_cache(CacheRequest(runs[1:], {}, root, "cpu"), "full")  # encoder states only
    assert len(list((tmp_path / "labels").glob("*/manifest.json"))) == 1
    encoder_parts = read_parts(root)
    assert {path.parent.name for path in encoder_parts} == {"states"}
    assert [path.parent.name for path in root.rglob("manifest.json")] == ["states"]

    request = CacheRequest(runs, {"pseudo": {"pseudo": str(labels)}}, root, "cpu")
    stats = build_teacher_cache(request, "full")
    layout = request.make_layout("full")
    assert not layout.is_incomplete()
    assert stats.bytes == sum(len(content) for content in read_parts(root).values())
    assert encoder_parts.items() <= read_parts(root).items()
    assert sum(stats.device_seconds.values()) > 0
    seconds = {f"{array.parent.name}/{array.name}": store.read_device_seconds(array) for array in layout.array_sizes}
    assert stats.device_seconds == seconds

    local_layout = CacheRequest(runs, request.labels, tmp_path / "local", "cpu").make_layout("full")
    build_cache(local_layout, load_model(workspace / "teacher"))
    assert read_parts(root) == read_parts(tmp_path / "local")

    before = {p: p.stat().st_mtime_ns for p in root.rglob("*.bin")}
    assert build_teacher_cache(request, "full") == stats
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*.bin")} == before


def test_bf16_teacher_has_the_same_key_in_job_run_and_sweep(workspace, tmp_path):
    checkpoint = tmp_path / "teacher"
    shutil.copytree(workspace / "teacher", checkpoint)
    load_model(checkpoint, torch.bfloat16).save_pretrained(checkpoint)
    run = cached_run(workspace, "sft", teacher_cache="full").model_copy(update={"teacher": str(checkpoint)})
    layout = CacheRequest([run], {}, tmp_path / "cache", "cpu").make_layout("full")
    build_cache(layout, load_model(checkpoint))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.bin")}
    train(run, tmp_path / "run", lambda metrics, folder: None, RunInputs(cache_root=tmp_path / "cache"))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.bin")} == before
    teacher = open_teacher(str(checkpoint), run.dataset)
    prepare.check_unchanged(run, sweep_teacher(key=teacher.key, data={}), tmp_path)


def test_compute_dtype_of_workers_decides_the_store_on_a_machine_without_a_gpu(workspace, tmp_path):
    run = cached_run(workspace, "sft", precision="auto")
    assert resolve_auto_precision("cpu", 1) in ("bf16", "fp32")
    # This machine has no GPU; asking torch for its compute dtype would fail.
    assert CacheRequest([run], {}, tmp_path, "cuda", "bf16").make_layout("full").dtypes.compute == "bf16"
    for dtype in ("bf16", "fp32"):
        inputs = RunInputs(cache_root=tmp_path / "cache", compute_dtype=dtype)
        train(run, tmp_path / dtype, lambda metrics, folder: None, inputs)
    stores = store.list_stores(tmp_path / "cache")
    assert sorted(info.record.compute_dtype for info in stores) == ["bf16", "fp32"]


def test_auto_mode_follows_the_measured_times(workspace, tmp_path, monkeypatch):
    run = cached_run(workspace, "sft")
    request = CacheRequest([run], {}, tmp_path / "cache", "cpu")
    with local_jobs(tmp_path):  # with real times: building for one epoch never pays
        assert resolve_cache_mode(request, 1.0)[0] == "off"
    cheap_reads = EpochTimes(encoder=10.0, decoder=4.0, read_encoder=1.0, read_decoder=1.0)
    kd = cached_run(workspace, "kd").model_copy(update={"labels": "original"})
    for times, auto_run, expected_mode, expected_reason in [
        (cheap_reads, run, "encoder", "no run reads decoder states"),
        (cheap_reads, kd, "full", "the states fit, and a cache is faster"),
        (replace(cheap_reads, read_decoder=4.0), kd, "encoder", "a cache of the decoder states is not faster"),
        (replace(cheap_reads, read_encoder=10.0), kd, "off", "a cache of the encoder states is not faster"),
    ]:
        monkeypatch.setattr(teacher_cache, "run_exclusive", lambda *_, times=times, **options: times)
        mode, reason = resolve_cache_mode(CacheRequest([auto_run], {}, tmp_path / "cache", "cpu"), 100.0)
        assert (mode, reason.startswith(expected_reason)) == (expected_mode, True)
        assert "100 epochs in total" in reason
    assert build_teacher_cache(request, "off").bytes == 0
    assert not list((tmp_path / "cache").rglob("*.bin"))
    tiny_limit = CacheRequest([cached_run(workspace, "sft", cache_gb=1e-9)], {}, tmp_path / "cache", "cpu")
    monkeypatch.setattr(teacher_cache, "run_exclusive", lambda *_, **options: cheap_reads)
    mode, reason = resolve_cache_mode(tiny_limit, 1e6)
    assert mode == "off"
    assert reason.startswith("the encoder states do not fit")
