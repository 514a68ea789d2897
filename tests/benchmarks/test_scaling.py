"""The scaling simulation's arithmetic by hand, its stand-ins, and a small simulation as it is run."""

import json
import multiprocessing
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from benchmarks.scaling import SECONDS_PER_STEP, TrialSleep, assign_slots, endless_space, read_sleep, synthetic_sweep
from benchmarks.simulated import simulated_engine, simulated_run
from benchmarks.simulated_nodes import Meter, cluster_nodes
from benchmarks.timestamps import BatchEnd, rate
from raydistill.config.run import Run
from raydistill.inference.decoding import BeamSearchParams, EngineOptions
from raydistill.search.trial import TrialContext
from raydistill.search.tune_search import run_search
from raydistill.training.inputs import RunInputs
from tests.factories.workspace import environment

ROOT = Path(__file__).parents[2]


def test_a_trial_takes_the_slot_that_was_free_for_longest() -> None:
    slept = [TrialSleep(0, 10, 9), TrialSleep(0, 12, 11), TrialSleep(11, 20, 9), TrialSleep(13, 22, 8)]
    ends = assign_slots(slept, 2)
    assert ends == [BatchEnd(0, 10, 9), BatchEnd(1, 12, 11), BatchEnd(0, 20, 9), BatchEnd(1, 22, 8)]
    # After each slot's first trial: 9 s of work in 10 s, and 8 in 10.
    assert rate(ends) / 2 == pytest.approx(0.85)


def test_what_the_head_used_between_two_moments() -> None:
    meter = Meter(at=[0, 10, 20], cpu={"driver": [1, 3, 3], "gcs": [0, 0, 1], "rest of the head": [0, 0, 0]})
    assert meter.between(5, 15) == {"driver": 1, "gcs": 0.5, "rest of the head": 0}


def test_the_engine_sleeps_in_proportion_to_the_characters() -> None:
    engine = simulated_engine("teacher", "auto", EngineOptions(device="cuda"), seconds_per_char=0.01)
    began = time.monotonic()
    written = engine.generate(
        ["a" * 6, "b c d e"],
        BeamSearchParams(4, 1.0, 0, 9, 0, False, None),
        max_source_tokens=9,
        batch_size=9,
        n_best=2,
    )
    assert time.monotonic() - began == pytest.approx(0.13, abs=0.05)
    assert [[h.text for h in row] for row in written] == [["aaaaaa"] * 2, ["b c d e"] * 2]


def test_a_timed_run_leaves_what_a_search_reads_and_is_not_done_twice(tmp_path: Path) -> None:
    run = Run.model_validate(
        {"name": "r", "teacher": "t", "dataset": "d", "student": {"size": "2-1"}, "training": {"max_steps": 10}}
    )
    told = []
    inputs = RunInputs(costs={"latency_ms": 7.0}, result_fields={"number": 3})
    report = lambda metrics, folder: told.append(metrics["step"])  # noqa: E731
    result = simulated_run(run, tmp_path, report, inputs, seconds_per_step=0.01)
    assert told == [2, 4, 6, 8, 10]
    assert (result["status"], result["number"], result["metrics"]["latency_ms"]) == ("done", 3, 7.0)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
    _, began, ended, seconds = json.loads((tmp_path / "stamps.jsonl").read_text())
    assert seconds == pytest.approx(0.1)
    assert ended - began >= 0.1
    assert simulated_run(run, tmp_path, report, inputs, seconds_per_step=100) == result


def four_trials(gpus: float, sweep: Path) -> None:
    """Four trials of eight seconds on a machine that offers eight CPUs and a GPU, each asking for `gpus` of it."""
    space = endless_space(4, 4, 8.0, "tune")
    space.run["training"]["gpus"] = gpus
    work = partial(simulated_run, seconds_per_step=SECONDS_PER_STEP)
    with cluster_nodes(1, cpus=8, gpus=1):
        run_search(TrialContext(space, sweep, synthetic_sweep(), "cuda", work), [])


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("gpus", "together"), [(0.5, 2), (1, 1)])
def test_small_students_share_a_gpu(gpus: float, together: int, tmp_path: Path) -> None:
    """On a machine of one GPU, as Ray is told: how many of four trials are at work at the same time.

    By Tune's actors: Ray Train's workers join by NCCL, which needs a real one.
    """
    with multiprocessing.get_context("spawn").Pool(1) as apart:  # a process takes the token of one cluster only
        apart.apply(four_trials, (gpus, tmp_path))
    slept = [read_sleep(path) for path in tmp_path.glob("trials/*/stamps.jsonl")]
    assert len(slept) == 4
    assert max(sum(one.began <= other.began < one.ended for one in slept) for other in slept) == together


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_small_simulation_from_one_node_to_two(tmp_path: Path) -> None:
    """All parts but the last: rates near those of the sleeps, and as good as twice as high on two nodes."""
    options = ["--part", "labels", "batches", "trials", "train", "--nodes", "1", "2", "--results", str(tmp_path)]
    options += ["--batches", "8", "--batch-seconds", "1", "--empty-batches", "100", "--trial-seconds", "2"]
    command = [sys.executable, "-m", "benchmarks.scaling", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "scaling.json").read_text())["data"]
    one, two = found["labels"]
    assert (one["workers"], two["workers"], two["rows"]) == (1, 2, pytest.approx(2 * one["rows"], abs=1))
    for side in (one, two):
        assert side["rows_per_second"] == pytest.approx(side["ideal"], rel=0.2)
    assert two["rows_per_second"] > 1.6 * one["rows_per_second"]
    assert found["batches"]["per_second"] > 5
    for launcher in ("trials", "train"):
        assert [len(side["slept"]) for side in found[launcher]] == [side["trials"] for side in found[launcher]]
        assert all(side["cpu_per_trial"]["driver"] > 0 for side in found[launcher])
    assert min(side["busy"] for side in found["trials"]) > 0.7
