"""Atomic JSON files."""

import json
from pathlib import Path

import numpy as np
import pytest

from raydistill.core.files import write_json_atomic


def test_json_is_written_atomically_and_nan_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json_atomic(path, {"a": np.float32(0.5)})
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomic(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 0.5}
    assert list(tmp_path.iterdir()) == [path]
