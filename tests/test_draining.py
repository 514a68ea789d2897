"""A machine that Ray was told to drain, as for a spot instance's notice: the trial on it is saved and moves."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.tune import Callback

from benchmarks.nodes import STORE_BYTES, head
from raydistill.cluster.start import cluster
from raydistill.config.space import Space
from raydistill.search.prepare import Prepared
from raydistill.search.tune_search import search
from tests.tiny import save_tiny
from tests.world import write_corpus

PREEMPTION = 2  # DRAIN_NODE_REASON_PREEMPTION of Ray's autoscaler.proto
PER_EPOCH, EPOCHS = 300, 10
SEARCH = {"trials": 1, "sampler": "grid", "retries": 1}  # it moves once: the machine that it left drains on for long


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def space_of(folder: Path, launcher: str, workers: int) -> Space:
    """One trial of ten epochs of 300 steps, with a validation at the end of each."""
    run = {
        "teacher": str(save_tiny("bart", folder / "teacher", dropout=0.0)),
        "dataset": {
            "name": str(write_corpus(folder / "data", train=8 * PER_EPOCH)),
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


class Notice(Callback):
    """After a trial's first validation another machine joins, and the trial's own has half a minute left."""

    # Of the class, since Tune pickles its callbacks: the cluster, the trial's node, whether it was told.
    cluster: Any = None
    node: str = ""
    given = False

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
        if not Notice.given:
            Notice.given = True
            Notice.cluster.add_node(num_cpus=2, object_store_memory=STORE_BYTES)
            client: Any = GcsClient(address=Notice.cluster.address)
            deadline = int(1000 * (time.time() + 30))
            accepted, why = client.drain_node(Notice.node, PREEMPTION, "spot notice", deadline)
            assert accepted, why


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("launcher", "workers"), [("tune", 1), ("train", 1), ("train", 2)])
def test_a_trial_on_a_machine_that_is_drained_is_saved_at_once_and_moves(
    launcher: str, workers: int, home: Path, tmp_path: Path
) -> None:
    sweep = home / "sweeps" / "drained"
    sweep.mkdir(parents=True)
    space = space_of(tmp_path, launcher, workers)
    costs = {"latency_ms": 10.0, "latency_ms_b1": 1.0, "params_m": 1.0}
    prepared = Prepared({"size": "2-3", "costs": costs}, {"2-1": costs}, {"2-1": costs})
    saved: list[int] = []  # the steps at which the state was saved, as far as they were seen
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            for path in sweep.glob("trials/*/state.json"):
                if (step := _step(path)) is not None and step not in saved:
                    saved.append(step)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    with head() as started, cluster():
        first = started.add_node(num_cpus=2, object_store_memory=STORE_BYTES)
        Notice.cluster, Notice.node, Notice.given = started, first.node_id, False
        try:
            search(space, sweep, prepared, "cpu", [Notice()])
        finally:
            over.set()
            thread.join()
    [folder] = sweep.glob("trials/sft-*")
    result = json.loads((folder / "result.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert (result["status"], result["steps"]) == ("done", EPOCHS * PER_EPOCH)
    assert [line["step"] for line in lines] == [n * PER_EPOCH for n in range(1, EPOCHS + 1)]
    assert len([step for step in saved if step % PER_EPOCH]) == 1, f"saved once between two validations: {saved}"


def _step(path: Path) -> Any:
    try:
        return json.loads(path.read_text())["step"]
    except (OSError, ValueError):
        return None
