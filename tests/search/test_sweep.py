"""Whole commands on Ray, as a user runs them: the demo, the paper's KD search, and a sweep that is killed."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from transformers import GenerationConfig

from raydistill.models.loading import load_config
from raydistill.search import shape_latency
from tests.factories.hub_cache import lay_out_dataset
from tests.factories.models import lay_out_model, save_tiny
from tests.factories.sweeps import KILL_SPACE, mlflow_children
from tests.factories.workspace import (
    SECRETS,
    command,
    corpus_rows,
    environment,
    last_json,
    make_world,
    wait_for_ray_to_end,
)

ROOT = Path(__file__).parents[2]
SHORT = ["--set", "run.training.max_steps=3", "--set", "search.concurrent=2"]


def params_m(teacher: Path, size: str) -> float:
    """Millions of parameters of a student of this size."""
    return shape_latency.count_params_m(load_config(teacher), size)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The quickstart with fewer steps and rows. The tests of this file use the sweep one after the other."""
    home = tmp_path_factory.mktemp("demo") / "outputs"
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as logs:  # a short name
        yield *run_demo_sweep(home, logs), Path(logs)


def run_demo_sweep(home, logs):
    """The home, the JSON of `train` and `sweep`, and the arguments of `sweep`; Ray logs into `logs`."""
    small = ["--set", "dataset.train_rows=400", "--set", "training.max_steps=30", "--set", "dataset.validation_rows=40"]
    teacher = command(home, "train", "demo", *small, "--set", "dataset.test_rows=40", "--json", RAY_TMPDIR=logs)
    rows = [f"run.dataset.{split}_rows={n}" for split, n in (("train", 400), ("validation", 40), ("test", 40))]
    settings = [part for row in rows for part in ("--set", row)]
    arguments = ["sweep", ROOT / "search_spaces" / "quickstart.yaml", *SHORT, *settings, "--set", "search.trials=4"]
    summary = command(home, *arguments, "--json", RAY_TMPDIR=logs)
    return home, last_json(teacher), last_json(summary), arguments


def test_the_demo_sweep_ends_with_trials_front_choices_and_pictures(demo):
    home, teacher, summary, *_ = demo
    assert teacher["status"] == "done"
    assert [t["status"] for t in summary["trials"]] == ["done"] * 4
    assert {t["method"] for t in summary["trials"]} == {"sft", "kd", "pl"}
    finalists = summary["finalists"]
    assert {t["key"] for t in finalists if t["front"]} == set(summary["front"]) <= {t["key"] for t in summary["trials"]}
    points = [(t["metrics"]["rouge2"], t["metrics"]["latency_ms"]) for t in finalists]
    for entry, (score, latency) in zip(finalists, points, strict=True):
        beaten = any(s >= score and ms <= latency and (s, ms) != (score, latency) for s, ms in points)
        assert entry["front"] != beaten
    teacher_ms = summary["teacher"]["costs"]["latency_ms"]  # the median over the decodings with equal beams
    for budget, share in (("fast", 0.6), ("fastest", 0.45)):
        key, decoding = summary["choices"][budget], summary["decodings"][budget]
        fitting = [t for t in finalists if t["metrics"]["latency_ms"] <= share * teacher_ms]
        assert (key is None) == (not fitting)
        assert not fitting or (key, decoding) in [(t["key"], t["decoding"]) for t in fitting]
    for key, path in summary["exports"].items():
        assert summary["choices"][key] in path
        assert (Path(path) / "model.safetensors").is_file()
    for trial in summary["trials"]:
        assert trial["interval"][0] <= trial["metrics"]["rouge2"] <= trial["interval"][1]
        assert trial["metrics"]["latency_ms"] > trial["metrics"]["latency_ms_b1"] > 0
        assert trial["metrics"]["device_hours"] > 0
    sweep = Path(summary["sweep"])
    assert (sweep / "front.png").read_bytes().startswith(b"\x89PNG")
    assert "ROUGE-2" in (sweep / "table.md").read_text()
    assert len(mlflow_children(home)) == 4
    assert {status for _, status in mlflow_children(home)} == {"FINISHED"}


def test_a_sweep_writes_no_secret_of_the_environment_to_any_file(demo):
    home, *_, logs = demo
    left = [path for folder in (home, logs) for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in left} >= {"mlflow.db", "run.json", "raydistill.json", "study.log", "sweep.json"}
    assert {path.name for path in left} >= {"runtime_env_agent.log", "raylet.out", "gcs_server.out"}
    for path in left:
        content = path.read_bytes()
        assert not [name for name, value in SECRETS.items() if value.encode() in content], path


def test_larger_shapes_cost_more_and_speedup_is_relative_to_the_teacher(demo):
    summary = demo[2]
    by_size = {t["size"]: t["metrics"] for t in summary["trials"]}
    teacher = summary["teacher"]["costs"]
    assert by_size["2-3"]["params_m"] > by_size["2-2"]["params_m"]
    for metrics in by_size.values():
        assert metrics["params_m"] < teacher["params_m"]
        assert metrics["speedup"] == pytest.approx(teacher["latency_ms"] / metrics["latency_ms"])


def test_a_layer_that_the_teacher_lacks_is_refused_before_anything_starts(demo):
    home = demo[0]
    space = ROOT / "search_spaces" / "quickstart.yaml"
    done = command(home, "sweep", space, "--set", "name=deep", "--set", "run.student.size=2-9", "--set", "points=[]")
    assert done.returncode == 2
    assert "the teacher has 4 decoder layers" in done.stderr
    assert not (home / "sweeps" / "deep").exists()


def test_a_finished_sweep_runs_no_trial_again_and_prints_the_same_front(demo):
    home, _, summary, arguments, _ = demo
    results = {p: p.stat().st_mtime_ns for p in Path(summary["sweep"]).glob("trials/*/result.json")}
    again = last_json(command(home, *arguments, "--json"))
    assert again["front"] == summary["front"]
    assert {p: p.stat().st_mtime_ns for p in results} == results
    assert len(mlflow_children(home)) == 4


def test_finalists_that_a_kill_left_unserved_are_served_by_the_same_command(demo):
    """All trials are finished, as after a kill while finalists are served; the command adds one decoding."""
    home, _, summary, arguments, _ = demo
    sweep = Path(summary["sweep"])
    results = {p: p.stat().st_mtime_ns for p in sweep.glob("trials/*/result.json")}
    for served in sweep.rglob("served.json"):
        served.unlink()
    again = last_json(command(home, *arguments, "--set", "search.decoding.beams=[1,2,3,4]", "--json"))
    before, after = (
        {(f["key"], f["decoding"]["beams"], f["decoding"]["length_penalty"]) for f in entry["finalists"]}
        for entry in (summary, again)
    )
    assert before < after
    assert {beams for _, beams, _ in after - before} == {3}
    assert all(f["test"] for f in again["finalists"] if f["front"])
    assert {p: p.stat().st_mtime_ns for p in results} == results
    assert json.loads((sweep / "sweep.json").read_text())["status"] == "finished"


def test_more_trials_under_the_same_name_are_added(demo):
    """Also with a smaller micro-batch, as after a lack of memory, since that setting does not change results."""
    home, _, summary, arguments, _ = demo
    before = {p: p.stat().st_mtime_ns for p in Path(summary["sweep"]).glob("trials/*/result.json")}
    assert len(before) == 4
    smaller = ["--set", "run.training.micro_tokens=4096"]
    more = last_json(command(home, *arguments, "--set", "search.trials=5", *smaller, "--json"))
    assert len(more["trials"]) == 5
    assert {t["key"] for t in summary["trials"]} < {t["key"] for t in more["trials"]}
    assert {p: p.stat().st_mtime_ns for p in before} == before
    [added] = [t for t in more["trials"] if t["key"] not in {old["key"] for old in summary["trials"]}]
    assert added["status"] in ("done", "stopped")
    assert added["params"] not in [t["params"] for t in summary["trials"]]


def test_another_space_under_the_same_name_is_refused(demo):
    home, _, _, arguments, _ = demo
    refused = command(home, *arguments, "--set", "run.training.learning_rate=0.5")
    assert refused.returncode == 2
    assert "started with another run" in refused.stderr


def test_choose_evaluate_shrink_and_pseudolabel_work_on_a_finished_sweep(demo, tmp_path):
    home, _, summary, *_ = demo
    [best] = last_json(command(home, "choose", "quickstart", "--within", "params_m=100", "--json"))["choices"]
    served = json.loads((Path(summary["sweep"]) / "trials" / best["key"] / "served.json").read_text())["entries"]
    assert best["score"] in [entry["metrics"]["rouge2"] for entry in served if entry["decoding"] == best["decoding"]]
    assert best["costs"]["params_m"] <= 100
    assert GenerationConfig.from_pretrained(best["checkpoint"]).num_beams == best["decoding"]["beams"]
    checkpoint = Path(summary["sweep"]) / "trials" / summary["front"][0] / "best"
    card = json.loads((checkpoint / "raydistill.json").read_text())
    assert set(card) >= {"teacher", "size", "copied", "supervised", "config", "data", "scores", "versions"}
    scored = last_json(command(home, "evaluate", checkpoint, "--rows", "20", "--json"))
    only = scored["checkpoints"][str(checkpoint)]
    assert 0 <= only["metrics"]["rouge2"] <= 100
    paired = last_json(command(home, "evaluate", checkpoint, "demo", "--dataset", "demo", "--rows", "20", "--json"))
    assert paired["comparison"]["low"] <= paired["comparison"]["difference"] <= paired["comparison"]["high"]
    output = tmp_path / "made"
    shrunk = last_json(
        command(home, "shrink", "--teacher", "demo", "--size", "2-2", "--copy", "1,3", "--output", output, "--json")
    )
    assert shrunk["copied"]["decoder"] == [1, 3]
    assert (output / "model.safetensors").is_file()
    labels = last_json(
        command(home, "pseudolabel", "--teacher", "demo", "--split", "test", "--output", tmp_path / "l", "--json")
    )
    assert labels["rows"] == 400
    assert labels["quality"]["rouge2"] >= 0


def make_xsum_caches(folder: Path) -> dict[str, str]:
    """A tiny random 12-12 BART and rows of XSUM's format in hub caches, under the real names."""
    model = save_tiny("bart", folder / "bart", encoder_layers=12, decoder_layers=12, dropout=0.0)
    lay_out_model(folder / "hub", "facebook/bart-large-xsum", model)
    splits = {
        split: [{"document": r["source"], "summary": r["target"], "id": r["id"]} for r in corpus_rows(n, seed)]
        for seed, (split, n) in enumerate({"train": 80, "validation": 8, "test": 8}.items())
    }
    lay_out_dataset(folder / "datasets", "EdinburghNLP/xsum", None, splits, "refs/convert/parquet")
    return {
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "HF_HOME": str(folder),
        "HF_HUB_OFFLINE": "1",
    }


def test_the_papers_kd_search_runs_unchanged_to_a_registered_choice(tmp_path):
    env = make_xsum_caches(tmp_path)
    home = tmp_path / "outputs"
    space = ROOT / "search_spaces" / "kd_xsum.yaml"
    few = ["--set", "search.trials=3", "--set", "search.decoding.beams=[1]"]
    done = command(home, "sweep", space, *SHORT, *few, "--json", **env)
    summary = last_json(done)
    # The time of such a tiny 12-6 varies: if it exceeds both budgets, the size is not trained, and a message says so
    trained = {t["size"] for t in summary["trials"]}
    served = re.search(r"no budget admits ([^:]+):", done.stderr)
    infeasible = set(served[1].split(", ")) if served else set()
    assert trained | infeasible == {"12-6", "12-3", "12-1"}
    assert not trained & infeasible
    assert all(t["method"] == "kd" for t in summary["trials"])
    # After three steps of a random student on eight rows, some trials repeat one word and fail
    assert "done" in {t["status"] for t in summary["trials"]}
    for trial in summary["trials"]:
        assert trial["status"] == "done" or "collapsed" in trial["reason"]
    assert {t["params"]["loss.alpha_hidden"] for t in summary["trials"]} == {3}
    arguments = ["--within", "params_m=100", "--name", "any"]
    [chosen] = last_json(command(home, "choose", "kd_xsum", *arguments, "--json", **env))["choices"]
    with sqlite3.connect(home / "mlflow.db") as store:
        aliases = dict(
            store.execute("select alias, version from registered_model_aliases where name = 'kd_xsum'").fetchall()
        )
    assert chosen["registered"]["uri"] == "models:/kd_xsum@any"
    assert str(aliases["any"]) == chosen["registered"]["version"]
    assert chosen["key"] in {t["key"] for t in summary["trials"] if t["status"] == "done"}


def test_resume_after_sigkill_loses_and_repeats_no_trial(tmp_path):
    """SIGKILL to the driver while some trials are finished and others run (test_kills.py repeats this twenty times)."""
    teacher, data = make_world(tmp_path)
    run = {**KILL_SPACE["run"], "teacher": str(teacher)}
    run["dataset"] = {"name": str(data), "max_source_tokens": 32, "max_target_tokens": 16}
    path = tmp_path / "killed.yaml"
    search = {**KILL_SPACE["search"], "decoding": {"beams": [1]}}
    path.write_text(yaml.safe_dump({**KILL_SPACE, "run": run, "search": search}))
    home = tmp_path / "outputs"
    trials = home / "sweeps" / "killed" / "trials"
    started = subprocess.Popen(
        [sys.executable, "-m", "raydistill.sweep", str(path)],
        env=environment(),
        cwd=home.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while len(list(trials.glob("*/result.json"))) < 2:
        assert started.poll() is None, "the sweep ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(started.pid, signal.SIGKILL)
    started.communicate()
    before = {p: p.stat().st_mtime_ns for p in trials.glob("*/result.json")}
    assert len(before) < 6
    wait_for_ray_to_end(home)
    summary = last_json(command(home, "sweep", path, "--json"))
    assert len(summary["trials"]) == 6
    assert {t["status"] for t in summary["trials"]} == {"done"}
    assert len({(t["method"], t["size"]) for t in summary["trials"]}) == 6
    assert len({t["key"] for t in summary["trials"]}) == 6
    assert {p: p.stat().st_mtime_ns for p in before} == before
    children = mlflow_children(home)
    assert sorted(key for key, _ in children) == sorted(t["key"] for t in summary["trials"])
    for history in trials.glob("*/metrics.jsonl"):
        steps = [json.loads(line)["step"] for line in history.read_text().splitlines()]
        assert steps == sorted(set(steps))


@pytest.mark.slow  # the decision is tested in test_early_stopping.py
def test_trials_worse_than_their_peers_stop_early_and_infeasible_sizes_are_not_trained(tmp_path):
    """On real Ray, one at a time. A learning rate of nearly 0 cannot keep up; 2-3 has more parameters than allowed."""
    teacher, data = make_world(tmp_path)
    small, large = params_m(teacher, "2-1"), params_m(teacher, "2-3")
    space = {
        "name": "stopping",
        "run": {
            "teacher": str(teacher),
            "dataset": {"name": str(data), "max_source_tokens": 32, "max_target_tokens": 16},
            "student": {"size": {"choice": ["2-3", "2-1"]}, "init": "random"},
            "training": {
                **{"epochs": 8, "batch_size": 8, "warmup_steps": 2, "checks_per_epoch": 1, "patience": 99},
                **{"freeze_encoder": False, "freeze_embeddings": False, "precision": "fp32"},
                "learning_rate": {"choice": [1e-2, 1e-9]},
            },
            "decoding": {"beams": 1, "max_length": 12},
            "evaluation": {"metric": "bleu"},
        },
        "search": {"trials": 4, "sampler": "grid", "stopping": "per_shape", "concurrent": 1, "grace": 7 / 8},
        "points": [{"student.size": "2-1", "training.learning_rate": 1e-2}],
        "budgets": {"small": {"params_m": (small + large) / 2}},
    }
    path = tmp_path / "stopping.yaml"
    path.write_text(yaml.safe_dump(space))
    done = command(tmp_path / "outputs", "sweep", path, "--json")
    summary = last_json(done)
    assert "no budget admits 2-3" in done.stderr
    by_rate = {t["params"]["training.learning_rate"]: t for t in summary["trials"]}
    assert {rate: t["status"] for rate, t in by_rate.items()} == {1e-2: "done", 1e-9: "stopped"}
    assert {t["size"] for t in summary["trials"]} == {"2-1"}
    histories = {
        rate: (tmp_path / "outputs/sweeps/stopping/trials" / t["key"] / "metrics.jsonl").read_text().splitlines()
        for rate, t in by_rate.items()
    }
    assert {rate: len(lines) for rate, lines in histories.items()} == {1e-2: 8, 1e-9: 7}  # at the rung
    assert by_rate[1e-9]["interval"] is not None
    assert {status for _, status in mlflow_children(tmp_path / "outputs")} == {"FINISHED"}


def test_invalid_input_is_refused_at_once_with_status_2(tmp_path):
    """An invalid space, a server that is down, a teacher that is not trained: neither Ray nor torch is loaded."""
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: x\nrun:\n  teacher: demo\n  dataset: demo\n  loss: {alpha_hiden: 3}\n")
    cases = [
        (["sweep", bad], "did you mean 'alpha_hidden'"),
        (["sweep", tmp_path / "none.yaml"], "no such file"),
        (
            ["sweep", ROOT / "search_spaces/quickstart.yaml", "--set", "tracking_uri=http://127.0.0.1:9"],
            "does not answer",
        ),
        (["sweep", ROOT / "search_spaces/quickstart.yaml", "--set", "run.loss.alpha_data=-1"], "alpha_data"),
        (["sweep", ROOT / "search_spaces/quickstart.yaml"], "train demo"),
        (["pseudolabel", "--teacher", "demo"], "train demo"),
        (["pseudolabel", "--teacher", "pegasos"], "--dataset"),
        (["train", bad], "raydistill sweep"),
        (["shrink", "--teacher", "bart", "--size", "12x3", "--output", tmp_path / "o"], "12-3"),
        (["choose", "nothing"], "no such sweep"),
    ]
    for arguments, message in cases:
        done = command(tmp_path / "outputs", *arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert message in done.stderr, arguments
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
