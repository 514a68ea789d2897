"""First pass and session: which shapes and configurations are timed, and with which bounds."""

from dataclasses import replace
from pathlib import Path

import pytest

from raydistill.config.serving import EngineVariant, ServingConfig
from raydistill.evaluation.paired_latency import StoppingRule
from raydistill.inference.decoding import BeamSearchParams
from raydistill.results.serving_latency import TEACHER_SHAPE
from raydistill.search import serving_timing
from raydistill.search.served_engine import ServedCheckpoint, ServingContext
from raydistill.search.serving_timing import CostBounds, FirstPassTask, SessionTask, latency_bounds

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
    assert session.baseline_ms.keys() == {"latency_ms", "latency_ms_b1"}
    assert all(ms > 0 for ms in session.baseline_ms.values())
