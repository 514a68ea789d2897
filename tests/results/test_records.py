"""Records of trials read from disk, and damaged files."""

from pathlib import Path

import pytest

from raydistill.core.errors import UserError
from raydistill.results import records, sweep_record
from tests.factories.sweeps import make_sweep, make_trial


def test_records_are_read_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder = make_trial(tmp_path, "a", 0, 10.0)
    (trial,) = records.read_trials(tmp_path)
    assert (trial.size, trial.score("rouge2"), trial.interval, trial.steps) == ("4-1", 10.0, (9.0, 11.0), 20)
    assert len(trial.history()) == 2
    rows = trial.row_statistics()
    assert rows is not None
    assert rows.tolist() == [10.0] * 20
    assert trial.row_statistics("test") is None
    (folder / "result.json").write_text('{"status": "do')
    with pytest.raises(UserError, match=r"a/result.json: damaged"):
        records.read_trials(tmp_path)


def test_running_trial_has_no_number(tmp_path: Path) -> None:
    make_trial(tmp_path, "b", 0, 10.0)
    make_trial(tmp_path, "a", 1, 10.0, status=None)
    first, running = records.read_trials(tmp_path)
    assert (first.number, first.label) == (0, "4-1 kd (trial 0)")
    assert (running.status, running.number, running.label) == ("running", None, "a")


def test_unknown_sweep_error_lists_the_existing_sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path))
    sweep = make_sweep(tmp_path / "sweeps" / "mini")
    assert records.find_sweep("mini") == sweep
    assert records.find_sweep(str(sweep)) == sweep
    with pytest.raises(UserError, match=r"minni: no such sweep; sweeps in .*: mini"):
        records.find_sweep("minni")


def test_sweep_record_of_another_schema_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text('{"name": "old"}')
    with pytest.raises(UserError, match=r"sweep\.json: schema version 1, but"):
        sweep_record.read_sweep(tmp_path)
