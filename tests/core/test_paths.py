"""Where raydistill writes."""

from pathlib import Path

import pytest

from raydistill.core.paths import raydistill_home


def test_home_is_an_absolute_path_of_the_environment_or_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYDISTILL_HOME", "elsewhere/out")
    assert raydistill_home() == tmp_path / "elsewhere" / "out"
    monkeypatch.delenv("RAYDISTILL_HOME")
    assert raydistill_home() == tmp_path / "outputs"
