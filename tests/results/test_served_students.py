"""Students as served: one per configuration, and the timings of trials that were not served."""

from dataclasses import replace
from pathlib import Path

from raydistill.results.selection import load_selection
from raydistill.results.served_students import impute_served_timing
from tests.factories.sweeps import served_student


def test_front_holds_pairs_of_checkpoint_and_configuration(sweep: Path) -> None:
    selection = load_selection(sweep)
    assert selection.front_keys == ["a b1", "a b4-p0.6"]
    assert [selection.trial_key(key) for key in selection.front_keys] == ["a", "a"]
    fastest = selection.student("a b1")
    assert fastest.label == "4-1 kd (trial 0, 1 beam)"
    assert (fastest.metrics["latency_ms"], fastest.metrics["speedup"], fastest.test) == (30.0, 10.0, None)
    # The checkpoint's own decoding, for which the trial's test scores hold
    assert selection.student("a b4-p0.6").test == {"rouge2": 9.5, "interval": [8.0, 10.0]}


def test_unserved_trial_takes_the_timing_of_the_first_served_student_of_its_size(sweep: Path) -> None:
    selection = load_selection(sweep)
    b = next(trial for trial in selection.plotted_trials if trial.key == "b")
    assert b.metrics["latency_ms"] == 90.0  # of trial a with its own decoding
    assert b.measured_with == "ctranslate2 fp32, some CPU, 2 threads, on 4-1 kd (trial 0, 4 beams, length penalty 0.6)"
    assert selection.trials[1].metrics.get("latency_ms") != 90.0  # the table of trials keeps the search's measurement


def test_unserved_trial_of_a_size_without_served_students_is_left_out(sweep: Path) -> None:
    selection = load_selection(sweep)
    other_size = replace(selection.trials[1], size="4-3")
    imputed = impute_served_timing([other_size, selection.trials[2]], selection.students)
    assert [trial.key for trial in imputed] == ["c"]


def test_scores_of_the_test_split_name_the_engine_that_scored_it() -> None:
    entry = served_student(1, 1.0, 20.0, {}, precision="int8").entry
    scores = entry.as_split_scores()
    assert scores.engine == "ctranslate2 int8"
    assert (scores.metrics, scores.interval) == (entry.metrics, entry.interval)
