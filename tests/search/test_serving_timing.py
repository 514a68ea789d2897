"""First pass and session: which shapes and configurations are timed, and with which bounds."""

from dataclasses import replace
from pathlib import Path

import pytest

from raydistill.config.serving import EngineVariant, ServingConfig
from raydistill.evaluation.paired_latency import Pair, compare_pairs
from raydistill.inference.decoding import BeamSearchParams
from raydistill.results.serving_latency import TEACHER_SHAPE
from raydistill.search import serving_timing
from raydistill.search.served_engine import ServedCheckpoint, ServingContext
from raydistill.search.serving_timing import (
    BOUNDED_RULE,
    REPORTED_RULE,
    CostBounds,
    FirstPassTask,
    SessionTask,
    extend_for_slow_calls,
    latency_bounds,
)

BEAM = BeamSearchParams(4, 1.0, 0, 12, 0, False, None)
FP32, INT8 = EngineVariant("fp32", "off"), EngineVariant("int8", "off")


def test_bounds_of_budgets_become_ratios() -> None:
    budgets: dict[str, dict[str, float | str]] = {
        "a": {"latency_ms": "60%", "params_m": 3},
        "b": {"latency_ms": 50.0},
        "c": {"latency_ms_b1": "45%"},
    }
    bounds = latency_bounds(budgets)
    assert bounds["latency_ms"].ratios(200.0) == (0.6, 0.25)
    assert bounds["latency_ms_b1"].ratios(200.0) == (0.45,)


def test_a_bound_of_slow_calls_is_decided_and_a_reported_latency_has_three_pairs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Calls of 573 ms and 286 ms: the rule's limit of 8 s ends before the 15 pairs that an interval needs."""
    monkeypatch.delenv("RAYDISTILL_TIMING_SECONDS", raising=False)
    pair = Pair(baseline_ms=(573.0,), student_ms=(286.5,), seconds=0.8595, background_cores=0.0)
    timing = compare_pairs([pair] * 100, [0.6], extend_for_slow_calls(BOUNDED_RULE, 573.0, [0.6]))
    assert (len(timing.pairs), timing.stop_reason, timing.decided(0.6)) == (15, "bounds_cleared", "below")
    assert extend_for_slow_calls(BOUNDED_RULE, 100.0, [0.6]) == BOUNDED_RULE
    assert extend_for_slow_calls(REPORTED_RULE, 1000.0, ()).max_seconds == 2 * 3 * 1.0


def test_first_pass_and_session_time_every_shape_and_configuration(
    context: ServingContext, world, tmp_path: Path, short_timings: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two shapes with the same tiny checkpoint, so that every ratio with equal settings is about 1."""
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
    assert "latency: 6/6 comparisons, 2-3 with" in capsys.readouterr().err
    assert all(session.is_timed(shape, config) for shape, own in configs.items() for config in own)
    assert len(session.servings) == 6  # all but the baseline, for both costs
    assert session.representatives == {TEACHER_SHAPE: TEACHER_SHAPE, "2-3": "a"}
    by_key = {(s.shape, s.config.key, s.cost): s for s in session.servings}
    assert by_key["2-3", "b1-int8", "latency_ms"].timing.bounds == (0.5,)
    assert by_key["2-3", "b1-int8", "latency_ms_b1"].timing.bounds == ()
    assert by_key[TEACHER_SHAPE, "b1-int8", "latency_ms"].timing.bounds == ()  # no budget selects the teacher
    assert by_key["2-3", "b1-int8", "latency_ms"].engine == "ctranslate2 int8"
    assert all(len(serving.timing.pairs) > 0 for serving in session.servings)
    assert session.baseline_ms.keys() == {"latency_ms", "latency_ms_b1"}
    assert all(ms > 0 for ms in session.baseline_ms.values())
