"""Both launchers under a real Ray: equal losses, exact data parallelism, and recovery from failed workers."""

import json
import os
import shutil
import signal
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.scaling import SECONDS_PER_STEP, endless_space, synthetic_sweep
from benchmarks.simulated import simulated_run
from raydistill.config.run import Run
from raydistill.core.errors import TransientError, UserError
from raydistill.jobs.train import TrainJob, _make_trainer, check_capacity, resolve_launcher, train_with_ray_train
from raydistill.search.progress import ProgressCallback
from raydistill.search.study import SweepStudy
from raydistill.search.sweep_folder import write_sweep_record
from raydistill.search.trial import TrialContext
from raydistill.search.tune_search import run_search
from raydistill.training.inputs import RunInputs
from raydistill.training.records import RESULT_FILE, RunResult
from raydistill.training.run import train
from tests.factories.workspace import make_world

HISTORY_KEYS = ("step", "loss", "val_loss", "score")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def make_run(world, name, **training):
    teacher, data = world
    settings = {"epochs": 2, "batch_size": 8, "warmup_steps": 2, "checks_per_epoch": 2, "precision": "fp32"}
    return Run.model_validate(
        {
            "name": name,
            "teacher": str(teacher),
            "dataset": {"name": str(data), "max_source_tokens": 32, "max_target_tokens": 16},
            "method": "kd",
            "student": {"size": "2-2"},
            "training": {**settings, **training},
            "decoding": {"beams": 1, "max_length": 12},
        }
    )


def history(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: json.loads(line)[key] for key in HISTORY_KEYS} for line in lines]


def assert_same_losses(a, b, tolerance):
    assert [row["step"] for row in a] == [row["step"] for row in b]
    for row_a, row_b in zip(a, b, strict=True):
        for key in ("loss", "val_loss"):
            assert row_a[key] == pytest.approx(row_b[key], rel=tolerance)


def train_in_this_process(run, folder):
    """Train without Ray, with the number of threads of a worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(run.training.threads)
    try:
        train(run, folder, lambda metrics, folder: None, RunInputs())
    finally:
        torch.set_num_threads(threads)


def train_under_tune(run, folder):
    """Train as short CPU trials do: in a Tune actor that reports every validation."""
    from ray import tune

    def trial(config):
        def report(metrics, _):
            tune.report({"step": metrics["step"], "score": metrics["score"]})

        train(run, folder, report, RunInputs())

    results = tune.Tuner(trial, run_config=tune.RunConfig(storage_path=str(folder.parent / "tune"), verbose=0)).fit()
    assert not results.errors
    return results


def test_both_launchers_give_the_same_losses(ray_here, world, tmp_path):
    result = train_with_ray_train(TrainJob(make_run(world, "same"), tmp_path / "train", RunInputs()))
    results = train_under_tune(make_run(world, "same"), tmp_path / "tuned")
    assert result.status == "done"
    assert_same_losses(history(tmp_path / "train"), history(tmp_path / "tuned"), 1e-6)
    assert results[0].metrics["step"] == history(tmp_path / "tuned")[-1]["step"]


def test_ray_trains_controller_imports_no_training_code(world, tmp_path, monkeypatch):
    """The controller opens the context of the run, and workers open the function."""
    from ray import cloudpickle

    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    trainer = _make_trainer(TrainJob(make_run(world, "x"), tmp_path, RunInputs()), "cpu", 0, [])
    assert b"raydistill.training" not in cloudpickle.dumps(trainer.train_run_context)
    assert b"raydistill.training" in cloudpickle.dumps(trainer.train_loop_per_worker)


def record_listeners(run, folder, report, inputs, worker):
    """A `train_fn` that records the addresses on which its process listens, and whether it has a process group."""
    import torch.distributed as dist

    listening = [c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"worker{worker.rank}.json").write_text(json.dumps([listening, dist.is_initialized()]))
    if worker.world_size > 1:
        dist.barrier()
    RunResult(key=folder.name, status="done").write(folder / RESULT_FILE)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_listen_on_loopback_and_a_single_worker_has_no_process_group(ray_here, world, tmp_path, workers):
    """Torch's own store would listen on every address of the machine, and require no token."""
    run = make_run(world, "listeners", workers=workers)
    train_with_ray_train(TrainJob(run, tmp_path / "run", RunInputs(), record_listeners))
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "run").glob("worker*.json"))]
    assert [has_group for _, has_group in records] == [workers > 1] * workers
    assert {ip.removeprefix("::ffff:") for listening, _ in records for ip in listening} == {"127.0.0.1"}


@dataclass(frozen=True)
class FailingTrain:
    """A `train_fn` that appends a line to a file and raises an error."""

    error: Exception
    attempts: Path

    def __call__(self, run, folder, report, inputs, worker):
        with self.attempts.open("a") as file:
            file.write("attempt\n")
        raise self.error


class CostlessTrain:
    """A `train_fn` whose result lacks the costs."""

    def __call__(self, run, folder, report, inputs, worker):
        result = simulated_run(run, folder, report, replace(inputs, costs={}), worker, seconds_per_step=0.0)
        assert "latency_ms" not in result.metrics
        return result


@pytest.mark.parametrize(("error", "attempts"), [(UserError("too little memory"), 1), (TransientError("wait"), 2)])
def test_only_transient_errors_are_retried(ray_here, world, tmp_path, error, attempts):
    failing = FailingTrain(error, tmp_path / "attempts")
    with pytest.raises(type(error), match=str(error)):
        train_with_ray_train(TrainJob(make_run(world, "wrong"), tmp_path / "run", RunInputs(), failing), retries=1)
    assert len(failing.attempts.read_text().splitlines()) == attempts


@pytest.mark.parametrize(
    ("launcher", "error", "attempts"),
    [
        ("tune", UserError("too little memory"), 1),
        ("tune", RuntimeError("broken"), 2),
        pytest.param("train", OSError("full"), 2, marks=pytest.mark.slow),
    ],
)
def test_a_trial_is_retried_as_often_as_the_space_says(ray_here, tmp_path, capsys, launcher, error, attempts):
    """Ray Train adds no further retries. The next command may try a failed trial again."""
    space = endless_space(1, 1, 1.0, launcher, retries=1)
    write_sweep_record(space, tmp_path, synthetic_sweep(), "running")
    progress = ProgressCallback(tmp_path, space.search, "rouge2")
    failing = FailingTrain(error, tmp_path / "attempts")
    stop_reason = run_search(TrialContext(space, tmp_path, synthetic_sweep(), "cpu", failing), [progress])
    assert len(failing.attempts.read_text().splitlines()) == attempts
    assert not stop_reason.exhausted
    [failure] = [line for line in capsys.readouterr().err.splitlines() if " failed: " in line]
    assert failure.endswith(str(error))
    assert SweepStudy(space, tmp_path).num_finished == 0


def test_a_trial_without_a_cost_fails_and_a_deleted_trial_is_run_again(ray_here, tmp_path, capsys):
    space = endless_space(2, 1, 0.1, "tune", retries=0)
    sweep, train_fn = synthetic_sweep(), partial(simulated_run, seconds_per_step=SECONDS_PER_STEP)
    write_sweep_record(space, tmp_path, sweep, "running")
    run_search(TrialContext(space, tmp_path, sweep, "cpu", train_fn), [])
    first, second = sorted(tmp_path.glob("trials/*/"), key=lambda folder: RunResult.read(folder / RESULT_FILE).number)
    before = {folder: RunResult.read(folder / RESULT_FILE) for folder in (first, second)}
    shutil.rmtree(first)
    run_search(TrialContext(space, tmp_path, sweep, "cpu", train_fn), [])
    assert set(tmp_path.glob("trials/*/")) == {first, second}
    repeated = RunResult.read(first / RESULT_FILE)
    assert (repeated.number, repeated.params) == (before[first].number, before[first].params)
    assert RunResult.read(second / RESULT_FILE) == before[second]

    more = space.model_copy(update={"search": space.search.model_copy(update={"trials": 3})})
    progress = ProgressCallback(tmp_path, more.search, "rouge2")
    run_search(TrialContext(more, tmp_path, sweep, "cpu", CostlessTrain()), [progress])
    [failure] = [line for line in capsys.readouterr().err.splitlines() if " failed: " in line]
    assert "damaged: KeyError 'latency_ms'" in failure
    assert RunResult.read(first / RESULT_FILE) == repeated


def test_two_data_parallel_workers_equal_one_with_the_same_global_batch(ray_here, world, tmp_path):
    train_in_this_process(make_run(world, "one"), tmp_path / "one")
    train_with_ray_train(TrainJob(make_run(world, "two", workers=2), tmp_path / "two", RunInputs()))
    assert_same_losses(history(tmp_path / "one"), history(tmp_path / "two"), 1e-4)


@dataclass
class KilledTrain:
    """A `train_fn` that kills its process after the second validation of the first attempt.

    The steps of all validations are appended to `steps`.
    """

    steps: Path

    def __call__(self, run, folder, report, inputs, worker):
        first_attempt = not self.steps.exists()

        def record(metrics, path):
            with self.steps.open("a") as file:
                file.write(f"{metrics['step']}\n")
            if first_attempt and len(self.steps.read_text().splitlines()) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return report(metrics, path)

        return train(run, folder, record, inputs, worker)


def test_a_killed_worker_is_restarted_and_resumes_from_its_checkpoint(ray_here, world, tmp_path):
    """The losses equal those of an undisturbed run, and the steps before the checkpoint are not repeated."""
    run = make_run(world, "killed")
    train_in_this_process(run, tmp_path / "untouched")
    killed = KilledTrain(tmp_path / "steps")
    result = train_with_ray_train(TrainJob(run, tmp_path / "killed", RunInputs(), killed))
    assert result.status == "done"
    assert_same_losses(history(tmp_path / "untouched"), history(tmp_path / "killed"), 1e-6)
    validated = [int(step) for step in killed.steps.read_text().split()]
    assert validated == [line["step"] for line in history(tmp_path / "killed")]


def test_a_run_that_never_fits_the_cluster_is_refused(ray_here, world):
    with pytest.raises(UserError, match="8 workers need 1 CPU of one machine each, and the cluster has room for 2"):
        check_capacity(make_run(world, "big", workers=8), "cpu")


def test_capacity_is_counted_per_machine(monkeypatch, world):
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}} for _ in range(4)]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    with pytest.raises(UserError, match=r"needs 8 CPUs of one machine, and no machine .*; lower training\.threads, or"):
        check_capacity(make_run(world, "wide", threads=8), "cpu")
    with pytest.raises(UserError, match=r"2 workers need .* room for 0; lower training\.workers or training\.threads"):
        check_capacity(make_run(world, "both", threads=8, workers=2), "cpu")


def test_launcher_depends_on_device_workers_and_setting(world):
    assert resolve_launcher(make_run(world, "a"), "cpu") == "tune"
    assert resolve_launcher(make_run(world, "a"), "cuda") == "train"
    assert resolve_launcher(make_run(world, "a", workers=2), "cpu") == "train"
    assert resolve_launcher(make_run(world, "a", launcher="train"), "cpu") == "train"
    with pytest.raises(UserError, match="one worker"):
        resolve_launcher(make_run(world, "a", workers=2, launcher="tune"), "cpu")
