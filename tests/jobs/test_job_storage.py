"""Jobs that were killed between a step and its copy to the storage: the next command copies what is missing."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raydistill.cluster import snapshots, sync
from raydistill.config.run import Columns, Dataset
from raydistill.core import artifact
from raydistill.data.streaming import SplitScan
from raydistill.jobs import pseudolabel, teacher_cache
from raydistill.jobs.label_outputs import EngineRecord, check_same_engine, engine_path
from raydistill.jobs.pseudolabel import LabelJob, LabelTask
from raydistill.label_sets.batch_plan import BatchPlan
from raydistill.label_sets.label_set import read_manifest
from raydistill.models.loading import load_model
from raydistill.teacher_cache.builder import build_cache
from tests.factories.label_sets import write_labels
from tests.factories.machines import machine_switch, write_file
from tests.factories.models import save_tiny
from tests.factories.teacher_cache import cache_examples, cache_layout

UseMachine = Callable[[str], Path]


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
    pseudolabel._build_label_set(task, SplitScan(3, "f", True, 0, Columns(source="source", target="target")))
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
    pseudolabel._label_batches(task, plan, [3, 4, 5])
    assert calls == [[3], [4, 5]]
    calls.clear()
    pseudolabel._label_batches(task, plan, [4, 5])  # the engine is recorded
    assert calls == [[4, 5]]
    calls.clear()
    monkeypatch.delenv(sync.STORAGE_ENV)
    artifact.remove(task.work_dir)
    pseudolabel._label_batches(task, plan, [3, 4, 5])
    assert calls == [[3, 4, 5]]
