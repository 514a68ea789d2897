"""The summary of a sweep, as text and for programs."""

from pathlib import Path

from raydistill.results.selection import load_selection
from raydistill.search.summary import format_summary, summary_record
from tests.factories.sweeps import change_sweep, make_student, make_trial, sweep_teacher

COSTS = {"latency_ms": 300.0, "params_m": 8.0}


def test_summary_without_a_finished_trial_names_what_to_retry(sweep: Path) -> None:
    change_sweep(sweep, teacher=sweep_teacher(costs=COSTS))
    make_trial(sweep, "a", 0, 10.0, status=None)
    selection = load_selection(sweep)
    lines = format_summary(selection, failed=["a"], abandoned=["b", "c"]).splitlines()
    assert lines[0].startswith("sweep mini: 1 trial")
    assert lines[1].endswith(", 300.0 ms for 32, 8.00 M parameters")
    assert "1 trial failed; rerun the command to retry: a" in lines
    assert "2 trials abandoned, since no budget admits the size any more: b, c" in lines
    assert not any(line.startswith("chosen students") for line in lines)
    record = summary_record(selection)
    assert (record["front"], record["choices"], record["finalists"]) == ([], {"fast": None}, [])


def test_summary_names_the_choice_of_each_budget(sweep: Path) -> None:
    change_sweep(sweep, teacher=sweep_teacher(costs=COSTS))
    make_student(sweep, "a", 0, 10.0)
    selection = load_selection(sweep)
    record = summary_record(selection)
    assert (record["name"], record["choices"]) == ("mini", {"fast": "a"})
    assert record["serving"]["fast"]["beams"] == 1
    assert [trial["key"] for trial in record["trials"]] == ["a"]
    lines = format_summary(selection, [], []).splitlines()
    assert f"fast: {selection.choices['fast'].reason}" in lines
    assert lines[-1] == f"chosen students: {sweep / 'exports'}"
