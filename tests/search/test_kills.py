"""A sweep that is killed at twenty random moments ends like an uninterrupted one."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import yaml

from raydistill.config.serving import ServingConfig
from raydistill.results.selection import select_finalists
from raydistill.results.served_students import read_served
from tests.factories.sweeps import KILL_SPACE, mlflow_children
from tests.factories.workspace import WORKER_PROCESSES, environment, make_world, processes_of, wait_for_ray_to_end

KILLS = 20
SERVING_KILLS = 4
# About twice the time from a command's start to its first trial on two slow cores: shorter, and no trial ever starts.
MAX_SECONDS_BETWEEN_KILLS = 40
TRIAL_PROCESS = "ray::ImplicitFunc"
DECODINGS = ("b1", "b2-p0.6", "b2-p1", "b4-p0.6", "b4-p1")
SERVING = {"length_penalty": [0.6, 1.0], "precision": ["fp32"]}
COMBINATIONS = {(method, size) for method in ("sft", "kd") for size in ("2-3", "2-2", "2-1")}


def workers_of(home: Path) -> list[psutil.Process]:
    """Ray's busy worker processes: trials, preparation and serving."""
    return [p for p in processes_of(home) if p.name().startswith(WORKER_PROCESSES)]


def start(path: Path, home: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "raydistill.sweep", str(path), "--json"],
        env=environment(),
        cwd=home.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill_worker(home: Path, rng: random.Random, process: subprocess.Popen[str]) -> str:
    """Send SIGKILL to a running trial, or to another worker if none starts within ten seconds.

    Returns the name of the killed process, empty if there was none.
    """
    patience = time.monotonic() + 10
    workers: list[psutil.Process] = []
    while process.poll() is None and time.monotonic() < patience:
        workers = [p for p in workers_of(home) if p.name().startswith(TRIAL_PROCESS)]
        if workers:
            time.sleep(rng.uniform(0, 1.5))
            break
        time.sleep(0.05)
    try:
        worker = rng.choice(workers or workers_of(home))
        name = worker.name().split(".")[0]
        worker.send_signal(signal.SIGKILL)
    except (IndexError, psutil.NoSuchProcess):
        return ""
    return name


def results_of(home: Path) -> dict[Path, int]:
    """Time of writing of each result.json."""
    return {p: p.stat().st_mtime_ns for p in home.glob("sweeps/killed/trials/*/result.json")}


def enough_kills(killed: Counter[str]) -> bool:
    """Whether there were twenty kills, at least a quarter of them of running trials."""
    return killed.total() >= KILLS and killed[TRIAL_PROCESS] >= KILLS // 4


def run_under_kills(path: Path, home: Path, rng: random.Random, killed: Counter[str]) -> dict:
    """Start the sweep again after every kill until it finishes, and return its summary.

    A sweep may finish before its first kill. A result must not change after any kill. `killed` counts kills by the
    name of the process; workers and drivers are killed in turn. The finalists of a round are served
    without further kills after `SERVING_KILLS`: students are timed in one session, which every kill starts again.
    """
    finished: dict[Path, int] = {}
    serving_kills = 0
    process = start(path, home)
    while True:
        now = results_of(home)
        assert {p: now.get(p) for p in finished} == finished, "a finished trial was repeated"
        finished = now
        undisturbed = enough_kills(killed) or serving_kills >= SERVING_KILLS
        try:
            out, errors = process.communicate(timeout=400 if undisturbed else rng.uniform(1, MAX_SECONDS_BETWEEN_KILLS))
        except subprocess.TimeoutExpired:
            assert not undisturbed, "the sweep does not finish without kills"
            serving_kills += len(finished) == len(COMBINATIONS)
            if killed.total() < 2 * killed["driver"]:  # the driver must recover from the loss
                if name := kill_worker(home, rng, process):
                    killed[name] += 1
                continue
            killed["driver"] += 1
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            wait_for_ray_to_end(home)
            process = start(path, home)
            continue
        assert process.returncode == 0, errors[-3000:]
        assert {p: results_of(home)[p] for p in finished} == finished
        return json.loads(out.strip().splitlines()[-1])


def check_finalists(sweep: Path, summary: dict) -> None:
    """Check that every finalist is served once with its own single beam, and with 2 and 4 beams and two penalties."""
    expected = {(key, name) for key in (t.key for t in select_finalists(sweep)) for name in DECODINGS}
    served = [(t["key"], ServingConfig(**t["serving"]).key) for t in summary["finalists"]]
    assert len(served) == len(set(served))
    assert set(served) == expected
    assert {key for key, _ in expected} >= set(summary["front"]) != set()
    for key, name in expected:
        assert (sweep / "trials" / key / f"rows-validation-{name}.npz").is_file()
    # The teacher is served with each decoding too
    teacher_served = read_served(sweep)
    assert teacher_served
    assert sorted(entry.config.key for entry in teacher_served.entries) == sorted(DECODINGS)
    assert summary["choices"]["any"] in {key for key, _ in expected}
    assert (Path(summary["exports"]["any"]) / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_twenty_kills_at_random_moments_lose_and_repeat_no_trial(tmp_path):
    rng = random.Random(6)
    teacher, data = make_world(tmp_path)
    run = {**KILL_SPACE["run"], "teacher": str(teacher)}
    run["dataset"] = {"name": str(data), "max_source_tokens": 32, "max_target_tokens": 16, "selection_share": 0}
    killed: Counter[str] = Counter()
    losses: dict[str, float] = {}
    for round_ in range(20):
        if enough_kills(killed):
            break
        folder = tmp_path / f"round{round_}"
        home = folder / "outputs"
        folder.mkdir()
        path = folder / "killed.yaml"
        path.write_text(
            yaml.safe_dump(
                {**KILL_SPACE, "run": run, "serving": SERVING, "search": {**KILL_SPACE["search"], "retries": 50}}
            )
        )
        summary = run_under_kills(path, home, rng, killed)
        assert {t["status"] for t in summary["trials"]} == {"done"}
        assert sorted((t["method"], t["size"]) for t in summary["trials"]) == sorted(COMBINATIONS)
        check_finalists(Path(summary["sweep"]), summary)
        # A trial resumes from its state, so kills do not change its result
        for trial in summary["trials"]:
            loss = trial["metrics"]["val_loss"]
            assert loss == pytest.approx(losses.setdefault(trial["key"], loss), rel=0.02)
        assert {p.name for p in home.glob("sweeps/killed/trials/*/")} == set(losses)
        assert sorted(key for key, _ in mlflow_children(home)) == sorted(t["key"] for t in summary["trials"])
        for history in home.glob("sweeps/killed/trials/*/metrics.jsonl"):
            steps = [json.loads(line)["step"] for line in history.read_text().splitlines()]
            assert steps == sorted(set(steps))
            assert len(steps) == 12
        wait_for_ray_to_end(home)
    print(f"kills: {dict(killed)}")
    assert enough_kills(killed), killed
