"""The teacher's pass as a Ray job: the same states as in one process, beside the labels, once, decided once."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from raydistill.cluster.start import cluster
from raydistill.config.run import Run
from raydistill.core.files import read_json
from raydistill.jobs import teacher_cache as module
from raydistill.jobs.pseudolabel import Job, pseudolabel
from raydistill.jobs.teacher_cache import Cached, Want, auto_precision, decide, encoder_beside, group_of, teacher_pass
from raydistill.models.loading import load_model
from raydistill.search import prepare
from raydistill.teacher_cache import store
from raydistill.teacher_cache.builder import make_here
from raydistill.teacher_cache.policy import Costs
from raydistill.training.inputs import Inputs
from raydistill.training.run import train
from raydistill.training.tokenized_data import open_teacher
from tests.world import make_world


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny teacher and a corpus, and a Ray cluster of two CPUs."""
    root = tmp_path_factory.mktemp("world")
    patch = pytest.MonkeyPatch()
    patch.setenv("RAYDISTILL_HOME", str(root / "outputs"))
    make_world(root)
    with cluster(2):
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


def test_labels_and_encoder_states_come_from_one_pass_and_the_rest_from_the_next(place, tmp_path):
    runs = [run_of(place, method, teacher_cache="full") for method in ("kd", "sft")]
    root = tmp_path / "cache"
    with encoder_beside(Want(runs, {}, root, "cpu"), 4.0) as also:
        job = Job(runs[0].teacher, runs[0].dataset, decoding=runs[0].decoding)
        labels = pseudolabel(job, tmp_path / "labels", say=False, also=also)
    beside = files(root)
    assert {path.parent.name for path in beside} == {"states"}
    assert [path.parent.name for path in root.rglob("manifest.json")] == ["states"]
    assert len(list((tmp_path / "labels").glob("*/manifest.json"))) == 1

    want = Want(runs, {"pseudo": {"pseudo": str(labels)}}, root, "cpu")
    made = teacher_pass(want, "full")
    work = want.work("full")
    assert not work.unfinished()
    assert made.bytes == sum(len(content) for content in files(root).values())
    assert beside.items() <= files(root).items()
    assert sum(made.seconds.values()) > 0
    assert made.seconds == {f"{a.parent.name}/{a.name}": store.device_seconds(a) for a in work.arrays}

    here = Want(runs, want.labels, tmp_path / "here", "cpu").work("full")
    make_here(here, load_model(place / "teacher"))
    assert files(root) == files(tmp_path / "here")

    before = {p: p.stat().st_mtime_ns for p in root.rglob("*.bin")}
    assert teacher_pass(want, "full") == made
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*.bin")} == before


def test_a_teacher_stored_in_bf16_has_one_key_for_pass_runs_and_sweep(place, tmp_path):
    kept = tmp_path / "teacher"
    shutil.copytree(place / "teacher", kept)
    load_model(kept, torch.bfloat16).save_pretrained(kept)
    run = run_of(place, "sft", teacher_cache="full").model_copy(update={"teacher": str(kept)})
    work = Want([run], {}, tmp_path / "cache", "cpu").work("full")
    make_here(work, load_model(kept))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.bin")}
    train(run, tmp_path / "run", lambda m, f: None, Inputs(cache=tmp_path / "cache"))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.bin")} == before
    teacher = open_teacher(str(kept), run.dataset)
    prepare.check_unchanged(run, {"key": teacher.key, "data": {}}, tmp_path)


def test_a_sweep_whose_pass_was_killed_does_not_decide_again(place, tmp_path, monkeypatch):
    asked, record = [], tmp_path / "cache.json"
    monkeypatch.setattr(prepare, "decide", lambda want, epochs: asked.append(epochs) or ("encoder", "it pays"))

    def killed(want, keep):
        assert read_json(record)["groups"][group_of(run)]["why"] == "it pays"
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "teacher_pass", killed)
    run = run_of(place, "sft")
    with pytest.raises(KeyboardInterrupt):
        prepare._cache([run], {}, "cpu", record, 7.0, None)
    monkeypatch.setattr(
        prepare, "teacher_pass", lambda want, keep: Cached(90 if keep == "encoder" else 0, {"e/s": 1.5})
    )
    cache = prepare._cache([run], {}, "cpu", record, 9.0, None)
    assert asked == [7.0]
    assert (cache.keep_of(run), cache.stores) == ("encoder", {"e/s": 1.5 / 3600})
    assert read_json(record)["groups"][group_of(run)] == {
        "keep": "encoder",
        "why": "it pays",
        "bytes": 90,
        "device_seconds": {"e/s": 1.5},
    }


def test_a_head_without_a_gpu_asks_a_worker_once_in_what_numbers_it_computes(place, tmp_path, monkeypatch):
    asked, record = [], tmp_path / "cache.json"
    monkeypatch.setattr(prepare, "alone", lambda work, device: asked.append((work, device)) or "bf16")
    run = run_of(place, "sft", precision="auto")
    assert prepare._computed([run_of(place, "sft")], "cuda", record) is None
    computed = prepare._computed([run], "cuda", record)
    assert prepare._computed([run], "cuda", record) == computed == "bf16"
    assert asked == [(auto_precision, "cuda")]
    assert auto_precision("cpu", 1) in ("bf16", "fp32")
    # This machine has no GPU; asking torch what it computes in would fail.
    assert Want([run], {}, tmp_path, "cuda", "bf16").work("full").numbers.computed == "bf16"
    for numbers in ("bf16", "fp32"):
        train(run, tmp_path / numbers, lambda m, f: None, Inputs(cache=tmp_path / "cache", computed=numbers))
    stores = (tmp_path / "cache").glob("*/about.json")
    assert sorted(json.loads(path.read_text())["computed"] for path in stores) == ["bf16", "fp32"]


def test_auto_decides_by_figures_and_once(place, tmp_path, monkeypatch):
    run = run_of(place, "sft")
    want = Want([run], {}, tmp_path / "cache", "cpu")
    assert decide(want, 1.0)[0] == "off"  # as a worker measures: made for one epoch it never pays
    cheap = Costs(encoder=10.0, decoder=4.0, read_encoder=1.0, read_decoder=1.0)
    dear = replace(cheap, read_decoder=4.0)
    kd = run_of(place, "kd").model_copy(update={"labels": "original"})
    for costs, who, expected, because in [
        (cheap, run, "encoder", "no run reads decoder states"),
        (cheap, kd, "full", "it fits and pays"),
        (dear, kd, "encoder", "reading the decoder states does not pay"),
        (replace(cheap, read_encoder=10.0), kd, "off", "reading the encoder states does not pay"),
    ]:
        monkeypatch.setattr(module, "alone", lambda *_, costs=costs, **places: costs)
        keep, why = decide(Want([who], {}, tmp_path / "cache", "cpu"), 100.0)
        assert (keep, why.startswith(because)) == (expected, True)
        assert "100 epochs in all" in why
    assert teacher_pass(want, "off").bytes == 0
    assert not list((tmp_path / "cache").rglob("*.bin"))
    tiny = Want([run_of(place, "sft", cache_gb=1e-9)], {}, tmp_path / "cache", "cpu")
    monkeypatch.setattr(module, "alone", lambda *_, **places: cheap)
    keep, why = decide(tiny, 1e6)
    assert keep == "off"
    assert why.startswith("the encoder states do not fit")
