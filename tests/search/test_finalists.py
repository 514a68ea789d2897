"""Serving of finalists: what is missing of first pass, scores and session, and that scores are those of serving."""

from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydistill.config.run import Run
from raydistill.config.serving import EngineVariant, Serving, ServingConfig
from raydistill.config.space import Search, Space
from raydistill.data.corpus import read_corpus
from raydistill.data.selection import read_part
from raydistill.evaluation.latency import LATENCY_BATCH_SIZES, Hardware
from raydistill.evaluation.paired_latency import StoppingRule
from raydistill.evaluation.scoring import evaluate
from raydistill.inference.decoding import BeamSearchParams
from raydistill.inference.engines import open_engine
from raydistill.models.metadata import CheckpointMetadata
from raydistill.results.selection import select_finalists
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
from raydistill.search import serving_timing
from raydistill.search.finalists import find_untested, score_checkpoint
from raydistill.search.served_engine import ServedCheckpoint, ServingContext, engine_versions
from raydistill.search.serving_state import ServingState, describe_first_pass, describe_scores
from raydistill.search.serving_timing import CostBounds, FirstPassTask, SessionTask, latency_bounds
from raydistill.search.study import PROPOSALS_FILE, Proposal, ProposalLog
from raydistill.search.sweep_folder import search_stop_reason
from tests.factories.sweeps import (
    change_result,
    change_sweep,
    make_trial,
    paired_timing,
    sweep_record,
    sweep_teacher,
)
from tests.factories.workspace import make_world

BEAM = BeamSearchParams(4, 1.0, 0, 12, 0, False, None)
MACHINE: Hardware = {"kind": "cpu", "name": "a", "cores": 2, "threads": 2}
FP32, INT8 = EngineVariant("fp32", "off"), EngineVariant("int8", "off")


def test_finalists_are_on_a_front_or_chosen(tmp_path: Path):
    """a and b are on the front of latency, c of parameters, d of device-hours, e is chosen, f is neither.

    No budget bounds parameters or device-hours alone, but a later `choose` may.
    """
    budgets = {"both": {"params_m": 2.5, "latency_ms": 55}}
    sweep_record(sweep_teacher(costs={}), budgets=budgets).write(tmp_path / "sweep.json")
    for number, (key, score, latency, params, hours) in enumerate(
        [
            ("a", 10.0, 50.0, 3.0, 2.0),
            ("b", 20.0, 90.0, 4.0, 2.0),
            ("c", 9.0, 60.0, 2.0, 2.0),
            ("d", 8.0, 70.0, 5.0, 1.0),
            ("e", 7.0, 55.0, 2.5, 2.0),
            ("f", 6.0, 70.0, 5.0, 2.0),
        ]
    ):
        folder = make_trial(tmp_path, key, number, score)
        costs = {"latency_ms": latency, "params_m": params, "device_hours": hours}
        change_result(folder, metrics={"rouge2": score, **costs})
        np.savez(folder / "rows.npz", validation=np.full(20, score))
    assert [trial.key for trial in select_finalists(tmp_path)] == ["a", "b", "c", "d", "e"]


def finished_sweep(folder: Path, teacher: Path, data: Path, **serving: Any) -> tuple[Space, SweepTeacher]:
    """A space whose sweep has one finished trial and nothing served, and the teacher's record."""
    space = Space.model_validate(
        {
            "name": "m",
            "run": {"teacher": str(teacher), "dataset": {"name": str(data)}},
            "search": {"trials": 1},
            "serving": serving,
        }
    )
    record = sweep_teacher(costs={}, decoding=asdict(BEAM), data={"validation": "v", "test": "t"})
    sweep_record(record, serving=space.serving).write(folder / "sweep.json")
    CheckpointMetadata(decoding=asdict(BEAM)).write_to(make_trial(folder, "a", 0, 10.0) / "best")
    return space, record


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
    assert served.state().variants == [FP32]
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


def test_bounds_of_budgets_become_ratios() -> None:
    budgets: dict[str, dict[str, float | str]] = {
        "a": {"latency_ms": "60%", "params_m": 3},
        "b": {"latency_ms": 50.0},
        "c": {"latency_ms_b1": "45%"},
    }
    bounds = latency_bounds(budgets)
    assert bounds["latency_ms"].ratios(200.0) == (0.6, 0.25)
    assert bounds["latency_ms_b1"].ratios(200.0) == (0.45,)


def test_an_exhausted_search_is_not_started_again_unless_other_budgets_may_admit_more(world, tmp_path):
    space, _ = finished_sweep(tmp_path, *world)
    changes = space.model_copy(update={"search": Search(trials=9)})
    assert search_stop_reason(changes, tmp_path) is None
    change_sweep(tmp_path, stop=StopReason("all tried", exhausted=True))
    assert search_stop_reason(changes, tmp_path) == StopReason("all tried", exhausted=True)
    deleted = ProposalLog(proposals=(Proposal(key="deleted", number=9, params={}),))
    deleted.write(tmp_path / PROPOSALS_FILE)
    assert search_stop_reason(changes, tmp_path) is None, "a trial whose folder was deleted"
    (tmp_path / PROPOSALS_FILE).unlink()
    assert search_stop_reason(changes.model_copy(update={"budgets": {"b": {"params_m": 9}}}), tmp_path) is None
    assert search_stop_reason(changes.model_copy(update={"serving": Serving(beams=[1])}), tmp_path) is None
    change_sweep(tmp_path, stop=StopReason("one hour is used up"))
    assert search_stop_reason(changes, tmp_path) is None


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def context(world) -> ServingContext:
    teacher, data = world
    settings = {"name": str(data), "max_source_tokens": 32, "max_target_tokens": 16}
    run = Run.model_validate({"name": "x", "teacher": str(teacher), "dataset": settings})  # chosen on all 8 rows
    return ServingContext(run, "bleu", f"test-{teacher.parent.name}")


def test_scores_are_those_of_an_evaluation_and_row_statistics_are_written(
    context: ServingContext, world, tmp_path: Path
) -> None:
    checkpoint = ServedCheckpoint("a", "2-3", str(world[0]), tmp_path, BEAM)
    configs = [checkpoint.own_config(), ServingConfig(beams=1, length_penalty=1.0, precision="int8")]
    results = score_checkpoint(context, checkpoint, configs, "validation", "cpu", 1)
    assert [(entry.config, entry.engine, entry.precision) for entry in results] == [
        (configs[0], "ctranslate2", "fp32"),
        (configs[1], "ctranslate2", "int8"),
    ]
    assert results[1].memory_mb == pytest.approx(results[0].memory_mb / 4)
    corpus = read_corpus(context.run.dataset, "validation")
    expected = evaluate(open_engine(world[0]), corpus, "bleu", BEAM, max_source_tokens=32)
    assert results[0].metrics["bleu"] == expected.scores.metrics["bleu"]
    for config in configs:
        with np.load(tmp_path / f"rows-validation-{config.key}.npz") as rows:
            assert rows["validation"].shape == (8, 10)


def test_a_checkpoint_is_served_on_the_rows_that_are_kept_for_the_choice(
    context: ServingContext, world, tmp_path: Path
) -> None:
    dataset = context.run.dataset.model_copy(update={"selection_share": 0.5})
    context = replace(context, run=context.run.model_copy(update={"dataset": dataset}))
    kept = read_part(dataset, "selection")
    assert kept is not None
    assert 0 < len(kept) < 8
    assert context.split == "selection"
    checkpoint = ServedCheckpoint("a", "2-3", str(world[0]), tmp_path, BEAM)
    [served] = score_checkpoint(context, checkpoint, [checkpoint.own_config()], context.split, "cpu", 1)
    assert (served.split, served.rows) == ("selection", len(kept))
    assert (tmp_path / "rows-selection-b4-p1.npz").is_file()


def test_first_pass_and_session_time_every_shape_and_configuration(
    context: ServingContext, world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two shapes with the same tiny checkpoint, so that every ratio with equal settings is about 1."""
    short = StoppingRule(min_pairs=2, max_seconds=0.5)
    monkeypatch.setattr(serving_timing, "BOUNDED_RULE", short)
    monkeypatch.setattr(serving_timing, "REPORTED_RULE", short)
    teacher = ServedCheckpoint(TEACHER_SHAPE, TEACHER_SHAPE, str(world[0]), tmp_path, BEAM)
    checkpoints = [teacher, replace(teacher, key="a", shape="2-3")]
    own, fast = teacher.own_config(), ServingConfig(beams=1, length_penalty=1.0, precision="int8")
    configs = {checkpoint.shape: [own, fast] for checkpoint in checkpoints}
    variants = [FP32, EngineVariant("fp16", "off"), INT8]
    record = serving_timing.run_first_pass(
        FirstPassTask(context, checkpoints, configs, variants, "ctranslate2"), "cpu", 1
    )
    assert record.unsupported == ["fp16"]
    assert {(t.shape, t.beams, t.variant) for t in record.times} == {
        (shape, beams, variant) for shape in configs for beams in (4, 1) for variant in (FP32, INT8)
    }
    task = SessionTask(context, teacher, own, checkpoints, configs, {"latency_ms": CostBounds(shares=(0.5,))})
    session = serving_timing.run_session(task, "cpu", 1)
    assert all(session.is_timed(shape, config) for shape, own in configs.items() for config in own)
    assert len(session.servings) == 6  # all but the baseline, for both costs
    assert session.representatives == {TEACHER_SHAPE: TEACHER_SHAPE, "2-3": "a"}
    by_key = {(s.shape, s.config.key, s.cost): s for s in session.servings}
    assert by_key["2-3", "b1-int8", "latency_ms"].timing.bounds == (0.5,)
    assert by_key["2-3", "b1-int8", "latency_ms_b1"].timing.bounds == ()
    assert by_key[TEACHER_SHAPE, "b1-int8", "latency_ms"].timing.bounds == ()  # no budget selects the teacher
    assert by_key["2-3", "b1-int8", "latency_ms"].engine == "ctranslate2 int8"
    assert all(len(serving.timing.pairs) > 0 for serving in session.servings)
    assert session.baseline_ms["latency_ms"] > session.baseline_ms["latency_ms_b1"] > 0
