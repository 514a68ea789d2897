"""Ctrl-C during a search ends the command, and publishes nothing."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.factories.sweeps import write_kill_space
from tests.factories.workspace import command, environment, last_json, wait_for_ray_to_end

SERVED_AND_PUBLISHED = ("served.json", "exports", "front.html")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_interrupted_sweep_keeps_finished_trials_and_publishes_nothing(tmp_path: Path) -> None:
    path, home = write_kill_space(tmp_path), tmp_path / "outputs"
    process = subprocess.Popen(
        [sys.executable, "-m", "raydistill.sweep", str(path), "--json"],
        env=environment(),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A process that is started in the background inherits that SIGINT is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list(home.glob("sweeps/killed/trials/*/result.json")):
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.1)
    interrupted_at = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors[-3000:]
    assert time.monotonic() - interrupted_at < 30
    assert not out
    assert errors.splitlines()[-2:] == [
        "interrupted: finished work is kept; ending Ray's processes",
        "interrupted; run the same command again to resume",
    ]
    sweep = home / "sweeps" / "killed"
    assert json.loads((sweep / "sweep.json").read_text())["status"] == "running"
    assert not [name for name in SERVED_AND_PUBLISHED if (sweep / name).exists()]
    finished = {p: p.stat().st_mtime_ns for p in sweep.glob("trials/*/result.json")}
    assert finished
    wait_for_ray_to_end(home)

    resumed = command(home, "sweep", path, "--json")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert {trial["status"] for trial in last_json(resumed)["trials"]} == {"done"}
    assert {p: p.stat().st_mtime_ns for p in finished} == finished
