"""A sweep that is killed at twenty random moments ends as one that was left alone."""

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

from raydistill.core.files import read_json
from raydistill.results.records import decoding_key
from raydistill.results.selection import select_finalists
from tests.factories.sweeps import KILL_SPACE, mlflow_children
from tests.factories.workspace import WORKER_PROCESSES, environment, make_world, processes_of, wait_for_ray_to_end

KILLS = 20
TRIAL = "ray::ImplicitFunc"
DECODINGS = ("b1", "b2-p0.6", "b2-p1", "b4-p0.6", "b4-p1")
WANTED = {(method, size) for method in ("sft", "kd") for size in ("2-3", "2-2", "2-1")}


def workers_of(home: Path) -> list[psutil.Process]:
    """Ray's worker processes that have work: trials, and what prepares or judges them."""
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


def strike_worker(home: Path, rng: random.Random, process: subprocess.Popen[str]) -> str:
    """SIGKILL to a trial that is at work, which is waited for; to another worker where none comes; its name, if any."""
    patience = time.monotonic() + 10
    workers: list[psutil.Process] = []
    while process.poll() is None and time.monotonic() < patience:
        workers = [p for p in workers_of(home) if p.name().startswith(TRIAL)]
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
    """When each trial's result was written."""
    return {p: p.stat().st_mtime_ns for p in home.glob("sweeps/killed/trials/*/result.json")}


def enough(struck: Counter[str]) -> bool:
    """Twenty kills, a quarter of them of trials at work (the rest are drivers, and workers that judge or time)."""
    return struck.total() >= KILLS and struck[TRIAL] >= KILLS // 4


def run_under_kills(path: Path, home: Path, rng: random.Random, struck: Counter[str]) -> dict:
    """Start the sweep again and again until it ends by itself; what it printed.

    A sweep may end before its first kill. A trial that was over at any kill must have the same result at the next, and
    at the end. `struck` counts what was killed, by name; it is a worker's turn, a trial's if one comes to work, while
    fewer workers than drivers were.
    """
    over: dict[Path, int] = {}
    process = start(path, home)
    while True:
        now = results_of(home)
        assert {p: now.get(p) for p in over} == over, "a finished trial was done again"
        over = now
        try:
            out, errors = process.communicate(timeout=rng.uniform(1, 18) if not enough(struck) else 280)
        except subprocess.TimeoutExpired:
            if struck.total() < 2 * struck["driver"]:  # the sweep itself must get over it
                if name := strike_worker(home, rng, process):
                    struck[name] += 1
                continue
            struck["driver"] += 1
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            wait_for_ray_to_end(home)
            process = start(path, home)
            continue
        assert process.returncode == 0, errors[-3000:]
        assert {p: results_of(home)[p] for p in over} == over
        return json.loads(out.strip().splitlines()[-1])


def check_finalists(sweep: Path, found: dict) -> None:
    """Every finalist stands once with each decoding: its own of one beam, and 2 and 4 beams with two penalties."""
    wanted = {(key, name) for key in (t.key for t in select_finalists(sweep)) for name in DECODINGS}
    stand = [(t["key"], decoding_key(t["decoding"])) for t in found["finalists"]]
    assert len(stand) == len(set(stand))
    assert set(stand) == wanted
    assert {key for key, _ in wanted} >= set(found["front"]) != set()
    for key, name in wanted:
        assert (sweep / "trials" / key / f"rows-validation-{name}.npz").is_file()
    # The teacher is timed with each of them too, for the speed-up at the same decoding.
    assert sorted(map(decoding_key, read_json(sweep / "served.json")["decodings"])) == sorted(DECODINGS)
    assert found["choices"]["any"] in {key for key, _ in wanted}
    assert (Path(found["exports"]["any"]) / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_killed_at_twenty_random_moments_the_same_trials_stand_once_each(tmp_path):
    rng = random.Random(6)
    teacher, data = make_world(tmp_path)
    run = {**KILL_SPACE["run"], "teacher": str(teacher)}
    run["dataset"] = {"name": str(data), "max_source_tokens": 32, "max_target_tokens": 16}
    struck: Counter[str] = Counter()
    losses: dict[str, float] = {}
    for round_ in range(20):
        if enough(struck):
            break
        place = tmp_path / f"round{round_}"
        home = place / "outputs"
        place.mkdir()
        path = place / "killed.yaml"
        path.write_text(yaml.safe_dump({**KILL_SPACE, "run": run, "search": {**KILL_SPACE["search"], "retries": 50}}))
        found = run_under_kills(path, home, rng, struck)
        assert {t["status"] for t in found["trials"]} == {"done"}
        assert sorted((t["method"], t["size"]) for t in found["trials"]) == sorted(WANTED)
        check_finalists(Path(found["sweep"]), found)
        # However often a trial was killed, it came to the same: it went on from its own state.
        for trial in found["trials"]:
            loss = trial["metrics"]["val_loss"]
            assert loss == pytest.approx(losses.setdefault(trial["key"], loss), rel=0.02)
        assert {p.name for p in home.glob("sweeps/killed/trials/*/")} == set(losses)
        assert sorted(key for key, _ in mlflow_children(home)) == sorted(t["key"] for t in found["trials"])
        for history in home.glob("sweeps/killed/trials/*/metrics.jsonl"):
            steps = [json.loads(line)["step"] for line in history.read_text().splitlines()]
            assert steps == sorted(set(steps))
            assert len(steps) == 12
        wait_for_ray_to_end(home)
    print(f"struck: {dict(struck)}")
    assert enough(struck), struck
