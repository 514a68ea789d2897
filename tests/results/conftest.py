"""A sweep's folder with served, unserved and failed trials."""

from pathlib import Path

import pytest

from raydistill.core.files import SCHEMA_VERSION, write_json_atomic
from tests.factories.sweeps import change_result, make_trial


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Trials a (served with two decodings), b and c (not served), and d (failed, with HTML in its reason)."""
    teacher = {"name": "big", "size": "4-4", "metrics": {"rouge2": 20.0}, "costs": {"latency_ms": 300.0}}
    record = {"schema": SCHEMA_VERSION, "name": "mini", "metric": "rouge2", "teacher": teacher}
    record["budgets"] = {"fast": {"latency_ms": "50%"}}
    write_json_atomic(tmp_path / "sweep.json", record)
    make_trial(tmp_path, "a", 0, 10.0)
    make_trial(tmp_path, "b", 1, 12.0)
    make_trial(tmp_path, "c", 2, 9.0)
    change_result(make_trial(tmp_path, "d", 3, 1.0, status="failed"), reason="</script><b>loss")
    entries = [
        {
            "beams": beams,
            "length_penalty": 0.6,
            "metrics": {"rouge2": score},
            "interval": [score - 1, score + 1],
            "costs": {"latency_ms": latency_ms},
        }
        for beams, score, latency_ms in ((4, 10.0, 90.0), (1, 8.0, 30.0))
    ]
    write_json_atomic(tmp_path / "trials" / "a" / "served.json", {"engine": "ctranslate2 fp32", "decodings": entries})
    return tmp_path
