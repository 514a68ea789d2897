"""Jobs on machines that share a storage but no folder: killed between a step and its copy, or cut off meanwhile."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raydistill.cluster import snapshots, sync
from raydistill.config.run import Columns, Dataset
from raydistill.core import artifact
from raydistill.core.errors import TransientError
from raydistill.data.streaming import SplitScan, scan_split
from raydistill.jobs import pseudolabel, teacher_cache
from raydistill.jobs.label_outputs import (
    EngineRecord,
    check_same_engine,
    count_batch,
    engine_path,
    merge_outputs,
    write_batch_output,
)
from raydistill.jobs.pseudolabel import LabelJob, LabelTask
from raydistill.label_sets.batch_plan import BatchPlan, open_plan
from raydistill.label_sets.label_set import read_label_set, read_manifest
from raydistill.label_sets.manifest import DataRecord, LabelDescription, TeacherRecord
from raydistill.models.loading import load_model
from raydistill.teacher_cache.builder import build_cache
from tests.factories.label_sets import write_labels
from tests.factories.machines import machine_switch, write_file
from tests.factories.models import save_tiny
from tests.factories.teacher_cache import cache_examples, cache_layout

UseMachine = Callable[[str], Path]
NUM_BATCHES = 4


class Killed(BaseException):
    """Ends a job in the middle, as a SIGKILL does."""


@pytest.fixture
def use_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> UseMachine:
    """Return a function that switches to the machine with a name and returns its home; all share one storage."""
    (tmp_path / "storage").mkdir()
    monkeypatch.setenv(sync.STORAGE_ENV, f"file://{tmp_path / 'storage'}")
    return machine_switch(tmp_path, monkeypatch)


def label_task(folder: Path) -> Any:
    job = LabelJob("t", Dataset(name="d"))
    description: Any = SimpleNamespace(teacher=SimpleNamespace(path="t"))
    return LabelTask(job, description, folder, "cpu", verbose=False)


def test_a_label_set_that_was_merged_before_a_kill_reaches_the_storage(use_machine: UseMachine, tmp_path: Path) -> None:
    """The outputs of the batches are deleted from the storage too."""
    task = label_task(use_machine("one") / "labels" / "set")
    sync.push(write_file(task.work_dir / "out" / "batch-000000.parquet", "output"))
    write_labels(task.folder)
    pseudolabel.build_label_set(task, SplitScan(3, "f", True, 0, Columns(source="source", target="target")))
    assert not task.work_dir.exists()
    assert not (tmp_path / "storage" / "labels" / ".set.work").exists()
    folder = use_machine("two") / "labels" / "set"
    snapshots.pull(folder)
    assert read_manifest(folder).rows == 3


def test_the_manifests_of_a_cache_that_was_finished_before_a_kill_reach_the_storage(
    use_machine: UseMachine, tmp_path: Path
) -> None:
    teacher, examples = load_model(save_tiny("bart", tmp_path / "t")), cache_examples()
    layout = cache_layout(use_machine("one"), examples)
    layout.prepare()
    build_cache(layout, teacher)
    sync.push(*(path for array in layout.array_sizes for path in array.glob("part-*")))
    request: Any = SimpleNamespace(make_layout=lambda mode: layout)
    stats = teacher_cache.build_teacher_cache(request, "full")
    other = cache_layout(use_machine("two"), examples)
    teacher_cache.pull_manifests(other)
    assert not other.is_incomplete()
    assert other.device_seconds == stats.device_seconds


def test_the_engine_that_was_recorded_before_a_kill_reaches_the_storage(use_machine: UseMachine) -> None:
    engine = EngineRecord(engine="ctranslate2 fp32", fallback_reason="")
    work_dir = use_machine("one") / "labels" / ".set.work"
    engine.write(engine_path(work_dir))
    check_same_engine(work_dir, engine)
    path = engine_path(use_machine("two") / "labels" / ".set.work")
    sync.pull(path)
    assert EngineRecord.read(path) == engine


def test_the_first_batch_alone_records_the_engine_if_machines_share_no_folder(
    use_machine: UseMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock of one machine says nothing to another: two engines could record themselves at the same time."""
    task = label_task(use_machine("one") / "labels" / "set")
    engine = EngineRecord(engine="ctranslate2 fp32", fallback_reason="")
    plan = BatchPlan(task.plan_dir, [], [], [])
    calls = []

    def run_batches(numbers: list[int], *_: object, **__: object) -> None:
        calls.append(list(numbers))
        check_same_engine(task.work_dir, engine)

    monkeypatch.setattr(pseudolabel, "run_batches", run_batches)
    pseudolabel.label_batches(task, plan, [3, 4, 5])
    assert calls == [[3], [4, 5]]
    calls.clear()
    pseudolabel.label_batches(task, plan, [4, 5])  # the engine is recorded
    assert calls == [[4, 5]]
    calls.clear()
    monkeypatch.delenv(sync.STORAGE_ENV)
    artifact.remove(task.work_dir)
    pseudolabel.label_batches(task, plan, [3, 4, 5])
    assert calls == [[3, 4, 5]]


class LabelMachines:
    """Machines that label the same split of `NUM_BATCHES` rows, a row per batch; every text names its machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        rows = [{"id": f"r{i}", "source": f"source {i}", "target": f"target {i}"} for i in range(NUM_BATCHES)]
        write_file(root / "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        self.labelled: list[tuple[str, int]] = []  # machine and number of each batch

    def label(self, machine: str, on_batch: Callable[[], None] | None = None, on_merge: Any = None) -> None:
        """Run the job on a machine; `on_batch` is called after each batch, `on_merge` between merge and copy."""
        dataset = Dataset(name=str(self.root / "train.jsonl"))
        description = LabelDescription(
            teacher=TeacherRecord(name="t", path="t", fingerprint="f"),
            data=DataRecord(name="d", split="train", fingerprint="f", skipped=0, dataset={}),
            decoding={"max_source_tokens": 9},
            n_best=1,
        )
        task = LabelTask(LabelJob("t", dataset, batch_chars=1), description, self.folder(machine), "cpu", verbose=False)

        def run_batches(numbers: list[int], *_: object, **__: object) -> None:
            plan = open_plan(task.plan_dir)
            assert plan is not None
            assert len(plan) == NUM_BATCHES
            engine = EngineRecord(engine="ctranslate2 fp32", fallback_reason="")
            check_same_engine(task.work_dir, engine)
            for number in numbers:
                batch = plan.read_batch(number)
                text = f"batch {number} by {machine}"
                counts = count_batch([text], batch, "rouge2", engine=engine.engine, device_seconds=1)
                columns = {"id": batch["ids"], "targets": [[text]], "scores": [[-1.0]]}
                write_batch_output(task.work_dir, number, columns, counts)
                self.labelled.append((machine, number))
                if on_batch:
                    on_batch()

        def merge(*args: Any) -> None:
            merge_outputs(*args)
            if on_merge:
                on_merge()

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAYDISTILL_HOME", str(self.root / machine))
            patch.setattr(pseudolabel, "run_batches", run_batches)
            patch.setattr(pseudolabel, "merge_outputs", merge)
            pseudolabel.build_label_set(task, scan_split(dataset, "train"))

    def folder(self, machine: str) -> Path:
        """The label set on a machine."""
        return self.root / machine / "labels" / "set"

    def labels(self, machine: str) -> list[str]:
        """The labels on a machine, after a pull, in the order of the rows."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAYDISTILL_HOME", str(self.root / machine))
            snapshots.pull(self.folder(machine))
        return list(read_label_set(self.folder(machine)).targets.values())

    def stored_snapshots(self) -> list[str]:
        """The names of the snapshots of the label set in the storage."""
        return sorted(path.name for path in (self.root / "storage" / ".snapshots" / "labels" / "set").iterdir())

    def stored_outputs(self) -> list[str]:
        """The names of the outputs in the storage."""
        return sorted(path.name for path in (self.root / "storage" / "labels" / ".set.work" / "out").glob("*"))


@pytest.fixture
def machines(use_machine: UseMachine, tmp_path: Path) -> LabelMachines:
    """Machines of `use_machine` with a label job."""
    return LabelMachines(tmp_path)


def once(action: Callable[[], None]) -> Callable[[], None]:
    """A function that calls `action` the first time."""
    pending = [action]
    return lambda: pending.pop()() if pending else None


@pytest.mark.parametrize("moment", ["on_batch", "on_merge"])
def test_a_label_job_that_was_cut_off_leaves_the_set_of_its_successor(machines: LabelMachines, moment: Any) -> None:
    stored: list[list[str]] = []

    def take_over() -> None:
        machines.label("two")
        stored.extend([machines.labels("two"), machines.stored_snapshots()])

    with pytest.raises(TransientError, match=r"labels/set: another worker has taken over"):
        machines.label("one", **{moment: once(take_over)})
    assert [machines.labels("three"), machines.stored_snapshots()] == stored
    assert len(stored[0]) == NUM_BATCHES
    machines.label("one")  # the next command on the first machine takes the set of the successor
    assert machines.labels("one") == machines.labels("three") == stored[0]
    assert machines.stored_outputs() == []


def test_a_label_job_that_was_cut_off_deletes_no_output_of_its_successor(machines: LabelMachines) -> None:
    """The successor is killed after its first batch; its second command repeats no batch."""

    def kill() -> None:
        raise Killed

    def take_over() -> None:
        with pytest.raises(Killed):
            machines.label("two", on_batch=kill)

    with pytest.raises(TransientError, match=r"labels/set: another worker has taken over"):
        machines.label("one", on_batch=once(take_over))
    first, second, *_ = machines.labelled
    assert (first[0], second[0]) == ("one", "two")
    assert len(machines.stored_outputs()) == NUM_BATCHES
    machines.label("two")
    labels = machines.labels("three")
    assert [label for label in labels if "two" in label] == [f"batch {second[1]} by two"]
    assert sorted(label.split(" by ")[0] for label in labels) == [f"batch {number}" for number in range(NUM_BATCHES)]
    assert [machine for machine, _ in machines.labelled].count("two") == 1


def test_a_stored_label_set_is_used_without_a_claim(machines: LabelMachines) -> None:
    """Otherwise two commands that only read the set could stop each other."""
    machines.label("one")
    before = machines.stored_snapshots()
    machines.label("two")
    machines.label("one")
    assert machines.stored_snapshots() == before
    assert {machine for machine, _ in machines.labelled} == {"one"}
