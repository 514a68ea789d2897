"""The estimated cost of a sweep."""

import pytest

from raydistill.config.run import Run
from raydistill.config.space import Space, corner_runs
from raydistill.search.estimate import (
    Machine,
    RunTiming,
    combine_timings,
    estimate_sweep,
    runs_to_time,
    trial_device_hours,
)
from tests.factories.workspace import make_world

RUN = {"teacher": "t", "dataset": {"name": "d", "selection_share": 0}}


def run(**settings):
    return Run.model_validate({"name": "r", **RUN, **settings})


def test_hours_of_a_trial_count_steps_validations_and_final_scores():
    """100 rows of 10 are 10 steps an epoch, so 20 in all, with 4 validations and a final score of 50 rows each."""
    training = {"batch_size": 10, "epochs": 2, "checks_per_epoch": 2, "threads": 2}
    rows = {"train": 100, "validation": 50, "test": 30}
    hours = trial_device_hours(run(training=training), rows, RunTiming(0.5, 0.1, 7.0), "cpu")
    # 20 steps of 0.5 s, 5 * 50 + 30 rows of 0.1 s, and 7 s, on two cores
    assert hours == pytest.approx(2 * (10 + 28 + 7) / 3600)


def test_the_ends_of_the_shapes_are_timed_for_every_method_and_pseudo_labels_are_replaced():
    runs = [
        run(method=method, student={"size": size}) for method in ("sft", "kd", "pl") for size in ("6-1", "6-2", "6-3")
    ]
    timed = runs_to_time(runs)
    assert [(r.method, r.student.size) for r in timed] == [("kd", "6-1"), ("kd", "6-3"), ("sft", "6-1"), ("sft", "6-3")]
    assert not any(r.uses_pseudo_labels for r in timed)


def test_the_estimate_is_the_mean_over_the_runs_times_the_trials_and_the_labels():
    training = {"batch_size": 10, "epochs": 1, "checks_per_epoch": 1}
    runs = [run(method=method, student={"size": "2-1"}, training=training) for method in ("sft", "kd", "pl")]
    timings = {"sft 2-1": RunTiming(1.0, 0.0, 0.0), "kd 2-1": RunTiming(4.0, 0.0, 0.0)}
    rows = {"train": 100, "validation": 5, "test": 0}
    estimate = combine_timings(runs, 6, rows, timings, 0.5, Machine("cpu", 4))
    # ten steps: sft 10 s, kd 40 s, and pl as sft 10 s
    assert estimate.trial_hours == pytest.approx(20 / 3600)
    assert estimate.device_hours == pytest.approx(6 * 20 / 3600 + 0.5)
    assert "on this machine's 4 CPU cores: about 0.133 hours" in estimate.describe(6)[-1]  # 0.5333 / 4


def test_real_runs_of_a_few_steps_are_timed(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "outputs"))
    teacher, data = make_world(tmp_path)
    limits = {"max_source_tokens": 32, "max_target_tokens": 16}
    section = {
        "teacher": str(teacher),
        "dataset": {"name": str(data), **limits},
        "method": {"choice": ["kd", "pl"]},
        "student": {"size": "2-1"},
        "training": {"batch_size": 4},
        "decoding": {"beams": 1, "max_length": 12},
    }
    space = Space.model_validate({"name": "s", "run": section, "search": {"trials": 3}})
    estimate = estimate_sweep(space)
    assert set(estimate.timings) == {"kd 2-1", "sft 2-1"}
    assert all(timing.step > 0 and timing.validated_row > 0 for timing in estimate.timings.values())
    assert estimate.label_hours > 0
    assert estimate.device_hours == pytest.approx(3 * estimate.trial_hours + estimate.label_hours)
    assert not (tmp_path / "outputs" / "sweeps").exists()
    assert {r.method for r in corner_runs(space)} == {"kd", "pl"}
