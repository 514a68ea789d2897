"""The index of a sweep's trials: what is read again, counted in files; and that changes are seen."""

import json
import shutil
from dataclasses import replace

import pytest

from raydistill.results import records
from raydistill.results.records import read_trials
from raydistill.results.sweep_record import TeacherPasses
from raydistill.results.trial_index import TrialIndex
from raydistill.search.early_stopping import peer_curves
from raydistill.training import records as training_records
from tests.factories.sweeps import finish_trial, make_repeat, make_trial, sweep_record, sweep_teacher


@pytest.fixture
def read_files(monkeypatch):
    """The files of trials that are read, as KEY/NAME, in order."""
    names = []
    read_json, read_history = training_records.read_json, records.read_history

    def count_json(path, *args):
        names.append(f"{path.parent.name}/{path.name}")
        return read_json(path, *args)

    def count_history(folder, *args):
        names.append(f"{folder.name}/metrics.jsonl")
        return read_history(folder, *args)

    monkeypatch.setattr(training_records, "read_json", count_json)
    monkeypatch.setattr("raydistill.core.records.read_json", count_json)
    monkeypatch.setattr(records, "read_history", count_history)
    return names


def add_validation(folder, step, score):
    """Append a validation to a trial of 20 steps."""
    line = {"step": step, "total_steps": 20, "metric": "rouge2", "score": score, "device_hours": step / 20}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def test_a_validation_reads_the_files_that_changed_and_not_those_of_finished_trials(tmp_path, read_files):
    for number in range(30):
        make_trial(tmp_path, f"done{number:02d}", number, float(number))
    own, other = (make_trial(tmp_path, key, 0, 8.0, status=None) for key in ("own", "other"))
    peer_curves(tmp_path, "own")
    # result.json, run.json and metrics.jsonl; a running trial has no result, and its config is read for its status too
    assert len(read_files) == 30 * 3 + 3 + 4
    for step in (12, 14, 16):
        read_files.clear()
        add_validation(own, step, 9.0)
        curve, peers, _ = peer_curves(tmp_path, "own")
        assert curve[-1] == (step / 20, 9.0)
        assert len(peers) == 31
        # A running trial is read to know whether it is finished, and for the warm-up of the trial itself
        assert set(read_files) == {"own/run.json", "own/metrics.jsonl"}
    add_validation(other, 12, 7.0)
    read_files.clear()
    _, peers, _ = peer_curves(tmp_path, "own")
    assert [peer[-1] for peer in peers if peer[-1][0] == 0.6] == [(0.6, 7.0)]
    assert {name.split("/")[0] for name in read_files} == {"own", "other"}


def test_the_cost_of_a_question_does_not_grow_with_the_finished_trials(tmp_path, read_files):
    own = make_trial(tmp_path, "own", 0, 8.0, status=None)
    counts = []
    for number in range(12):
        make_trial(tmp_path, f"trial{number:02d}", number, float(number))
        add_validation(own, 11, 8.0)
        peer_curves(tmp_path, "own")
        counts.append(len(read_files))
        read_files.clear()
    assert set(counts[1:]) == {counts[1]}


def test_an_index_equals_a_fresh_reading_after_every_change(tmp_path):
    passes = TeacherPasses(stores={"encoder-1/states": 0.25})
    sweep_record(sweep_teacher(passes=passes)).write(tmp_path / "sweep.json")
    index = TrialIndex(tmp_path)

    def check(num_finished):
        fresh = read_trials(tmp_path)
        expected = {trial.key: replace(trial, repeats=()) for trial in fresh}
        assert {key: indexed.trial for key, indexed in index.read().items()} == expected
        assert len(index.finished()) == num_finished
        runs = [run for trial in fresh for run in (trial, *trial.repeats)]
        assert index.device_hours() == 0.25 + sum(run.device_hours for run in runs)
        for trial in fresh:
            assert index.read()[trial.key].history == trial.history()
            assert index.read()[trial.key].shape == trial.requested_shape()

    check(0)
    running = make_trial(tmp_path, "a", 0, 8.0, status=None)
    check(0)
    add_validation(running, 20, 9.0)
    check(0)
    finish_trial(running, 0, 9.0)
    check(1)
    make_trial(tmp_path, "b", 1, 3.0, status="failed")
    (tmp_path / "trials" / "file").write_text("no trial")
    (tmp_path / "trials" / "empty").mkdir()
    check(2)
    make_repeat(tmp_path, "a", 1, 7.0)
    check(2)
    assert [len(trial.repeats) for trial in read_trials(tmp_path)] == [1, 0]
    shutil.rmtree(running)  # the repeat counts no longer
    check(1)
    make_trial(tmp_path, "a", 2, 5.0)
    check(2)


def test_runs_with_other_seeds_are_read_once(tmp_path, read_files):
    sweep_record(sweep_teacher(passes=TeacherPasses(stores={}))).write(tmp_path / "sweep.json")
    make_trial(tmp_path, "a", 0, 8.0)
    repeat = make_repeat(tmp_path, "a", 1, 7.0)
    index = TrialIndex(tmp_path)
    hours = index.device_hours()
    assert f"{repeat.name}/result.json" in read_files
    read_files.clear()
    assert index.device_hours() == hours
    assert read_files == [f"{tmp_path.name}/sweep.json"]
