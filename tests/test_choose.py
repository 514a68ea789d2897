"""The command as a person runs it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raydistill.choose import parse_bounds
from raydistill.config.errors import UserError
from tests.test_tracking import make_trial, sweep

__all__ = ["sweep"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "raydistill.choose", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_bounds_are_parsed_and_refused() -> None:
    assert parse_bounds(["latency_ms=900", "params_m=50%"]) == {"latency_ms": 900.0, "params_m": "50%"}
    for bad in ("latency_ms", "=3", "latency_ms=", "latency=3", "latency_ms=fast", "latency_ms=-1"):
        with pytest.raises(UserError, match="--within"):
            parse_bounds([bad])
    for endless in ("latency_ms=inf", "latency_ms=1e999", "params_m=inf%"):
        with pytest.raises(UserError, match=r"which bounds nothing; leave .* out instead"):
            parse_bounds([endless])
    for bad in ("latency_ms=nan", "latency_ms=-inf", "latency_ms=nan%"):
        with pytest.raises(UserError, match="expected a number above 0"):
            parse_bounds([bad])
    with pytest.raises(UserError, match="twice"):
        parse_bounds(["params_m=1", "params_m=2"])


def test_input_is_checked_before_anything_heavy(sweep: Path) -> None:
    start = time.monotonic()
    bad_bound = run("mini", "--within", "latency=900")
    assert time.monotonic() - start < 4  # under one second alone; test machines are busy
    assert bad_bound.returncode == 2
    assert "cannot bound 'latency'" in bad_bound.stderr
    endless = run("mini", "--within", "latency_ms=inf")
    assert endless.returncode == 2
    assert "--within latency_ms=inf: latency_ms is 'inf', which bounds nothing" in endless.stderr
    unknown = run("minni", "--within", "latency_ms=900")
    assert unknown.returncode == 2
    assert "no such sweep; sweeps in" in unknown.stderr


def test_the_stored_budget_is_chosen_and_registered(sweep: Path) -> None:
    make_trial(sweep, "a", 0, 10.0)  # latency 100
    make_trial(sweep, "b", 1, 16.0)  # latency 160, beyond half of the teacher's 300
    result = run("mini", "--json")
    assert result.returncode == 0, result.stderr
    (choice,) = json.loads(result.stdout)["choices"]
    assert (choice["budget"], choice["key"], choice["score"]) == ("fast", "a", 10.0)
    assert choice["registered"]["uri"] == "models:/mini@fast"
    assert "from_pretrained" in result.stderr


def test_nothing_fits_ends_with_2_and_the_nearest_miss(sweep: Path) -> None:
    make_trial(sweep, "a", 0, 10.0)
    result = run("mini", "--within", "latency_ms=50", "--no-register")
    assert result.returncode == 2
    assert "the nearest is 4-1 kd (trial 0) with latency_ms 100 (100.0% over)" in result.stderr
