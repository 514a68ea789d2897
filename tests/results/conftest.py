"""A sweep's folder with served, unserved and failed trials."""

from pathlib import Path

import pytest

from tests.factories.sweeps import change_result, make_trial, served_student, sweep_record, write_served


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Trials a (served with two configurations), b and c (not served), and d (failed, with HTML in its reason)."""
    sweep_record(budgets={"fast": {"latency_ms": "50%"}}).write(tmp_path / "sweep.json")
    make_trial(tmp_path, "a", 0, 10.0)
    make_trial(tmp_path, "b", 1, 12.0)
    make_trial(tmp_path, "c", 2, 9.0)
    change_result(make_trial(tmp_path, "d", 3, 1.0, status="failed"), reason="</script><b>loss")
    entries = [
        served_student(beams, 0.6, score, {"latency_ms": latency_ms})
        for beams, score, latency_ms in ((4, 10.0, 90.0), (1, 8.0, 30.0))
    ]
    write_served(tmp_path / "trials" / "a", *entries)
    return tmp_path
