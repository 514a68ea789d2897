"""Draining nodes, as after a spot instance's notice: a trial on such a node saves its state and moves to another."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.tune import Callback

from benchmarks.simulated_nodes import OBJECT_STORE_BYTES, cluster_head
from raydistill.cluster.drain import DrainMonitor
from raydistill.cluster.start import ray_cluster
from raydistill.config.space import Space
from raydistill.search.prepare import PreparedSweep
from raydistill.search.trial import TrialContext
from raydistill.search.tune_search import run_search
from tests.factories.models import save_tiny
from tests.factories.sweeps import shape_table, sweep_teacher
from tests.factories.workspace import write_corpus

PREEMPTION = 2  # DRAIN_NODE_REASON_PREEMPTION of Ray's autoscaler.proto
STEPS_PER_EPOCH, EPOCHS = 300, 10
SEARCH = {"trials": 1, "sampler": "grid", "retries": 1}  # one retry: the trial may move once


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def make_space(folder: Path, launcher: str, workers: int) -> Space:
    """A space of one trial: ten epochs of 300 steps, with a validation at the end of each epoch."""
    run = {
        "teacher": str(save_tiny("bart", folder / "teacher", dropout=0.0)),
        "dataset": {
            "name": str(write_corpus(folder / "data", train=8 * STEPS_PER_EPOCH)),
            "max_source_tokens": 32,
            "max_target_tokens": 16,
        },
        "student": {"size": "2-1"},
        "training": {
            "epochs": EPOCHS,
            "batch_size": 8,
            "warmup_steps": 2,
            "checks_per_epoch": 1,
            "patience": 99,
            "teacher_cache": "off",
            "launcher": launcher,
            "workers": workers,
        },
        "decoding": {"beams": 1, "max_length": 12},
        "evaluation": {"metric": "rouge2"},
    }
    return Space.model_validate({"name": "drained", "run": run, "search": SEARCH})


class PreemptionNotice(Callback):
    """After the first validation, adds a node and gives the trial's own node a notice of half a minute."""

    # Class attributes, because Tune pickles its callbacks.
    cluster: Any = None
    node_id: str = ""
    sent = False

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
        if not PreemptionNotice.sent:
            PreemptionNotice.sent = True
            PreemptionNotice.cluster.add_node(num_cpus=2, object_store_memory=OBJECT_STORE_BYTES)
            client: Any = GcsClient(address=PreemptionNotice.cluster.address)
            deadline = int(1000 * (time.time() + 30))
            accepted, reason = client.drain_node(PreemptionNotice.node_id, PREEMPTION, "spot notice", deadline)
            assert accepted, reason


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("launcher", "workers"), [("tune", 1), ("train", 1), ("train", 2)])
def test_a_trial_on_a_draining_node_is_saved_once_and_moves(
    launcher: str, workers: int, home: Path, tmp_path: Path
) -> None:
    sweep = home / "sweeps" / "drained"
    sweep.mkdir(parents=True)
    space = make_space(tmp_path, launcher, workers)
    costs = {"latency_ms": 10.0, "latency_ms_b1": 1.0, "params_m": 1.0}
    teacher = sweep_teacher(size="2-3", costs=costs)
    prepared = PreparedSweep(teacher, shape_table({"2-3": costs, "2-1": costs}))
    saved_steps: list[int] = []
    stop_watching = threading.Event()

    def watch() -> None:
        while not stop_watching.wait(0.02):
            for path in sweep.glob("trials/*/state/step-*.safetensors"):
                if (step := int(path.stem.removeprefix("step-"))) not in saved_steps:
                    saved_steps.append(step)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    with cluster_head() as cluster, ray_cluster():
        first = cluster.add_node(num_cpus=2, object_store_memory=OBJECT_STORE_BYTES)
        PreemptionNotice.cluster, PreemptionNotice.node_id, PreemptionNotice.sent = cluster, first.node_id, False
        try:
            run_search(TrialContext(space, sweep, prepared, "cpu"), [PreemptionNotice()])
        finally:
            stop_watching.set()
            thread.join()
    [folder] = sweep.glob("trials/sft-*")
    result = json.loads((folder / "result.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert (result["status"], result["steps"]) == ("done", EPOCHS * STEPS_PER_EPOCH)
    assert [line["step"] for line in lines] == [n * STEPS_PER_EPOCH for n in range(1, EPOCHS + 1)]
    between_validations = [step for step in saved_steps if step % STEPS_PER_EPOCH]
    assert len(between_validations) == 1, f"expected one save between two validations: {saved_steps}"


def test_a_failing_query_is_reported_once_and_means_no_drain(capsys: pytest.CaptureFixture[str]) -> None:
    assert not ray.is_initialized()
    monitor = DrainMonitor(["a"])
    for _ in range(3):
        monitor.next_check = 0.0
        assert not monitor()
    [line] = capsys.readouterr().err.splitlines()
    assert "draining nodes" in line
    assert "Ray has not been started yet" in line


def test_an_interface_of_ray_that_changed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("ray._private.state.GlobalState.get_draining_nodes")
    with pytest.raises(AttributeError, match="get_draining_nodes"):
        DrainMonitor(["a"])()
