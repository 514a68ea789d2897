"""The regression of inference time on a model's dimensions, against answers that are known beforehand."""

import argparse

import numpy as np
import pytest
from scipy import stats

from benchmarks.inference_time import Shape, draw, read_timings, regress, time_missing

SHAPES = [draw(0, n) for n in range(200)]


def exact(shape: Shape) -> float:
    return 10 + 4 * shape.encoder + 8 * shape.decoder + 0.001 * shape.ffn + 0.02 * shape.width


def test_a_time_that_is_linear_gives_its_own_coefficients():
    times = np.array([exact(s) for s in SHAPES])
    found, fit = regress(SHAPES, times)
    scale = 100 / times.mean()
    wanted = {"encoder": 4 * scale, "decoder": 8 * scale, "ffn": 1 * scale, "width": 2 * scale}
    assert {name: c.percent for name, c in found.items()} == pytest.approx(wanted)
    assert fit == pytest.approx(1.0)
    assert all(c.high - c.low == pytest.approx(0, abs=1e-6) for c in found.values())


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    truth = np.array([exact(s) for s in SHAPES])
    inside = 0
    for _ in range(200):
        times = truth * rng.normal(1, 0.1, len(truth))
        decoder = regress(SHAPES, times)[0]["decoder"]
        inside += decoder.low <= 100 * 8 / times.mean() <= decoder.high
    assert stats.binomtest(inside, 200, 0.95).pvalue > 0.001


def test_too_few_shapes_are_refused():
    with pytest.raises(ValueError, match="too few"):
        regress(SHAPES[:5], np.ones(5))


def test_timing_goes_on_where_it_was_killed(tmp_path):
    asked = argparse.Namespace(device="cpu", batch=1, source=8, target=4, repeats=1, seed=0, configs=3)
    path = tmp_path / "times.jsonl"
    path.write_text('{"number": 0, "ms": 7.5}\n{"number": 1, "encoder": 12, "deco')
    found = time_missing(path, asked)
    assert found[0] == 7.5
    assert list(found) == [0, 1, 2]
    assert found[1] > 0
    assert found == read_timings(path)
    assert time_missing(path, asked) == found
