"""Early stopping per shape on invented curves; nothing is trained."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydistill.results.pareto import Candidate, pareto_front
from raydistill.results.records import read_trials
from raydistill.search.early_stopping import best_score_at, peer_curves, rungs, should_stop_early
from tests.factories.sweeps import make_trial

QUARTERS = (0.25, 0.5, 0.75, 1.0)


def curve(*scores: float) -> list[tuple[float, float]]:
    return list(zip(QUARTERS, scores, strict=False))


def test_rungs_are_powers_of_the_reduction():
    assert rungs(0.25, 2) == [0.25, 0.5]
    assert rungs(0.1, 3) == pytest.approx([0.1, 0.3, 0.9])


def test_the_best_score_so_far_counts_for_curves_that_reached_the_rung():
    assert best_score_at(curve(3, 1), 0.5) == 3
    assert best_score_at(curve(3), 0.5) is None
    assert best_score_at([(0.3, 1.0), (0.6, 2.0)], 0.25) == 1


def test_no_trial_stops_before_the_first_rung_or_without_peers():
    assert should_stop_early([(0.1, 0.0)], [curve(9)], 0.25, 2) is None
    assert should_stop_early(curve(0), [], 0.25, 2) is None


def test_the_worse_half_stops_and_ties_continue():
    peers = [curve(9), curve(8), curve(1)]
    assert should_stop_early(curve(7), peers, 0.25, 2) is not None  # third of four
    assert should_stop_early(curve(8), peers, 0.25, 2) is None
    assert should_stop_early(curve(8.5), peers, 0.25, 2) is None
    assert should_stop_early(curve(7), [curve(9), curve(1)], 0.25, 2) is None  # second of three: two continue


def test_a_trial_is_compared_with_peers_that_reach_the_rung_later():
    own = [*curve(5), (0.3, 5.0)]  # beyond the first rung, not yet at the second
    assert should_stop_early(own, [], 0.25, 2) is None
    assert "1 of 1 others" in str(should_stop_early(own, [curve(6)], 0.25, 2))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(2, 4))
def test_the_best_of_a_shape_is_never_stopped_and_enough_trials_continue(scores: list[int], reduction: int):
    curves = [curve(score) for score in scores]
    stopped = [
        should_stop_early(own, curves[:i] + curves[i + 1 :], 0.25, reduction) is not None
        for i, own in enumerate(curves)
    ]
    assert not stopped[scores.index(max(scores))]
    assert len(scores) - sum(stopped) >= len(scores) / reduction


def test_the_first_validations_of_a_long_run_have_their_exact_share_of_the_steps(tmp_path):
    """Shares that were rounded to four digits were 0, and the number of steps could not be derived from them."""
    folder = make_trial(tmp_path, "a", 0, 8.0, status=None)
    lines = [{"step": step, "total_steps": 1_000_000, "metric": "rouge2", "score": 3.0} for step in (10, 20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = json.loads((folder / "run.json").read_text())
    run["training"]["warmup_steps"] = 500
    (folder / "run.json").write_text(json.dumps(run))
    own, peers, warmup = peer_curves(tmp_path, "a")
    assert own == [(1e-5, 3.0), (2e-5, 3.0)]
    assert (peers, warmup) == ([], 5e-4)


def test_only_trials_with_the_same_layers_and_units_are_peers(tmp_path):
    students = {
        "a": {"size": "4-1", "decoder_ffn": 0.5},
        "b": {"size": "4-1", "decoder_ffn": 0.5, "encoder_ffn": 1},
        "c": {"size": "4-1"},
        "d": {"size": "4-1", "decoder_ffn": 0.25},
    }
    for number, (key, student) in enumerate(students.items()):
        folder = make_trial(tmp_path, key, number, 8.0, status=None)
        lines = [{"step": 1, "total_steps": 2, "metric": "rouge2", "score": float(number)}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        run = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps({**run, "student": student}))
    assert peer_curves(tmp_path, "a")[1] == [[(0.5, 1.0)]]
    assert [trial.size for trial in read_trials(tmp_path)] == [
        *("4-1-ffn1-0.5", "4-1-ffn1-0.5", "4-1", "4-1-ffn1-0.25")
    ]


SHAPES = {"12-6": (20.0, 60.0), "12-3": (14.0, 35.0), "12-1": (8.0, 20.0)}  # score at the end, latency


def run_all(per_shape: bool) -> list[Candidate]:
    """Run six trials of each shape in sequence, and return those that were not stopped early."""
    ended: list[tuple[str, list[tuple[float, float]]]] = []
    finished = []
    for quality, size in itertools.product(range(6), SHAPES):
        end, latency = SHAPES[size]
        full = curve(*[share * (end + 0.1 * ((quality * 5) % 6)) for share in QUARTERS])
        peers = [c for other, c in ended if other == size or not per_shape]
        done = next((n for n in range(1, 5) if should_stop_early(full[:n], peers, 0.25, 2)), 4)
        ended.append((size, full[:done]))
        if done == 4:
            finished.append(Candidate(f"{size} {quality}", full[-1][1], None, {"latency_ms": latency}))
    return finished


def test_halving_per_shape_keeps_the_cheap_end_of_the_front_and_halving_over_all_trials_does_not():
    over_all = pareto_front(run_all(per_shape=False), "latency_ms")
    finished = run_all(per_shape=True)
    per_shape = pareto_front(finished, "latency_ms")
    assert {c.key.split()[0] for c in over_all} == {"12-6"}
    assert [c.key.split()[0] for c in per_shape] == ["12-1", "12-3", "12-6"]
    assert [c.score for c in per_shape] == [8.5, 14.5, 20.5]  # the best of the six of every shape
    assert len(finished) < 18
