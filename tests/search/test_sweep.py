"""The quickstart as a user runs it: the demo's teacher, its sweep, and what the same commands do afterwards."""

import json
import tempfile
from pathlib import Path

import pytest
from transformers import GenerationConfig

from tests.factories.sweeps import mlflow_children
from tests.factories.workspace import SECRETS, command, invoke, last_json, ray_for_commands

ROOT = Path(__file__).parents[2]
TEACHER = {
    "training.max_steps": 30,
    "dataset.train_rows": 400,
    "dataset.validation_rows": 20,
    "dataset.test_rows": 20,
    "decoding.max_length": 12,
}
SEARCH = {
    "run.dataset.train_rows": 80,  # a batch of the label job, so that a single actor imports torch
    "run.dataset.validation_rows": 40,
    "run.dataset.test_rows": 20,
    "run.decoding.max_length": 12,
    "run.training.max_steps": 3,
    "run.training.teacher_cache": '"off"',  # test_paper_search.py has a teacher cache
    "run.evaluation.allow_repetitive_teacher": "true",  # 30 steps are too few for other outputs
    "search.trials": 4,
    "search.concurrent": 1,  # two actors would import torch twice
    "serving.beams": [1, 2],
    "serving.precision": ["fp32"],
}


def set_options(**settings):
    """Options that change settings of a file."""
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The quickstart with fewer steps and rows. The tests of this file use the sweep one after the other."""
    home = tmp_path_factory.mktemp("demo") / "outputs"
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as logs:  # a short name
        yield *run_demo_sweep(home, logs), Path(logs)


def run_demo_sweep(home, logs):
    """The home, the JSON of `train` and `sweep`, and the arguments of `sweep`; Ray logs into `logs`."""
    teacher = command(home, "train", "demo", *set_options(**TEACHER), "--json", RAY_TMPDIR=logs)
    assert "metric: rouge2 (auto: the metric of demo)" in teacher.stderr
    arguments = ["sweep", ROOT / "search_spaces" / "quickstart.yaml", *set_options(**SEARCH)]
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
        dominated = any(s >= score and ms <= latency and (s, ms) != (score, latency) for s, ms in points)
        assert entry["front"] != dominated
    for budget, share in (("fast", 0.7), ("fastest", 0.5)):
        key, serving = summary["choices"][budget], summary["serving"][budget]
        fitting = [t for t in finalists if t["speedup"] >= 1 / share]  # over the teacher as served, in one session
        assert (key is None) == (not fitting)
        assert not fitting or (key, serving) in [(t["key"], t["serving"]) for t in fitting]
    for key, path in summary["exports"].items():
        assert summary["choices"][key] in path
        assert (Path(path) / "model.safetensors").is_file()
    for trial in summary["trials"]:
        assert trial["interval"][0] <= trial["metrics"]["rouge2"] <= trial["interval"][1]
        assert all(trial["metrics"][cost] > 0 for cost in ("latency_ms", "latency_ms_b1", "device_hours"))
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
    settings = {"name": "deep", "run.student.size": "2-9", "points": "[]"}
    settings |= {"run.evaluation.allow_repetitive_teacher": "true"}
    done = invoke(home, "sweep", space, *set_options(**settings))
    assert done.returncode == 2
    assert "the teacher has 4 decoder layers" in done.stderr
    assert not (home / "sweeps" / "deep").exists()


def test_a_finished_sweep_runs_no_trial_again_and_prints_the_same_front(demo):
    home, _, summary, arguments, _ = demo
    results = {p: p.stat().st_mtime_ns for p in Path(summary["sweep"]).glob("trials/*/result.json")}
    again = last_json(invoke(home, *arguments, "--json"))
    assert again["front"] == summary["front"]
    assert {p: p.stat().st_mtime_ns for p in results} == results
    assert len(mlflow_children(home)) == 4


def test_another_space_under_the_same_name_is_refused(demo):
    home, _, _, arguments, _ = demo
    refused = invoke(home, *arguments, "--set", "run.training.batch_size=16")
    assert refused.returncode == 2
    assert "started with another run" in refused.stderr


@pytest.fixture(scope="module")
def ray_in_this_process(demo):
    """A Ray for further commands on the sweep, which serve finalists in the same worker process."""
    with ray_for_commands(demo[0]):
        yield


def test_finalists_that_a_kill_left_unserved_are_served_by_the_same_command(demo, ray_in_this_process):
    """All trials are finished, as after a kill while finalists are served; the command adds a number of beams."""
    home, _, summary, arguments, _ = demo
    sweep = Path(summary["sweep"])
    results = {p: p.stat().st_mtime_ns for p in sweep.glob("trials/*/result.json")}
    for path in [*sweep.rglob("served.json"), sweep / "serving_latency.json"]:
        path.unlink()
    again = last_json(invoke(home, *arguments, "--set", "serving.beams=[1,2,3]", "--json"))
    before, after = ({(f["key"], *f["serving"].values()) for f in entry["finalists"]} for entry in (summary, again))
    assert before < after
    assert {beams for _, beams, *_ in after - before} == {3}
    assert all(f["test"] for f in again["finalists"] if f["front"])
    assert {p: p.stat().st_mtime_ns for p in results} == results
    assert json.loads((sweep / "sweep.json").read_text())["status"] == "finished"


def test_more_trials_under_the_same_name_are_added(demo, ray_in_this_process):
    """Also with a smaller micro-batch, as after a lack of memory, since that setting does not change results."""
    home, _, summary, arguments, _ = demo
    before = {p: p.stat().st_mtime_ns for p in Path(summary["sweep"]).glob("trials/*/result.json")}
    assert len(before) == 4
    smaller = ["--set", "run.training.micro_tokens=4096"]
    more = last_json(invoke(home, *arguments, "--set", "search.trials=5", *smaller, "--json"))
    assert len(more["trials"]) == 5
    assert {t["key"] for t in summary["trials"]} < {t["key"] for t in more["trials"]}
    assert {p: p.stat().st_mtime_ns for p in before} == before
    [added] = [t for t in more["trials"] if t["key"] not in {old["key"] for old in summary["trials"]}]
    assert added["status"] in ("done", "stopped")
    assert added["params"] not in [t["params"] for t in summary["trials"]]


def test_choose_evaluate_shrink_and_pseudolabel_work_on_a_finished_sweep(demo, ray_in_this_process, tmp_path):
    home, _, summary, *_ = demo
    [best] = last_json(invoke(home, "choose", "quickstart", "--within", "params_m=100", "--json"))["choices"]
    served = json.loads((Path(summary["sweep"]) / "trials" / best["key"] / "served.json").read_text())["entries"]
    assert best["score"] in [entry["metrics"]["rouge2"] for entry in served if entry["config"] == best["serving"]]
    assert best["costs"]["params_m"] <= 100
    assert GenerationConfig.from_pretrained(best["checkpoint"]).num_beams == best["serving"]["beams"]
    checkpoint = Path(summary["sweep"]) / "trials" / summary["front"][0] / "best"
    card = json.loads((checkpoint / "raydistill.json").read_text())
    assert set(card) >= {"teacher", "size", "copied", "supervised", "config", "data", "scores", "versions"}
    scored = last_json(command(home, "evaluate", checkpoint, "--rows", "20", "--json"))
    only = scored["checkpoints"][str(checkpoint)]
    assert 0 <= only["metrics"]["rouge2"] <= 100
    paired = last_json(invoke(home, "evaluate", checkpoint, "demo", "--dataset", "demo", "--rows", "20", "--json"))
    assert paired["comparison"]["low"] <= paired["comparison"]["difference"] <= paired["comparison"]["high"]
    output = tmp_path / "made"
    shrunk = last_json(
        command(home, "shrink", "--teacher", "demo", "--size", "2-2", "--copy", "1,3", "--output", output, "--json")
    )
    assert shrunk["copied"]["decoder"] == [1, 3]
    assert (output / "model.safetensors").is_file()
    arguments = ["--teacher", "demo", "--split", "test", "--rows", "60", "--output", tmp_path / "l"]
    labels = last_json(invoke(home, "pseudolabel", *arguments, "--allow-repetitive", "--json"))
    assert labels["rows"] == 60
    assert labels["quality"]["rouge2"] >= 0
