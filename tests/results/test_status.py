"""The state of sweeps, runs and label jobs, read from their files."""

import os
import platform
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from raydistill.config.run import Run
from raydistill.core import artifact
from raydistill.core.artifact import lock_path
from raydistill.core.console import format_duration
from raydistill.core.errors import UserError
from raydistill.core.last_error import record_error
from raydistill.data.corpus import Row
from raydistill.label_sets.batch_plan import make_plan
from raydistill.results.status import format_statuses, read_statuses, run_status
from raydistill.results.sweep_record import StopReason
from raydistill.training.records import PROGRESS_FILE, RUN_FILE, RunProgress, write_history, write_run
from tests.factories.label_sets import write_labels
from tests.factories.sweeps import change_sweep, finish_trial, make_sweep, make_trial, write_result

HOLD = """
import sys, time
from pathlib import Path
from raydistill.core import artifact
with artifact.lock(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


@contextmanager
def locked(folder):
    """A process that holds the lock of a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"locked\n"
        yield process
    finally:
        process.kill()
        process.wait()


def sweep(home, name="news", trials=4):
    folder = home / "sweeps" / name
    folder.mkdir(parents=True)
    make_sweep(folder)
    (folder / "space.yaml").write_text(f"name: {name}\nsearch:\n  trials: {trials}\n")
    return folder


def only(home):
    [job] = read_statuses(home)
    return job


def write_progress(folder, **changes):
    fields = {"step": 40, "total_steps": 100, "resumed_step": 0, "seconds": 20.0, "updated_at": time.time()}
    RunProgress.parse({**fields, **changes}).write(folder / PROGRESS_FILE)


def test_a_sweep_is_running_while_its_process_exists(tmp_path):
    folder = sweep(tmp_path)
    make_trial(folder, "a", 0, 20.0)
    make_trial(folder, "b", 1, 21.5)
    make_trial(folder, "c", 2, 0.0, "failed")
    write_progress(make_trial(folder, "d", 3, 20.0, status=None), step=5, total_steps=20)
    with locked(folder) as process:
        job = only(tmp_path)
        assert (job.state, job.process, job.host) == ("running", process.pid, platform.node())
        assert job.progress == "3 of 4 trials, 1 failed, 5/20 steps"
        assert (job.done, job.total, job.metric) == (3, 4, "rouge2")
        assert job.best == {"4-1": 21.5}
        assert job.error == "c: out of memory"
    killed = only(tmp_path)  # the lock file still names the process
    assert "process" in lock_path(folder).read_text()
    assert (killed.state, killed.process, killed.seconds_left) == ("interrupted", None, None)


def test_a_reused_process_number_is_not_the_owner(tmp_path):
    folder = sweep(tmp_path)
    lock_path(folder).write_text(f"process {os.getpid()} on {platform.node()} since 2020-01-01T00:00:00+00:00\ntoken")
    assert only(tmp_path).state == "interrupted"
    lock_path(folder).write_text("process 1 on another-machine since 2020-01-01T00:00:00+00:00\ntoken")
    assert (only(tmp_path).state, only(tmp_path).host) == ("running", "another-machine")


def test_a_finished_sweep_and_a_sweep_that_ended_with_an_error(tmp_path):
    folder = sweep(tmp_path, trials=1)
    make_trial(folder, "a", 0, 20.0)
    with pytest.raises(OSError, match="disk"), record_error(folder):
        raise OSError("the disk is full")
    assert (only(tmp_path).state, only(tmp_path).error) == ("failed", "the disk is full")
    with record_error(folder):
        change_sweep(folder, status="finished", stop=StopReason())
    assert (only(tmp_path).state, only(tmp_path).error) == ("finished", "")


def test_an_error_after_the_lock_of_a_folder_was_lost_is_raised_and_not_recorded(tmp_path):
    folder = tmp_path / "x"

    def lose_lock_and_fail():
        with artifact.lock(folder), record_error(folder):
            lock_path(folder).unlink()
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        lose_lock_and_fail()
    assert not folder.exists()


def test_time_left_of_a_search_ignores_the_pause_between_two_commands(tmp_path):
    """Trials end a minute apart, after a pause of a day; three of eight are left, and the last ended 30 s ago."""
    folder, now = sweep(tmp_path, trials=8), time.time()
    ends = [-86400 - 330, -86400 - 270, -150, -90, -30]
    for number, end in enumerate(ends):
        make_trial(folder, f"t{number}", number, 20.0)
        os.utime(folder / "trials" / f"t{number}" / "result.json", (now + end, now + end))
    with locked(folder):
        assert only(tmp_path).seconds_left == pytest.approx(3 * 60 - 30, abs=10)


def test_a_run_shows_its_step_and_the_time_left(tmp_path):
    folder = tmp_path / "runs" / "teacher"
    write_run(folder / RUN_FILE, Run(name="teacher", teacher="t", dataset="d", student={"size": "2-1"}))
    assert run_status(folder).progress == "before the first step"
    scored = {"step": 30, "total_steps": 100, "metric": "rouge2"}
    write_history(folder, [{**scored, "score": 12.0, "device_hours": 0.5, "val_loss": 2.0}])
    write_progress(folder, step=40, resumed_step=20, seconds=10.0)
    with locked(folder):
        job = only(tmp_path)
        assert (job.state, job.progress, job.metric) == ("running", "step 40 of 100", "rouge2")
        assert job.best == {"2-1": 12.0}
        assert job.device_hours == 0.5
        assert job.seconds_left == 30  # 20 steps took 10 s, and 60 are left
    assert only(tmp_path).state == "interrupted"
    write_history(folder, [{**scored, "rouge1": 0.0, "rouge2": 0.0, "score": 0.0}])  # two metrics have this value
    assert run_status(folder).metric == "rouge2"
    scores = {"chrf++": 31.0, "score": 31.0}  # `metric: auto` recognised a translation by its columns
    write_history(folder, [{**scored, "metric": "chrf++", **scores}])
    assert run_status(folder).metric == "chrf++"
    write_result(folder, status="failed", reason="the loss is nan", steps=41)
    assert (only(tmp_path).state, only(tmp_path).error) == ("failed", "the loss is nan")
    finish_trial(folder, 0, 20.0)
    assert (only(tmp_path).state, only(tmp_path).error, only(tmp_path).process) == ("finished", "", None)


def test_a_label_job_counts_its_batches(tmp_path):
    folder = tmp_path / "labels" / "news-train-1"
    work = folder.with_name(".news-train-1.work")
    make_plan((Row(("f", i), str(i), "text", "") for i in range(6)), work / "plan", batch_rows=2)
    (work / "out").mkdir()
    (work / "out" / "batch-000000.parquet").touch()
    with locked(folder):
        job = only(tmp_path)
        assert (job.kind, job.state, job.progress) == ("labels", "running", "1 of 3 batches")
        assert only(tmp_path).name == "news-train-1"
    assert only(tmp_path).state == "interrupted"
    write_labels(folder)
    assert (only(tmp_path).state, only(tmp_path).progress) == ("finished", "3 rows")


def test_damaged_records_are_reported_and_other_jobs_are_listed(tmp_path):
    make_trial(sweep(tmp_path, "good", trials=1), "a", 0, 20.0)
    (sweep(tmp_path, "bad") / "sweep.json").write_text("{")
    jobs = {job.name: job for job in read_statuses(tmp_path)}
    assert jobs["good"].done == 1
    assert "sweep.json" in jobs["bad"].error
    assert "bad: last error: " in format_statuses(list(jobs.values()), tmp_path)


def test_one_job_is_selected_by_its_name(tmp_path):
    sweep(tmp_path, "a")
    sweep(tmp_path, "b")
    assert [job.name for job in read_statuses(tmp_path, "b")] == ["b"]
    with pytest.raises(UserError, match=r"c: no sweep, run or label job of this name under .*; existing: a, b"):
        read_statuses(tmp_path, "c")


def test_an_empty_home_is_not_an_error(tmp_path):
    assert format_statuses(read_statuses(tmp_path), tmp_path) == f"no sweep, run or label job under {tmp_path}"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "less than 1 s"), (7, "7 s"), (185, "3 min 05 s"), (3725, "1 h 02 min")]
)
def test_a_time_left_is_never_zero_before_the_end(seconds, text):
    assert format_duration(seconds) == text
