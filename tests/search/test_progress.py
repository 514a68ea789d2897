"""The lines that a search prints."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from raydistill.cluster import snapshots
from raydistill.config.space import Search
from raydistill.core.errors import TransientError
from raydistill.results.sweep_record import TeacherPasses
from raydistill.search import progress as progress_module
from raydistill.search.progress import ProgressCallback
from tests.factories import sweeps
from tests.factories.clock import FakeClock
from tests.factories.sweeps import sweep_record, sweep_teacher


def write_record(sweep: Path, teacher_hours: float) -> None:
    passes = TeacherPasses(stores={"encoder-1/states": teacher_hours})
    sweep_record(sweep_teacher(passes=passes)).write(sweep / "sweep.json")


def write_result(sweep: Path, key: str, size: str, status: str, **metrics: float) -> None:
    sweeps.write_result(sweep / "trials" / key, status=status, size=size, metrics=metrics)


def test_a_finished_trial_is_followed_by_the_state_of_the_search(capsys, tmp_path, monkeypatch):
    """One trial was finished before, and the teacher's passes took a quarter of an hour. Each trial takes a minute."""
    clock = FakeClock()
    monkeypatch.setattr(progress_module, "time", clock)
    write_record(tmp_path, 0.25)
    write_result(tmp_path, "before", "2-2", "done", rouge2=15.0, device_hours=1.0)
    progress = ProgressCallback(tmp_path, Search(trials=6), "rouge2")
    for number, (size, score) in enumerate([("2-3", 20.0), ("2-1", 9.0), ("2-3", 18.0)]):
        trial = SimpleNamespace(trial_id=str(number), config={"number": number, "key": f"k{number}", "size": size})
        progress.on_trial_start(0, [], trial)
        clock.sleep(60)
        progress.on_trial_result(0, [], trial, {"step": 5, "score": score - 1})
        write_result(tmp_path, f"k{number}", size, "done", rouge2=score, device_hours=0.5)
        progress.on_trial_result(
            0, [], trial, {"finished": True, "status": "done", "score": score, "device_hours": 0.5}
        )
    failed = SimpleNamespace(trial_id="9", config={"number": 9, "key": "k9", "size": "2-1"})
    progress.on_trial_start(0, [], failed)
    clock.sleep(60)
    write_result(tmp_path, "k9", "2-1", "failed", device_hours=0.25)
    progress.on_trial_result(0, [], failed, {"finished": True, "status": "failed", "device_hours": 0.25})
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2] == "trial 9 k9 finished after 60 s: failed"
    # four trials in four minutes, one left
    assert lines[-1] == (
        "  5 of 6 trials finished; 3.000 device-hours; about 1 min left; best so far: 2-1 9.00, 2-2 15.00, 2-3 20.00"
    )


def test_the_time_left_is_never_zero_before_the_end(tmp_path, monkeypatch):
    """Two trials took ten seconds, and one is left."""
    clock = FakeClock()
    monkeypatch.setattr(progress_module, "time", clock)
    write_record(tmp_path, 0.0)
    progress = ProgressCallback(tmp_path, Search(trials=3), "rouge2")
    for key in ("k1", "k2"):
        clock.sleep(5)
        write_result(tmp_path, key, "2-1", "done", rouge2=1.0)
    assert "; less than 1 min left;" in progress.status_line(clock.monotonic())


def test_a_restarted_trial_resumes_and_an_error_is_printed(capsys, tmp_path):
    write_record(tmp_path, 0.0)
    progress = ProgressCallback(tmp_path, Search(trials=2), "rouge2")
    trial = SimpleNamespace(trial_id="a", config={"number": 1, "key": "k1"}, error_file=None)
    for _ in range(2):
        progress.on_trial_start(0, [], trial)
    progress.on_trial_result(0, [], trial, {"step": 0, "error_message": "out of memory"})
    (tmp_path / "error.txt").write_text("Traceback\nRuntimeError: lost\n\n")
    trial.error_file = str(tmp_path / "error.txt")
    progress.on_trial_error(0, [], trial)
    assert capsys.readouterr().err.splitlines() == [
        "trial 1 k1 starts",
        "trial 1 k1 resumes",
        "trial 1 k1 failed: out of memory",
        "trial 1 k1 failed: RuntimeError: lost",
    ]


def test_the_time_left_respects_the_limits_of_the_search(tmp_path):
    """Ten of twenty trials took an hour and two device-hours, so the rest takes another hour."""
    write_record(tmp_path, 1.0)

    def minutes_left(**limits: float) -> float | None:
        progress = ProgressCallback(tmp_path, Search(trials=20, **limits), "rouge2", setup_s=300)
        return progress.estimate_minutes_left(3600, num_finished=10, hours=3.0)

    assert minutes_left() == 60
    assert minutes_left(max_hours=1.5) == 25
    assert minutes_left(max_device_hours=3.5) == 15  # one of the three was the teacher's
    assert minutes_left(max_hours=1.2, max_device_hours=3.5) == pytest.approx(7)
    assert minutes_left(max_device_hours=2.5) == 0


def test_an_outage_of_the_storage_does_not_end_the_search(capsys, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise TransientError("no answer")

    monkeypatch.setattr(snapshots, "pull_records", fail)
    write_record(tmp_path, 0.25)
    progress = ProgressCallback(tmp_path, Search(trials=2), "rouge2")
    for key, engine in (("k1", "ctranslate2 fp32"), ("k2", "transformers fp32")):
        sweeps.write_result(tmp_path / "trials" / key, engine=engine, size="2-1", metrics={"rouge2": 9.0})
    trial = SimpleNamespace(trial_id="a", config={"number": 1, "key": "k1"})
    progress.on_trial_result(0, [], trial, {"finished": True, "status": "done", "score": 9.0})
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("  2 of 2 trials finished")
    assert line.endswith("; scored by different engines: ctranslate2 fp32, transformers fp32")
