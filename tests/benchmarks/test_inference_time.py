"""The regression of inference time on a model's dimensions, with times whose coefficients are known."""

import argparse

import numpy as np
import pytest
from scipy import stats

from benchmarks.inference_time import Shape, draw_shape, read_timings, regress, time_missing

SHAPES = [draw_shape(0, n) for n in range(200)]


def linear_time(shape: Shape) -> float:
    return 10 + 4 * shape.encoder + 8 * shape.decoder + 0.001 * shape.ffn + 0.02 * shape.width


def test_regression_recovers_the_coefficients_of_a_linear_time():
    times = np.array([linear_time(shape) for shape in SHAPES])
    coefficients, r_squared = regress(SHAPES, times)
    scale = 100 / times.mean()
    expected = {"encoder": 4 * scale, "decoder": 8 * scale, "ffn": 1 * scale, "width": 2 * scale}
    assert {name: c.percent for name, c in coefficients.items()} == pytest.approx(expected)
    assert r_squared == pytest.approx(1.0)
    assert all(c.high - c.low == pytest.approx(0, abs=1e-6) for c in coefficients.values())


def test_intervals_cover_the_true_coefficient_in_95_percent_of_draws():
    rng = np.random.default_rng(0)
    true_times = np.array([linear_time(shape) for shape in SHAPES])
    covered = 0
    for _ in range(200):
        times = true_times * rng.normal(1, 0.1, len(true_times))
        decoder = regress(SHAPES, times)[0]["decoder"]
        covered += decoder.low <= 100 * 8 / times.mean() <= decoder.high
    assert stats.binomtest(covered, 200, 0.95).pvalue > 0.001


def test_too_few_shapes_are_refused():
    with pytest.raises(ValueError, match="too few"):
        regress(SHAPES[:5], np.ones(5))


def test_timing_resumes_after_a_kill(tmp_path):
    options = argparse.Namespace(device="cpu", batch=1, source=8, target=4, repeats=1, seed=0, configs=3)
    path = tmp_path / "times.jsonl"
    path.write_text('{"number": 0, "ms": 7.5}\n{"number": 1, "encoder": 12, "deco')
    timings = time_missing(path, options)
    assert timings[0] == 7.5
    assert list(timings) == [0, 1, 2]
    assert timings[1] > 0
    assert timings == read_timings(path)
    assert time_missing(path, options) == timings
