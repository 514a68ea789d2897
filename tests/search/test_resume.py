"""Whole sweeps on Ray, as a user runs them: one that is killed, one with early stopping; and invalid input."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from raydistill.models.loading import load_config
from raydistill.search import shape_latency
from tests.factories.sweeps import KILL_SPACE, mlflow_children, write_kill_space
from tests.factories.workspace import command, environment, invoke, last_json, make_world, wait_for_ray_to_end

ROOT = Path(__file__).parents[2]


SWEEP_UNTIL_A_TRIAL_IS_FINISHED_AND_ANOTHER_RUNS = """
import os, signal
from raydistill.search.progress import ProgressCallback
from raydistill.sweep import main

on_trial_result = ProgressCallback.on_trial_result

def kill_this_process(self, *arguments, **info):
    on_trial_result(self, *arguments, **info)
    trials = self.sweep / "trials"
    finished = {path.parent for path in trials.glob("*/result.json")}
    running = {path.parent for path in trials.glob("*/metrics.jsonl")} - finished
    if finished and running:
        os.kill(os.getpid(), signal.SIGKILL)

ProgressCallback.on_trial_result = kill_this_process
main()
"""


def params_m(teacher: Path, size: str) -> float:
    """Millions of parameters of a student of this size."""
    return shape_latency.count_params_m(load_config(teacher), size)


def test_resume_after_sigkill_loses_and_repeats_no_trial(tmp_path):
    """SIGKILL to the driver while a trial is finished and another runs.

    test_kills.py does this twenty times, with more trials and with a teacher cache.
    """
    training = {**KILL_SPACE["run"]["training"], "epochs": 2, "teacher_cache": "off"}
    run = {"training": training, "student": {"size": {"choice": ["2-2", "2-1"]}}}
    path = write_kill_space(tmp_path, run, search={"trials": 4, "sampler": "grid", "concurrent": 1})
    home = tmp_path / "outputs"
    trials = home / "sweeps" / "killed" / "trials"
    started = subprocess.Popen(
        [sys.executable, "-c", SWEEP_UNTIL_A_TRIAL_IS_FINISHED_AND_ANOTHER_RUNS, str(path)],
        env=environment(),
        cwd=home.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    _, errors = started.communicate()
    assert started.returncode == -signal.SIGKILL, errors.decode()[-2000:]
    before = {p: p.stat().st_mtime_ns for p in trials.glob("*/result.json")}
    assert 1 <= len(before) < 4
    assert {p.parent for p in trials.glob("*/metrics.jsonl")} > {p.parent for p in before}
    wait_for_ray_to_end(home)
    summary = last_json(invoke(home, "sweep", path, "--json"))
    assert len(summary["trials"]) == 4
    assert {t["status"] for t in summary["trials"]} == {"done"}
    assert len({(t["method"], t["size"]) for t in summary["trials"]}) == 4
    assert len({t["key"] for t in summary["trials"]}) == 4
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
            "dataset": {"name": str(data), "max_source_tokens": 32, "max_target_tokens": 16, "selection_share": 0},
            "student": {"size": {"choice": ["2-3", "2-1"]}, "init": "random"},
            "training": {
                **{"epochs": 8, "batch_size": 8, "warmup_steps": 2, "checks_per_epoch": 1, "patience": 99},
                **{"freeze_encoder": False, "freeze_embeddings": False, "precision": "fp32"},
                "learning_rate": {"choice": [1e-2, 1e-9]},
            },
            "decoding": {"beams": 1, "max_length": 12},
            "evaluation": {"metric": "bleu", "allow_repetitive_teacher": True},
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
