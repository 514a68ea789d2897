"""Training runs on machines that share a storage but no folder. Each machine is a process with its own home."""

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from raydistill.cluster import snapshots, sync
from raydistill.config.run import Run
from raydistill.core.errors import TransientError
from raydistill.jobs.train import TrainJob, train_and_sync
from raydistill.training import run as training_run
from raydistill.training.inputs import RunInputs
from raydistill.training.workers import Worker
from tests.factories.machines import run_on_machine, start_on_machine
from tests.factories.training import make_run, no_report, write_run_workspace

SUPERSEDED = 3
RANDOM_START = {
    "teacher": None,
    "student": None,
    "start": {"family": "bart", "encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "heads": 2, "vocab_size": 300},
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A tiny teacher and a corpus, in a folder outside of all homes."""
    return write_run_workspace(tmp_path_factory.mktemp("runs"))


def train_on(run: Run, report=no_report, worker: Worker | None = None) -> None:
    """Train in the home of this machine."""
    folder = Path(os.environ["RAYDISTILL_HOME"]) / "runs" / run.name
    train_and_sync(TrainJob(run, folder, RunInputs()), report, worker or Worker())


def read_result(home: Path, name: str) -> dict:
    return json.loads((home / "runs" / name / "result.json").read_text())


def train_and_stop(run: Run) -> None:
    """Decide to stop the run at its first validation; the machine is lost before the run is scored."""
    training_run.promote_best_checkpoint = lambda *_: os._exit(9)
    train_on(run, lambda *_: "others were better")


def test_a_decision_to_stop_is_kept_when_another_machine_finishes_the_run(workspace, tmp_path):
    run = make_run(workspace, name="stopped")
    assert run_on_machine(tmp_path / "a", tmp_path / "storage", train_and_stop, run) == 9
    assert run_on_machine(tmp_path / "b", tmp_path / "storage", train_on, run) == 0
    result = read_result(tmp_path / "b", "stopped")
    assert (result["status"], result["reason"], result["steps"]) == ("stopped", "others were better", 2)


def train_as_rank(run: Run, rank: int, rendezvous: Path) -> None:
    """Train as one of two workers."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    train_on(run, worker=Worker(rank, 2))
    dist.destroy_process_group()


def test_workers_on_two_machines_train_the_same_random_start(workspace, tmp_path):
    run = make_run(workspace, **RANDOM_START, training={"workers": 2})
    machines = [
        start_on_machine(tmp_path / name, tmp_path / "storage", train_as_rank, run, rank, tmp_path / "rendezvous")
        for rank, name in enumerate("ab")
    ]
    deadline = time.monotonic() + 500
    while any(machine.exitcode is None for machine in machines) and time.monotonic() < deadline:
        time.sleep(0.1)
        if any(machine.exitcode for machine in machines):  # the other worker would wait without end
            break
    assert [machine.exitcode for machine in machines] == [0, 0]
    starts = [tmp_path / name / "runs" / run.name / "start" / "model.safetensors" for name in "ab"]
    assert starts[0].read_bytes() == starts[1].read_bytes()
    assert read_result(tmp_path / "a", run.name)["status"] == "done"


def train_cut_off(run: Run) -> None:
    """Train until the first validation, where this process is stopped for a while; then continue."""
    try:
        train_on(run, lambda *_: os.kill(os.getpid(), signal.SIGSTOP))
    except TransientError as error:
        os._exit(SUPERSEDED if "another worker has taken over" in str(error) else 1)


def test_a_worker_that_was_cut_off_changes_nothing_that_its_successor_wrote(workspace, tmp_path):
    run = make_run(workspace, name="fenced")
    cut_off = start_on_machine(tmp_path / "a", tmp_path / "storage", train_cut_off, run)
    while psutil.Process(cut_off.pid).status() != psutil.STATUS_STOPPED:
        assert cut_off.exitcode is None
        time.sleep(0.1)
    assert run_on_machine(tmp_path / "b", tmp_path / "storage", train_on, run) == 0
    before = stored_run(tmp_path, run.name)
    assert before["result.json"] == (tmp_path / "b/runs/fenced/result.json").read_bytes()
    assert "best/model.safetensors" in before
    os.kill(cut_off.pid, signal.SIGCONT)
    cut_off.join(500)
    assert cut_off.exitcode == SUPERSEDED
    assert stored_run(tmp_path, run.name) == before


def stored_run(root: Path, name: str) -> dict[str, bytes]:
    """The files of a run as a further machine downloads them."""
    home = root / f"reader-{time.monotonic_ns()}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYDISTILL_HOME", str(home))
        patch.setenv(sync.STORAGE_ENV, f"file://{root / 'storage'}")
        snapshots.pull(home / "runs" / name)
    folder = home / "runs" / name
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
