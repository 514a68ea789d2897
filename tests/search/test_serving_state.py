"""What is missing of first pass, scores and session, as the files of a sweep say."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydistill.config.serving import EngineVariant
from raydistill.config.space import Space
from raydistill.evaluation.latency import LATENCY_BATCH_SIZES, Hardware
from raydistill.results.served_students import SERVED_FILE, ServedRecord, ServedStudent, read_served
from raydistill.results.serving_latency import (
    FIRST_PASS_FILE,
    LATENCY_FILE,
    TEACHER_SHAPE,
    FirstPass,
    FirstPassTime,
    LatencySession,
    TimedServing,
)
from raydistill.results.sweep_record import StopReason, SweepTeacher
from raydistill.search.finalists import find_untested
from raydistill.search.served_engine import engine_versions
from raydistill.search.serving_state import ServingState, describe_first_pass, describe_scores
from raydistill.search.sweep_folder import search_stop_reason
from tests.factories.sweeps import finished_sweep, paired_timing

MACHINE: Hardware = {"kind": "cpu", "name": "a", "cores": 2, "threads": 2}


class ServingSteps:
    """Writes by hand what the three steps of serving write."""

    def __init__(self, space: Space, sweep: Path, teacher: SweepTeacher) -> None:
        self.space, self.sweep, self.teacher = space, sweep, teacher

    def state(self, machine: Hardware | None = None, **serving: Any) -> ServingState:
        space = self.space.model_copy(update={"serving": self.space.serving.model_copy(update=serving)})
        return ServingState.load(space, self.sweep, self.teacher, MACHINE if machine is None else machine)

    def write_first_pass(self, state: ServingState, unsupported: tuple[str, ...] = (), **ms: float) -> None:
        """By default, int8 takes half of the time of fp32."""
        times = [
            FirstPassTime(
                shape=checkpoint.shape,
                beams=config.beams,
                variant=variant,
                ms=ms.get(variant.precision, 50.0 if variant.precision == "int8" else 100.0),
            )
            for checkpoint in state.representatives
            for config in state.shape_decodings(checkpoint.shape)
            for variant in state.variants
            if variant.precision not in unsupported
        ]
        fields: dict[str, Any] = {"hardware": MACHINE, "versions": engine_versions(), "unsupported": unsupported}
        FirstPass.parse({**fields, "times": times}).write(self.sweep / FIRST_PASS_FILE)

    def write_scores(self, state: ServingState, **scores: float) -> None:
        """Score what is missing, by default with 10 points on every row, in as many rounds as the rules need."""
        for checkpoint in state.checkpoints:
            while configs := state.unscored_configs(checkpoint):
                for config in configs:
                    score = scores.get(config.precision, 10.0)
                    rows = np.full(20, score)
                    np.savez(checkpoint.folder / f"rows-validation-{config.key}.npz", validation=rows)
                    entry = ServedStudent(
                        config=config,
                        engine="ctranslate2",
                        precision=config.precision,
                        version=engine_versions()["ctranslate2"],
                        rows=20,
                        metrics={"rouge2": score},
                        interval=(score - 1, score + 1),
                        memory_mb=1.0,
                    )
                    record = read_served(checkpoint.folder) or ServedRecord(entries=[])
                    record.with_entries([entry]).write(checkpoint.folder / SERVED_FILE)

    def write_session(self, state: ServingState, **changes: Any) -> None:
        """Time everything: every number of beams takes a quarter of the baseline's latency."""
        servings = [
            TimedServing(shape=shape, config=config, cost=cost, engine="e", timing=paired_timing(config.beams / 4))
            for shape, configs in state.wanted_timings.items()
            for config in configs
            for cost in LATENCY_BATCH_SIZES
            if (shape, config) != (TEACHER_SHAPE, state.baseline)
        ]
        fields: dict[str, Any] = {
            "started_at": datetime.now(UTC),
            "hardware": MACHINE,
            "versions": engine_versions(),
            "baseline": state.baseline,
            "baseline_engine": "e",
            "baseline_ms": {"latency_ms": 100.0, "latency_ms_b1": 10.0},
            "representatives": {},
            "servings": servings,
        }
        LatencySession(**{**fields, **changes}).write(self.sweep / LATENCY_FILE)


@pytest.fixture
def served(world, tmp_path: Path) -> ServingSteps:
    """A sweep with one trial of size 4-1 that may be served with 4 beams, its own number, and with one."""
    space, teacher = finished_sweep(tmp_path, *world, beams=[1, 4])
    return ServingSteps(space, tmp_path, teacher)


def test_first_pass_scores_and_session_are_found_missing_from_the_files(served: ServingSteps) -> None:
    """After the last trial, after a kill between two steps, and for a number of beams that is added later."""
    assert search_stop_reason(served.space, served.sweep) == StopReason()
    assert [checkpoint.shape for checkpoint in served.state().missing_first_pass] == [TEACHER_SHAPE, "4-1"]
    served.write_first_pass(served.state())
    assert [checkpoint.key for checkpoint in served.state().missing_scores] == [TEACHER_SHAPE, "a"]
    served.write_scores(served.state())
    state = served.state()
    assert not state.missing_scores
    assert state.misses_timings
    served.write_session(state)
    assert served.state().is_complete
    assert [student.key for student in find_untested(served.sweep, served.teacher)] == ["a b1-int8"]
    assert find_untested(served.sweep, served.teacher.model_copy(update={"data": {"validation": "v"}})) == []
    added = served.state(beams=[1, 4, 3])
    assert [checkpoint.shape for checkpoint in added.missing_first_pass] == [TEACHER_SHAPE, "4-1"]
    served.write_first_pass(added)
    added = served.state(beams=[1, 4, 3])
    assert {config.key for checkpoint in added.checkpoints for config in added.unscored_configs(checkpoint)} == {
        "b3-p1-int8"
    }
    served.write_scores(added)
    assert served.state(beams=[1, 4, 3]).misses_timings, "everything is timed again, in one session"


def test_int8_that_is_not_faster_is_skipped_and_the_log_counts_what_is_skipped(served: ServingSteps) -> None:
    served.write_first_pass(served.state(), int8=99.0)
    state = served.state()
    assert {config.key for config in state.wanted_configs(state.checkpoints[1])} == {"b4-p1"}
    assert describe_first_pass(state).startswith("finalists: 4 of 8 combinations of shape, beams")


def test_fp32_is_not_scored_with_other_beams_where_int8_is_not_inferior(served: ServingSteps) -> None:
    served.write_first_pass(served.state())
    served.write_scores(served.state())
    state = served.state()
    keys = {checkpoint.key: [c.key for c in state.wanted_configs(checkpoint)] for checkpoint in state.checkpoints}
    assert keys == {key: ["b4-p1", "b4-p1-int8", "b1-int8"] for key in (TEACHER_SHAPE, "a")}
    assert describe_scores(state).startswith("finalists: 6 pairs of checkpoint and configuration are scored; 2 are not")


def test_a_precision_that_the_machine_lacks_is_left_out(served: ServingSteps) -> None:
    served.write_first_pass(served.state(), unsupported=("int8",))
    assert served.state().variants == [EngineVariant("fp32", "off")]
    assert not served.state().missing_first_pass


def test_times_of_another_machine_or_engine_version_are_not_compared(served: ServingSteps) -> None:
    served.write_first_pass(served.state())
    served.write_scores(served.state())
    served.write_session(served.state())
    known: Hardware = {"kind": "cpu", "name": "a"}  # less is known before Ray starts
    assert served.state(known).is_complete
    assert served.state({}).is_complete
    other = {**MACHINE, "name": "b"}
    assert served.state(other).missing_first_pass
    served.write_session(served.state(), versions={"ctranslate2": "0.1"})
    assert served.state().misses_timings
    session = LatencySession.read(served.sweep / LATENCY_FILE)
    session.model_copy(update={"versions": engine_versions(), "servings": session.servings[1:]}).write(
        served.sweep / LATENCY_FILE
    )
    assert served.state().misses_timings
    record = read_served(served.sweep / "trials" / "a")
    assert record
    outdated = [entry.model_copy(update={"version": "0.1"}) for entry in record.entries]
    record.model_copy(update={"entries": outdated}).write(served.sweep / "trials" / "a" / SERVED_FILE)
    assert [checkpoint.key for checkpoint in served.state().missing_scores] == ["a"]


def test_the_teacher_is_timed_with_the_configurations_of_all_students(served: ServingSteps) -> None:
    served.write_first_pass(served.state())
    served.write_scores(served.state())
    timings = served.state().wanted_timings
    assert timings.keys() == {TEACHER_SHAPE, "4-1"}
    assert {config.key for config in timings["4-1"]} <= {config.key for config in timings[TEACHER_SHAPE]}
