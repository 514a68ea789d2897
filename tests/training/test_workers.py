"""Data-parallel workers: gradients, metrics and the devices that a run is charged for."""

import pytest
import torch

from raydistill.config.run import Run, Training
from raydistill.results.records import read_trials
from raydistill.training.loop import fit
from raydistill.training.optimizer_step import OptimizerStep
from raydistill.training.records import write_run
from raydistill.training.workers import Worker
from tests.factories.training import (
    FP32,
    SETTINGS,
    flat_weights,
    no_report,
    relative_distance,
    rising_scores,
    tiny_distillation,
    with_cache,
)

DATA_PARALLEL = {**FP32, "batch_size": 5, "epochs": 2, "checks_per_epoch": 3, "max_steps": 6}


def make_distillation(folder, cached):
    """The step that every worker trains; with `cached`, the first worker builds the teacher cache."""
    live = tiny_distillation("bart", folder / "t", n=11)
    return with_cache(live, live.teacher, folder / "cache") if cached else live


def _train_worker(rank, world_size, folders):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folders[0].parent}/rendezvous", rank=rank, world_size=world_size
    )
    for folder in folders:
        distillation = make_distillation(folder, folder.name == "cached")
        settings = Training(**DATA_PARALLEL, workers=world_size)
        step = OptimizerStep.create(distillation, settings, Worker(rank, world_size, "cpu"))
        state = fit(step, folder / "run", rising_scores(distillation), no_report)
        torch.save((flat_weights(distillation.student), state.history), folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def trained_alone(tmp_path_factory):
    """By folder, the weights of a single worker before and after its run, and the final state of the run.

    Two processes have trained the student again in each folder, whose name says whether they read a teacher cache.
    """
    root, trained = tmp_path_factory.mktemp("workers"), {}
    for name in ("live", "cached"):
        folder = root / name
        for parent in ("single", "run"):
            (folder / parent).mkdir(parents=True)
        single = make_distillation(folder, name == "cached")
        start = flat_weights(single.student)
        step = OptimizerStep.create(single, Training(**DATA_PARALLEL))
        state = fit(step, folder / "single", rising_scores(single), no_report)
        trained[folder] = start, flat_weights(single.student), state
    torch.multiprocessing.spawn(_train_worker, (2, list(trained)), nprocs=2)
    return trained


@pytest.mark.parametrize("name", ["live", "cached"])
def test_two_workers_train_the_weights_of_one_worker(name, trained_alone):
    """The last of the batches of 5 from 11 rows has one row: one of the workers has no row in this batch."""
    [(folder, (start, trained, state))] = [item for item in trained_alone.items() if item[0].name == name]
    for rank in (0, 1):
        weights, history = torch.load(folder / f"rank{rank}.pt")
        assert relative_distance(weights - start, trained - start) < 1e-4
        assert [h["loss"] for h in history] == pytest.approx([h["loss"] for h in state.history], rel=1e-4)
    assert state.step == 6


def test_running_trial_is_charged_for_its_gpus_or_cpu_threads(tmp_path):
    threads = SETTINGS.model_copy(update={"threads": 3})
    assert [Worker(world_size=2, device=name).num_devices(threads) for name in ("cpu", "cuda", "cuda:1")] == [6, 2, 2]
    assert Worker(device="cuda").num_devices(SETTINGS.model_copy(update={"gpus": 0.25})) == 0.25
    distillation = tiny_distillation("bart", tmp_path / "t")
    folder = tmp_path / "trials" / "run"
    folder.mkdir(parents=True)
    write_run(folder / "run.json", Run.model_validate({"name": "r", "teacher": "t", "dataset": "d"}))
    step = OptimizerStep.create(distillation, threads)
    state = fit(step, folder, rising_scores(distillation), no_report)
    [trial] = read_trials(tmp_path)
    assert (trial.status, trial.device_hours) == ("running", state.history[-1]["device_hours"])
    assert trial.device_hours == pytest.approx(3 * state.history[-1]["time_s"] / 3600, rel=0.01)
