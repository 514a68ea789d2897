"""The teacher's pass as a Ray job: the same states as in one process, beside the labels, once, decided once."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from raydistill.cluster.start import ray_cluster
from raydistill.config.run import Run
from raydistill.core.files import read_json
from raydistill.jobs import teacher_cache as module
from raydistill.jobs.pseudolabel import LabelJob, pseudolabel
from raydistill.jobs.teacher_cache import (
    CacheRequest,
    CacheStats,
    build_teacher_cache,
    cache_group_key,
    resolve_auto_precision,
    resolve_cache_mode,
)
from raydistill.models.loading import load_model
from raydistill.search import prepare
from raydistill.teacher_cache import store
from raydistill.teacher_cache.builder import build_cache
from raydistill.teacher_cache.policy import EpochTimes
from raydistill.training.inputs import RunInputs
from raydistill.training.run import train
from raydistill.training.tokenized_data import open_teacher
from tests.factories.workspace import make_world


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny teacher and a corpus, and a Ray cluster of two CPUs."""
    root = tmp_path_factory.mktemp("world")
    patch = pytest.MonkeyPatch()
    patch.setenv("RAYDISTILL_HOME", str(root / "outputs"))
    make_world(root)
    with ray_cluster(2):
        yield root
    patch.undo()


def run_of(place, method, **training):
    return Run.model_validate(
        {
            "name": "r",
            "teacher": str(place / "teacher"),
            "dataset": str(place / "data"),
            "method": method,
            "labels": "pseudo" if method == "kd" else "original",
            "student": {"size": "2-1"},
            "decoding": {"beams": 2, "max_length": 12},
            "training": {"precision": "fp32", "epochs": 4, **training},
        }
    )


def files(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*.bin")}


def test_build_teacher_cache_equals_build_in_one_process_and_reuses_finished_stores(place, tmp_path):
    runs = [run_of(place, method, teacher_cache="full") for method in ("kd", "sft")]
    root = tmp_path / "cache"
    job = LabelJob(runs[0].teacher, runs[0].dataset, decoding=runs[0].decoding)
    labels = pseudolabel(job, tmp_path / "labels", verbose=False)
    assert len(list((tmp_path / "labels").glob("*/manifest.json"))) == 1
    encoder_only = CacheRequest(runs[1:], {}, root, "cpu")
    build_teacher_cache(encoder_only, "full")
    encoder_files = files(root)
    assert {path.parent.name for path in encoder_files} == {"states"}
    assert [path.parent.name for path in root.rglob("manifest.json")] == ["states"]

    want = CacheRequest(runs, {"pseudo": {"pseudo": str(labels)}}, root, "cpu")
    made = build_teacher_cache(want, "full")
    work = want.make_builder("full")
    assert not work.is_incomplete()
    assert made.bytes == sum(len(content) for content in files(root).values())
    assert encoder_files.items() <= files(root).items()
    assert sum(made.device_seconds.values()) > 0
    assert made.device_seconds == {f"{a.parent.name}/{a.name}": store.read_device_seconds(a) for a in work.array_sizes}

    here = CacheRequest(runs, want.labels, tmp_path / "here", "cpu").make_builder("full")
    build_cache(here, load_model(place / "teacher"))
    assert files(root) == files(tmp_path / "here")

    before = {p: p.stat().st_mtime_ns for p in root.rglob("*.bin")}
    assert build_teacher_cache(want, "full") == made
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*.bin")} == before


def test_a_teacher_stored_in_bf16_has_one_key_for_pass_runs_and_sweep(place, tmp_path):
    kept = tmp_path / "teacher"
    shutil.copytree(place / "teacher", kept)
    load_model(kept, torch.bfloat16).save_pretrained(kept)
    run = run_of(place, "sft", teacher_cache="full").model_copy(update={"teacher": str(kept)})
    work = CacheRequest([run], {}, tmp_path / "cache", "cpu").make_builder("full")
    build_cache(work, load_model(kept))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.bin")}
    train(run, tmp_path / "run", lambda m, f: None, RunInputs(cache_root=tmp_path / "cache"))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.bin")} == before
    teacher = open_teacher(str(kept), run.dataset)
    prepare.check_unchanged(run, {"key": teacher.key, "data": {}}, tmp_path)


def test_a_sweep_whose_pass_was_killed_does_not_decide_again(place, tmp_path, monkeypatch):
    asked, record = [], tmp_path / "cache.json"
    monkeypatch.setattr(
        prepare, "resolve_cache_mode", lambda want, epochs: asked.append(epochs) or ("encoder", "it pays")
    )

    def killed(want, keep):
        assert read_json(record)["groups"][cache_group_key(run)]["why"] == "it pays"
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "build_teacher_cache", killed)
    run = run_of(place, "sft")
    with pytest.raises(KeyboardInterrupt):
        prepare._make_teacher_cache([run], {}, "cpu", record, 7.0, None)
    monkeypatch.setattr(
        prepare, "build_teacher_cache", lambda want, keep: CacheStats(90 if keep == "encoder" else 0, {"e/s": 1.5})
    )
    cache = prepare._make_teacher_cache([run], {}, "cpu", record, 9.0, None)
    assert asked == [7.0]
    assert (cache.mode_for(run), cache.stores) == ("encoder", {"e/s": 1.5 / 3600})
    assert read_json(record)["groups"][cache_group_key(run)] == {
        "keep": "encoder",
        "why": "it pays",
        "bytes": 90,
        "device_seconds": {"e/s": 1.5},
    }


def test_a_head_without_a_gpu_asks_a_worker_once_in_what_numbers_it_computes(place, tmp_path, monkeypatch):
    asked, record = [], tmp_path / "cache.json"
    monkeypatch.setattr(prepare, "run_exclusive", lambda work, device: asked.append((work, device)) or "bf16")
    run = run_of(place, "sft", precision="auto")
    assert prepare._resolve_compute_dtype([run_of(place, "sft")], "cuda", record) is None
    computed = prepare._resolve_compute_dtype([run], "cuda", record)
    assert prepare._resolve_compute_dtype([run], "cuda", record) == computed == "bf16"
    assert asked == [(resolve_auto_precision, "cuda")]
    assert resolve_auto_precision("cpu", 1) in ("bf16", "fp32")
    # This machine has no GPU; asking torch what it computes in would fail.
    assert CacheRequest([run], {}, tmp_path, "cuda", "bf16").make_builder("full").dtypes.compute == "bf16"
    for numbers in ("bf16", "fp32"):
        train(
            run, tmp_path / numbers, lambda m, f: None, RunInputs(cache_root=tmp_path / "cache", compute_dtype=numbers)
        )
    stores = (tmp_path / "cache").glob("*/about.json")
    assert sorted(json.loads(path.read_text())["computed"] for path in stores) == ["bf16", "fp32"]


def test_auto_decides_by_figures_and_once(place, tmp_path, monkeypatch):
    run = run_of(place, "sft")
    want = CacheRequest([run], {}, tmp_path / "cache", "cpu")
    assert resolve_cache_mode(want, 1.0)[0] == "off"  # as a worker measures: made for one epoch it never pays
    cheap = EpochTimes(encoder=10.0, decoder=4.0, read_encoder=1.0, read_decoder=1.0)
    dear = replace(cheap, read_decoder=4.0)
    kd = run_of(place, "kd").model_copy(update={"labels": "original"})
    for costs, who, expected, because in [
        (cheap, run, "encoder", "no run reads decoder states"),
        (cheap, kd, "full", "it fits and pays"),
        (dear, kd, "encoder", "reading the decoder states does not pay"),
        (replace(cheap, read_encoder=10.0), kd, "off", "reading the encoder states does not pay"),
    ]:
        monkeypatch.setattr(module, "run_exclusive", lambda *_, costs=costs, **places: costs)
        keep, why = resolve_cache_mode(CacheRequest([who], {}, tmp_path / "cache", "cpu"), 100.0)
        assert (keep, why.startswith(because)) == (expected, True)
        assert "100 epochs in all" in why
    assert build_teacher_cache(want, "off").bytes == 0
    assert not list((tmp_path / "cache").rglob("*.bin"))
    tiny = CacheRequest([run_of(place, "sft", cache_gb=1e-9)], {}, tmp_path / "cache", "cpu")
    monkeypatch.setattr(module, "run_exclusive", lambda *_, **places: cheap)
    keep, why = resolve_cache_mode(tiny, 1e6)
    assert keep == "off"
    assert why.startswith("the encoder states do not fit")
