"""The scaling simulation: its arithmetic, its simulated work, and a small simulation of one and two nodes."""

import json
import multiprocessing
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling, simulated
from benchmarks.scaling import (
    SECONDS_PER_STEP,
    RowCost,
    TrialSleep,
    assign_slots,
    busy_with_start,
    driver_row_cost,
    endless_space,
    read_sleep,
    synthetic_sweep,
    trial_windows,
)
from benchmarks.simulated import SLEEP_FILE, simulated_engine, simulated_run
from benchmarks.simulated_nodes import Meter, cluster_nodes, driver_cpu_seconds
from benchmarks.timestamps import BatchEnd, steady_rate
from raydistill.config.run import Run
from raydistill.inference.decoding import BeamSearchParams, EngineOptions
from raydistill.search.trial import TrialContext
from raydistill.search.tune_search import run_search
from raydistill.training.inputs import RunInputs
from tests.factories.clock import FakeClock
from tests.factories.workspace import environment

ROOT = Path(__file__).parents[2]


def test_trials_are_assigned_to_the_slot_that_was_free_for_longest() -> None:
    sleeps = [TrialSleep(0, 10, 9), TrialSleep(0, 12, 11), TrialSleep(11, 20, 9), TrialSleep(13, 22, 8)]
    ends = assign_slots(sleeps, 2)
    assert ends == [BatchEnd(0, 10, 9), BatchEnd(1, 12, 11), BatchEnd(0, 20, 9), BatchEnd(1, 22, 8)]
    # After each slot's first trial: 9 s of work in 10 s, and 8 in 10.
    assert steady_rate(ends) / 2 == pytest.approx(0.85)


def test_meter_interpolates_cpu_seconds_between_samples() -> None:
    cpu_seconds: dict[str, list[float]] = {"driver": [1, 3, 3], "gcs": [0, 0, 1], "rest of the head": [0, 0, 0]}
    meter = Meter(times=[0, 10, 20], cpu_seconds=cpu_seconds)
    assert meter.cpu_between(5, 15) == {"driver": 1, "gcs": 0.5, "rest of the head": 0}


def test_cpu_time_of_the_sampling_thread_is_not_the_drivers() -> None:
    def work() -> list[float]:
        before, start = driver_cpu_seconds(), time.thread_time()
        while time.thread_time() - start < 0.1:
            pass
        return [driver_cpu_seconds() - before, time.thread_time() - start]

    measured: list[float] = []
    thread = threading.Thread(target=lambda: measured.extend(work()))
    thread.start()
    thread.join()
    driver, sampler = measured
    assert sampler >= 0.1
    assert driver < 0.05


def test_cost_of_a_row_is_the_slope_between_two_label_jobs() -> None:
    """10 s for any number of rows and 0.04 ms a row: one core is enough for 25,000 rows a second."""
    fewer = {"rows": 100_000, "driver_seconds": 14.0}
    more = {"rows": 600_000, "driver_seconds": 34.0}
    cost = driver_row_cost(fewer, more)
    assert cost.fixed_seconds == pytest.approx(10)
    assert cost.seconds_per_row == pytest.approx(4e-5)
    assert cost.rows_per_second == pytest.approx(25_000)
    assert "0.040 ms per row" in scaling._row_cost_text(8, cost)
    assert "25000 rows/s" in scaling._row_cost_text(8, cost)
    assert "too small" in scaling._row_cost_text(8, RowCost(14.0, -1e-9))


@pytest.mark.parametrize(
    ("count", "expected"),
    [(5000, [(0, 100), (2449, 2549), (4899, 4999)]), (7, [(0, 2), (2, 4), (4, 6)]), (2, [(0, 1), (0, 1), (0, 1)])],
)
def test_windows_are_the_first_the_middle_and_the_last_trials(count: int, expected: list[tuple[int, int]]) -> None:
    assert trial_windows(count) == expected


def test_time_at_work_includes_the_start_of_the_search() -> None:
    """Two slots for 100 s, of which 60 and 90 s are work."""
    sleeps = [TrialSleep(20, 85, 60), TrialSleep(5, 100, 90)]
    assert busy_with_start(sleeps, 2, 0.0) == pytest.approx(0.75)


def test_simulated_engine_sleeps_in_proportion_to_the_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(now=0.0)
    monkeypatch.setattr(simulated, "time", clock)
    engine = simulated_engine("teacher", "auto", EngineOptions(device="cuda"), seconds_per_char=0.01)
    rows = engine.generate(
        ["a" * 6, "b c d e"],
        BeamSearchParams(4, 1.0, 0, 9, 0, False, None),
        max_source_tokens=9,
        batch_size=9,
        n_best=2,
    )
    assert clock.now == pytest.approx(0.13)
    assert [[h.text for h in row] for row in rows] == [["aaaaaa"] * 2, ["b c d e"] * 2]


def test_simulated_run_writes_the_files_of_a_run_and_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulated, "time", FakeClock())
    run = Run.model_validate(
        {"name": "r", "teacher": "t", "dataset": "d", "student": {"size": "2-1"}, "training": {"max_steps": 10}}
    )
    reported_steps: list[int] = []
    inputs = RunInputs(costs={"latency_ms": 7.0}, number=3)

    def report(metrics: dict[str, Any], folder: Path | None) -> None:
        reported_steps.append(metrics["step"])

    result = simulated_run(run, tmp_path, report, inputs, seconds_per_step=0.01)
    assert reported_steps == [2, 4, 6, 8, 10]
    assert (result.status, result.number, result.metrics["latency_ms"]) == ("done", 3, 7.0)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
    _, start, end, seconds = json.loads((tmp_path / SLEEP_FILE).read_text())
    assert seconds == pytest.approx(0.1)
    assert end - start == pytest.approx(0.1)
    assert simulated_run(run, tmp_path, report, inputs, seconds_per_step=100) == result


def test_the_driver_is_timed_after_earlier_trials_of_the_same_sweep(tmp_path: Path) -> None:
    record = scaling.measure_driver(tmp_path, 12)
    assert record["earlier"] == 12
    assert all(record[name] > 0 for name in ("loading", "propose", "report", "progress", "check"))
    [sweep] = tmp_path.iterdir()
    results = list(sweep.glob("trials/*/result.json"))
    assert len(results) == 12 + scaling.DRIVER_TRIALS
    assert "| 12 |" in scaling.as_markdown({"driver": [record]})


def run_four_trials(gpus: float, sweep: Path) -> None:
    """Run four trials of eight seconds, which use `gpus` of a GPU each, on a node that offers eight CPUs and a GPU."""
    space = endless_space(4, 4, 8.0, "tune")
    space.run["training"]["gpus"] = gpus
    train_fn = partial(simulated_run, seconds_per_step=SECONDS_PER_STEP)
    with cluster_nodes(1, cpus=8, gpus=1):
        run_search(TrialContext(space, sweep, synthetic_sweep(), "cuda", train_fn), [])


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("gpus", "concurrent"), [(0.5, 2), (1, 1)])
def test_trials_with_a_fraction_of_a_gpu_run_at_the_same_time(gpus: float, concurrent: int, tmp_path: Path) -> None:
    """With Tune actors, because Ray Train's workers initialise NCCL, which needs a real GPU."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process can use the token of one cluster only
        pool.apply(run_four_trials, (gpus, tmp_path))
    sleeps = [read_sleep(path) for path in tmp_path.glob(f"trials/*/{SLEEP_FILE}")]
    assert len(sleeps) == 4
    assert max(sum(a.start <= b.start < a.end for a in sleeps) for b in sleeps) == concurrent


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_publication_of_a_trial_is_timed_after_earlier_trials(tmp_path: Path) -> None:
    record = scaling.measure_publication(tmp_path, 3)
    assert record["earlier"] == 3
    assert 0 < record["per_trial"] < record["first"]
    assert "| 3 |" in scaling.as_markdown({"publish": [record]})


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_small_simulation_scales_from_one_node_to_two(tmp_path: Path) -> None:
    """Parts but `gpu` and `many`: rates are near the rates of the sleeps, and nearly twice as high on two nodes.

    The sleeps are long against the work of the processes, which all share the cores of this machine.
    """
    options = ["--part", "labels", "batches", "trials", "train", "--nodes", "1", "2", "--results", str(tmp_path)]
    options += ["--batches", "8", "--batch-seconds", "4", "--empty-batches", "100", "--trial-seconds", "5"]
    command = [sys.executable, "-m", "benchmarks.scaling", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "scaling.json").read_text())["data"]
    first, second = results["labels"]["by_nodes"]
    fewer = results["labels"]["fewer_rows"]
    assert fewer["nodes"] == 2
    assert fewer["rows"] == pytest.approx(second["rows"] / 4, abs=1)
    assert 0 < fewer["driver_seconds"] < second["driver_seconds"]
    assert (first["workers"], second["workers"], second["rows"]) == (1, 2, pytest.approx(2 * first["rows"], abs=1))
    for record in (first, second):
        assert record["rows_per_second"] == pytest.approx(record["ideal"], rel=0.2)
    assert second["rows_per_second"] > 1.6 * first["rows_per_second"]
    assert results["batches"]["per_second"] > 5
    for launcher in ("trials", "train"):
        assert [len(record["sleeps"]) for record in results[launcher]] == [r["trials"] for r in results[launcher]]
        assert all(record["cpu_per_trial"]["driver"] > 0 for record in results[launcher])
    assert min(record["busy"] for record in results["trials"]) > 0.7
