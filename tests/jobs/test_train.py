"""Both launchers under a real Ray: equal losses, exact data parallelism, and recovery from failed workers."""

import json
import os
import shutil
import signal
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from ray.train import WorkerGroupError

from benchmarks.scaling import SECONDS_PER_STEP, endless_space, synthetic_sweep
from benchmarks.simulated import simulated_run
from raydistill.config.run import Run
from raydistill.core.errors import TransientError, UserError
from raydistill.jobs.train import (
    TrainJob,
    _make_trainer,
    _worker_error,
    check_capacity,
    resolve_launcher,
    train_with_ray_train,
)
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


@dataclass(frozen=True)
class RecordedTrain:
    """`train`, with records of the sockets of every worker and of the steps of all validations.

    Attributes:
        records: An existing folder.
        killed: Kill the process after the second validation of the first attempt.
    """

    records: Path
    killed: bool

    def __call__(self, run, folder, report, inputs, worker):
        listening = [c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
        (self.records / f"worker{worker.rank}.json").write_text(json.dumps([listening, dist.is_initialized()]))
        steps = self.records / "steps"
        first_attempt = not steps.exists()

        def record(metrics, path):
            with steps.open("a") as file:
                file.write(f"{metrics['step']}\n")
            if self.killed and first_attempt and len(steps.read_text().splitlines()) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return report(metrics, path)

        return train(run, folder, record, inputs, worker)


@dataclass(frozen=True)
class RecordedFit:
    """A run of Ray Train: its folder, its result, and the records of its workers."""

    folder: Path
    result: RunResult
    records: Path

    @property
    def sockets(self):
        """For each worker, the addresses on which its process listens, and whether it has a process group."""
        return [json.loads(path.read_text()) for path in sorted(self.records.glob("worker*.json"))]


def fit_with_ray_train(world, root, workers=1, killed=False):
    run, records = make_run(world, "recorded", workers=workers), root / "records"
    records.mkdir()
    result = train_with_ray_train(TrainJob(run, root / "run", RunInputs(), RecordedTrain(records, killed)))
    return RecordedFit(root / "run", result, records)


@pytest.fixture(scope="module")
def restarted_worker(ray_here, world, tmp_path_factory):
    """A run of a worker that was killed once. The tests of this file share their runs: a run starts six processes."""
    return fit_with_ray_train(world, tmp_path_factory.mktemp("restarted"), killed=True)


@pytest.fixture(scope="module")
def two_workers(ray_here, world, tmp_path_factory):
    """A run of two workers."""
    return fit_with_ray_train(world, tmp_path_factory.mktemp("two"), workers=2)


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    """The history of the run in this process, without Ray."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train_in_this_process(make_run(world, "undisturbed"), folder)
    return history(folder)


def test_both_launchers_give_the_same_losses(ray_here, world, restarted_worker, tmp_path):
    """Also after a restart of Ray Train's worker."""
    results = train_under_tune(make_run(world, "same"), tmp_path / "tuned")
    assert restarted_worker.result.status == "done"
    assert_same_losses(history(restarted_worker.folder), history(tmp_path / "tuned"), 1e-6)
    assert results[0].metrics["step"] == history(tmp_path / "tuned")[-1]["step"]


def test_ray_trains_controller_imports_no_training_code(world, tmp_path, monkeypatch):
    """The controller opens the context of the run, and workers open the function."""
    from ray import cloudpickle

    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    trainer = _make_trainer(TrainJob(make_run(world, "x"), tmp_path, RunInputs()), "cpu", 0, [])
    assert b"raydistill.training" not in cloudpickle.dumps(trainer.train_run_context)
    assert b"raydistill.training" in cloudpickle.dumps(trainer.train_loop_per_worker)


def test_workers_listen_on_loopback_and_a_single_worker_has_no_process_group(restarted_worker, two_workers):
    """Torch's own store would listen on every address of the machine, and require no token."""
    for fit, workers in ((restarted_worker, 1), (two_workers, 2)):
        assert [has_group for _, has_group in fit.sockets] == [workers > 1] * workers
        assert {ip.removeprefix("::ffff:") for listening, _ in fit.sockets for ip in listening} == {"127.0.0.1"}


@dataclass(frozen=True)
class FailingTrain:
    """A `train_fn` that raises an error at each attempt, and appends the name of the run's folder to `attempts`.

    `errors`: one for each attempt of all runs, which may not run at the same time.
    """

    errors: tuple[Exception, ...]
    attempts: Path

    def __call__(self, run, folder, report, inputs, worker):
        with self.attempts.open("a") as file:
            file.write(f"{folder.name}\n")
        raise self.errors[len(self.attempts.read_text().splitlines()) - 1]


class CostlessThirdTrain:
    """A `train_fn` whose result lacks the costs in the third trial."""

    def __call__(self, run, folder, report, inputs, worker):
        if inputs.number == 2:
            inputs = replace(inputs, costs={})
        result = simulated_run(run, folder, report, inputs, worker, seconds_per_step=SECONDS_PER_STEP)
        assert ("latency_ms" in result.metrics) == (inputs.number != 2)
        return result


@pytest.mark.parametrize(
    ("errors", "retries"),
    [
        ((TransientError("wait"), UserError("too little memory")), 2),
        # The default run reads the number of retries from the trainer, and the error from Ray's exception.
        pytest.param((TransientError("wait"), TransientError("wait longer")), 1, marks=pytest.mark.slow),
    ],
)
def test_only_transient_errors_are_retried(ray_here, world, tmp_path, errors, retries):
    """The last error is raised: a user error although another retry is left, a transient error after the last retry."""
    failing = FailingTrain(errors, tmp_path / "attempts")
    with pytest.raises(type(errors[-1]), match=str(errors[-1])):
        train_with_ray_train(
            TrainJob(make_run(world, "wrong"), tmp_path / "run", RunInputs(), failing), retries=retries
        )
    assert len(failing.attempts.read_text().splitlines()) == len(errors)


def test_ray_train_restarts_workers_as_often_as_asked_and_reports_their_own_error(world, tmp_path, monkeypatch):
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    trainer = _make_trainer(TrainJob(make_run(world, "x"), tmp_path, RunInputs()), "cpu", 3, [])
    assert trainer.run_config.failure_config.max_failures == 3
    transient, broken = TransientError("wait"), ValueError("broken")
    assert _worker_error(WorkerGroupError("failed", {0: transient, 1: broken})) is transient
    error = _worker_error(WorkerGroupError("failed", {1: broken}))
    assert (type(error), str(error)) == (RuntimeError, "ValueError: broken")


@pytest.mark.parametrize(
    ("launcher", "errors", "attempts"),
    [
        ("tune", (UserError("too little memory"), RuntimeError("broken")), (1, 2)),
        pytest.param("train", (OSError("full"),), (2,), marks=pytest.mark.slow),
    ],
)
def test_a_trial_is_retried_as_often_as_the_space_says(ray_here, tmp_path, capsys, launcher, errors, attempts):
    """Ray Train adds no further retries. The next command may try a failed trial again."""
    space = endless_space(len(errors), 1, 1.0, launcher, retries=1)
    write_sweep_record(space, tmp_path, synthetic_sweep(), "running")
    progress = ProgressCallback(tmp_path, space.search, "rouge2")
    of_attempts = tuple(error for error, count in zip(errors, attempts, strict=True) for _ in range(count))
    failing = FailingTrain(of_attempts, tmp_path / "attempts")
    stop_reason = run_search(TrialContext(space, tmp_path, synthetic_sweep(), "cpu", failing), [progress])
    folders = failing.attempts.read_text().splitlines()
    assert tuple(Counter(folders).values()) == attempts
    assert not stop_reason.exhausted
    failures = [line for line in capsys.readouterr().err.splitlines() if " failed: " in line]
    for failure, error in zip(failures, errors, strict=True):
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

    more = space.model_copy(update={"search": space.search.model_copy(update={"trials": 3})})
    progress = ProgressCallback(tmp_path, more.search, "rouge2")
    run_search(TrialContext(more, tmp_path, sweep, "cpu", CostlessThirdTrain()), [progress])
    repeated = RunResult.read(first / RESULT_FILE)
    assert (repeated.number, repeated.params) == (before[first].number, before[first].params)
    assert RunResult.read(second / RESULT_FILE) == before[second]
    [costless] = set(tmp_path.glob("trials/*/")) - {first, second}
    [failure] = [line for line in capsys.readouterr().err.splitlines() if " failed: " in line]
    assert failure.startswith(f"trial 2 {costless.name}")
    assert "damaged: KeyError 'latency_ms'" in failure


def test_two_data_parallel_workers_equal_one_with_the_same_global_batch(undisturbed, two_workers):
    assert_same_losses(undisturbed, history(two_workers.folder), 1e-4)


def test_a_killed_worker_is_restarted_and_resumes_from_its_checkpoint(undisturbed, restarted_worker):
    """The losses equal those of an undisturbed run, and the steps before the checkpoint are not repeated."""
    assert restarted_worker.result.status == "done"
    assert_same_losses(undisturbed, history(restarted_worker.folder), 1e-6)
    validated = [int(step) for step in (restarted_worker.records / "steps").read_text().split()]
    assert validated == [line["step"] for line in history(restarted_worker.folder)]


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
