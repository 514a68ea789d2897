"""Latencies of a session: ratios times the baseline's median, both speed-ups, and undecided bounds."""

from pathlib import Path

import pytest

from raydistill.config.serving import ServingConfig
from raydistill.results.selection import load_selection
from raydistill.results.serving_latency import LATENCY_FILE, TEACHER_SHAPE, LatencySession, TimedServing, read_session
from tests.factories.sweeps import make_sweep, make_trial, paired_timing, served_student, write_served

INT8 = {"precision": "int8", "shortlist": 4000}


@pytest.fixture
def session(tmp_path: Path) -> LatencySession:
    """The teacher takes 300 ms with its own decoding, and 150 ms in int8; a student takes 60 ms in int8."""
    make_sweep(tmp_path)
    trial = make_trial(tmp_path, "a", 0, 10.0)
    write_served(trial, served_student(1, 1.0, 10.0, {"latency_ms": 60.0, "latency_ms_b1": 2.0}, INT8))
    session = read_session(tmp_path)
    assert session is not None
    config = ServingConfig(beams=1, length_penalty=1.0, precision="int8", shortlist=4000)
    teacher = [
        TimedServing(shape=TEACHER_SHAPE, config=config, cost=cost, engine="e", timing=paired_timing(0.5), peak_mb=7.0)
        for cost in session.baseline_ms
    ]
    return session.model_copy(update={"servings": [*session.servings, *teacher]})


def test_speedups_are_over_the_teacher_today_and_over_the_teacher_served_the_same_way(
    session: LatencySession, tmp_path: Path
) -> None:
    session.write(tmp_path / LATENCY_FILE)
    selection = load_selection(tmp_path)
    [student] = selection.students
    assert student.key == "a b1-int8-s4000"
    assert student.metrics["latency_ms"] == pytest.approx(60.0)
    assert student.metrics["speedup"] == pytest.approx(5.0)
    assert student.metrics["speedup_same_serving"] == pytest.approx(2.5)
    assert student.metrics["memory_mb"] == 12.0
    assert selection.teacher.costs["latency_ms"] == 300.0
    assert student.serving is not None
    assert session.costs(TEACHER_SHAPE, student.serving)["peak_mb"] == 7.0


def test_a_student_that_the_session_did_not_time_is_no_candidate(session: LatencySession, tmp_path: Path) -> None:
    write_served(tmp_path / "trials" / "a", served_student(1, 1.0, 10.0, {"latency_ms": 60.0}, INT8))
    session.model_copy(update={"servings": session.servings[:1]}).write(tmp_path / LATENCY_FILE)
    selection = load_selection(tmp_path)
    assert [student.key for student in selection.students] == ["a"]  # the trial, by the search's measurements
    assert selection.teacher.costs == {"latency_ms": 300.0}


@pytest.mark.parametrize(
    ("interval", "chosen", "undecided"),
    [((0.48, 0.495), True, False), ((0.48, 0.53), True, True), ((0.505, 0.53), False, False)],
)
def test_an_undecided_bound_is_met_if_the_median_is_within_it_and_the_reason_says_so(
    tmp_path: Path, interval: tuple[float, float], chosen: bool, undecided: bool
) -> None:
    """The budget allows half of the teacher's 300 ms."""
    make_sweep(tmp_path)
    trial = make_trial(tmp_path, "a", 0, 10.0)
    write_served(trial, served_student(1, 1.0, 10.0, {}))
    session = read_session(tmp_path)
    assert session is not None
    ratio = 0.49 if chosen else 0.51
    timed = [s.model_copy(update={"timing": paired_timing(ratio, interval)}) for s in session.servings]
    session.model_copy(update={"servings": timed}).write(tmp_path / LATENCY_FILE)
    choice = load_selection(tmp_path).choices["fast"]
    assert (choice.best is not None) == chosen
    text = "Undecided: latency_ms is 147, within the bound of 150, which lies within its interval [144, 159]"
    assert (text in choice.reason) == undecided
