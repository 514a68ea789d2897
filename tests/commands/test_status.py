"""The command `raydistill status`."""

import json
import os
import signal
import subprocess
import sys

from tests.factories.sweeps import make_sweep, make_trial


def start(home, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "raydistill.status", *arguments],
        env={**os.environ, "RAYDISTILL_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_watch_prints_again_until_ctrl_c(tmp_path):
    sweep = tmp_path / "sweeps" / "news"
    sweep.mkdir(parents=True)
    make_sweep(sweep)
    process = start(tmp_path, "--watch", "--interval", "0.1", "--json")
    first = json.loads(process.stdout.readline())
    assert [(job["name"], job["done"]) for job in first["jobs"]] == [("news", 0)]
    make_trial(sweep, "a", 0, 20.0)
    while json.loads(process.stdout.readline())["jobs"][0]["done"] == 0:
        pass
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


def test_an_unknown_name_is_an_error(tmp_path):
    process = start(tmp_path, "news")
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert "error: news: no sweep, run or label job of this name" in errors
