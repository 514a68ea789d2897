"""The pseudo-label job on Ray: its label set, how it resumes after a kill, what it refuses."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from raydistill.config.run import Curation, Dataset, Decoding, PseudoLabeling
from raydistill.core.errors import UserError
from raydistill.core.paths import raydistill_home
from raydistill.data.streaming import scan_split
from raydistill.inference.decoding import Engine, EngineOptions, Hypothesis, resolve_decoding
from raydistill.inference.engines import open_engine
from raydistill.jobs.pseudolabel import LabelJob, Labeller, LabelTask, _label_set_key, _slug, describe_job, pseudolabel
from raydistill.label_sets.batch_plan import BatchPlan
from raydistill.label_sets.label_set import read_candidates, read_pseudolabel_manifest
from tests.factories.engines import has_avx512
from tests.factories.local_jobs import local_jobs
from tests.factories.models import save_tiny
from tests.factories.workspace import command, corpus_rows, environment, last_json, processes_of, wait_for_ray_to_end

DECODING = Decoding(beams=2, max_length=12)
KILLED_ROWS = 70  # three batches of `KilledCommand`
RAY_CPUS = 1  # with several CPUs a job starts several teachers, and each imports torch and transformers


@pytest.fixture(scope="module")
def teacher_and_data(tmp_path_factory):
    """A folder with a teacher and a data set in two shards, and the rows of the data set."""
    root = tmp_path_factory.mktemp("world")
    save_tiny("bart", root / "teacher", dropout=0.0)
    (root / "data").mkdir()
    rows = corpus_rows(60)
    for n, part in enumerate((rows[:35], rows[35:])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (root / "data" / f"train-0000{n}-of-00002.jsonl").write_text(lines)
    return root, rows


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The home of the jobs in this process, which share their conversions of the teacher."""
    return tmp_path_factory.mktemp("local_home")


@pytest.fixture(scope="module")
def label_set(home, teacher_and_data, tmp_path_factory):
    """The label set of `make_job` without changes, in a folder without other sets."""
    with local_jobs(home):
        return pseudolabel(make_job(teacher_and_data), tmp_path_factory.mktemp("labels"), verbose=False)


@pytest.fixture
def labelled_here(home):
    """The jobs of a test run in this process, without Ray."""
    with local_jobs(home):
        yield


@pytest.fixture
def label_root(label_set, tmp_path):
    """A folder that contains a copy of the label set of `make_job`."""
    return shutil.copytree(label_set.parent, tmp_path / "labels")


def make_job(teacher_and_data, **changes):
    root, _ = teacher_and_data
    return LabelJob(
        str(root / "teacher"), Dataset(name=str(root / "data")), decoding=DECODING, batch_chars=800, **changes
    )


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a label set: one for each candidate of each row."""
    return [row for part in sorted(folder.glob("part-*")) for row in pq.read_table(part).to_pylist()]


def test_every_row_of_every_shard_has_the_candidates_of_the_engine(labelled_here, teacher_and_data, tmp_path):
    root, rows = teacher_and_data
    folder = pseudolabel(make_job(teacher_and_data, pseudo=PseudoLabeling(n_best=2)), tmp_path, verbose=False)
    candidates_by_id = dict(read_candidates(folder))
    assert list(candidates_by_id) == [row["id"] for row in rows]
    engine = open_engine(root / "teacher", options=EngineOptions(cache_dir=tmp_path / "c"))
    beam = resolve_decoding(DECODING, engine.generation_config, None, 64)
    expected = engine.generate([row["source"] for row in rows], beam, max_source_tokens=64, n_best=2)
    for candidates, hypotheses in zip(candidates_by_id.values(), expected, strict=True):
        assert [c.target for c in candidates] == [h.text.strip() for h in hypotheses]
        assert [c.score for c in candidates] == pytest.approx([h.score for h in hypotheses], abs=1e-4)
    manifest = read_pseudolabel_manifest(folder)
    assert (manifest.rows, manifest.engine, manifest.n_best) == (60, "ctranslate2 fp32", 2)
    assert manifest.device_hours > 0
    lines = read_lines(folder)
    assert len({(line["id"], line["rank"]) for line in lines}) == len(lines) == 120
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, f".{folder.name}.lock", "c"}
    assert list((raydistill_home() / "cache" / "ctranslate2").glob("*/model.bin"))


def test_complete_set_is_reused_and_other_precision_or_rules_give_another_set(
    labelled_here, teacher_and_data, label_set, label_root
):
    folder = label_root / label_set.name
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert pseudolabel(make_job(teacher_and_data), label_root, verbose=False) == folder
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    eight = pseudolabel(make_job(teacher_and_data, pseudo=PseudoLabeling(precision="int8")), label_root, verbose=False)
    # Without AVX512, int8 products of this teacher saturate and its conversion fails the check against transformers.
    expected = "ctranslate2 int8" if has_avx512() else "transformers fp32"
    assert read_pseudolabel_manifest(eight).engine == expected
    curated = pseudolabel(
        make_job(teacher_and_data, pseudo=PseudoLabeling(curation=Curation(max_copy_rate=0.9))),
        label_root,
        verbose=False,
    )
    assert len({folder, eight, curated}) == 3
    assert read_pseudolabel_manifest(curated).source_label_set == folder.name


def test_reverse_model_of_a_job_is_read_by_a_worker_in_another_folder(
    ray_here, teacher_and_data, label_root, monkeypatch
):
    """The path is relative to the folder of the command. The limit is so high that only empty labels are dropped."""
    monkeypatch.chdir(teacher_and_data[0])
    curation = Curation(reverse_model="teacher", max_reverse_loss=1000)
    job = make_job(teacher_and_data, pseudo=PseudoLabeling(curation=curation))
    [complete] = label_root.glob("*/manifest.json")
    manifest = read_pseudolabel_manifest(pseudolabel(job, label_root, verbose=False))
    assert manifest.source_label_set == complete.parent.name
    assert manifest.rows + manifest.dropped.get("empty", 0) == 60


def test_other_teacher_settings_give_another_set_and_a_change_during_a_job_is_refused(
    labelled_here, teacher_and_data, tmp_path
):
    root, _ = teacher_and_data
    teacher = tmp_path / "teacher"
    shutil.copytree(root / "teacher", teacher)
    job = LabelJob(str(teacher), Dataset(name=str(root / "data"), train_rows=4), decoding=DECODING)
    first = pseudolabel(job, tmp_path / "labels", verbose=False)
    description = describe_job(job, scan_split(job.dataset, "train"))
    settings = json.loads((teacher / "generation_config.json").read_text())
    (teacher / "generation_config.json").write_text(json.dumps(settings | {"repetition_penalty": 1.5}))
    assert pseudolabel(job, tmp_path / "labels", verbose=False) != first
    task = LabelTask(job, description, tmp_path / "set", "cpu")
    with pytest.raises(UserError, match="the teacher changed since the job started"):
        Labeller(task, BatchPlan(tmp_path, [], [], []))


def test_prefix_is_part_of_what_identifies_a_label_set(teacher_and_data):
    keys = set()
    for prefix in (None, "", "summarize: "):
        job = make_job(teacher_and_data)
        job = replace(job, dataset=job.dataset.model_copy(update={"source_prefix": prefix}))
        description = describe_job(job, scan_split(job.rows, job.split))
        assert description.source_prefix == prefix
        keys.add(_label_set_key(job, description, "cpu"))
    assert len(keys) == 3


def test_label_set_is_named_after_its_data():
    """`labels describe my-texts-train` of the documentation finds the set."""
    names = {"data/my_texts.jsonl.gz": "my-texts", "x/train.source": "train", "EdinburghNLP/xsum": "xsum", "a.b": "a-b"}
    assert {name: _slug(name) for name in names} == names


def test_truncated_batch_is_labelled_again(labelled_here, teacher_and_data, label_set, tmp_path, monkeypatch):
    expected = list(read_candidates(label_set))

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("raydistill.jobs.pseudolabel.merge_outputs", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pseudolabel(make_job(teacher_and_data), tmp_path / "interrupted", verbose=False)
    outputs = sorted((tmp_path / "interrupted").glob(".*.work/out/*.parquet"))
    outputs[1].write_bytes(outputs[1].read_bytes()[:-20])
    outputs[2].write_bytes(b"")
    assert (
        list(read_candidates(pseudolabel(make_job(teacher_and_data), tmp_path / "interrupted", verbose=False)))
        == expected
    )


def test_more_threads_than_a_machine_has_are_refused(ray_here, teacher_and_data, tmp_path):
    with pytest.raises(UserError, match="no machine of the cluster has 2 CPUs for a teacher"):
        pseudolabel(make_job(teacher_and_data, threads=RAY_CPUS + 1), tmp_path, verbose=False)


def test_model_that_ctranslate2_cannot_run_is_labelled_by_transformers_or_refused(
    labelled_here, teacher_and_data, tmp_path
):
    root, _ = teacher_and_data
    teacher = save_tiny("marian", tmp_path / "marian", marian_padding_row=0.5)
    job = LabelJob(str(teacher), Dataset(name=str(root / "data"), train_rows=4), decoding=DECODING)
    manifest = read_pseudolabel_manifest(pseudolabel(job, tmp_path / "labels", verbose=False))
    assert manifest.engine == "transformers fp32"
    assert "padding row is not zero" in manifest.engine_fallback_reason
    strict = LabelJob(str(teacher), job.dataset, decoding=Decoding(beams=3, max_length=12), allow_fallback=False)
    with pytest.raises(UserError, match="padding row is not zero"):
        pseudolabel(strict, tmp_path / "labels", verbose=False)


# Kills


class KilledCommand:
    """The command on a corpus of `rows` rows, which tests kill and start again."""

    def __init__(self, root: Path, rows: int) -> None:
        self.home = root / "outputs"
        save_tiny("bart", root / "teacher", dropout=0.0)
        lines = "".join(json.dumps(row) + "\n" for row in corpus_rows(rows))
        (root / "train.jsonl").write_text(lines)
        self.job = LabelJob(
            str(root / "teacher"),
            Dataset(name=str(root / "train.jsonl")),
            decoding=Decoding(beams=2),
            engine="transformers",
            pseudo=PseudoLabeling(n_best=2),
            batch_chars=3000,
        )
        self.arguments = ["--teacher", root / "teacher", "--dataset", root / "train.jsonl", "--beams", "2"]
        self.arguments += ["--engine", "transformers", "--batch-chars", "3000", "--n-best", "2"]
        self.finished_batches: dict[Path, int] = {}

    def start(self, program: Sequence[str] = ("-m", "raydistill.pseudolabel")) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, *program, *map(str, self.arguments)],
            env=environment(),
            cwd=self.home.parent,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def outputs(self) -> dict[Path, int]:
        paths = self.home.glob("labels/.*.work/out/batch-*.parquet")
        return {path: path.stat().st_mtime_ns for path in paths}

    def check_untouched(self) -> None:
        """Assert that no finished batch was written again."""
        now = self.outputs()
        if now:  # otherwise the job has just finished and removed its outputs
            assert {path: now.get(path) for path in self.finished_batches} == self.finished_batches
        self.finished_batches = now or self.finished_batches

    def finished(self) -> bool:
        return any(self.home.glob("labels/*/manifest.json"))

    def labels(self) -> list[dict]:
        [folder] = [path.parent for path in self.home.glob("labels/*/manifest.json")]
        return read_lines(folder)


def kill_driver(job: KilledCommand, running: subprocess.Popen) -> subprocess.Popen:
    os.kill(running.pid, signal.SIGKILL)
    running.communicate()
    wait_for_ray_to_end(job.home)
    job.check_untouched()
    return job.start()


def kill_worker(job: KilledCommand, draw: random.Random) -> bool:
    """Kill one of Ray's worker processes, usually an actor that labels. Returns whether there was one."""
    workers = []
    for process in processes_of(job.home):
        line = " ".join(process.cmdline())
        if line.startswith("ray::") and "Dashboard" not in line:
            workers.append(process)
    if not workers:
        return False
    draw.choice(workers).kill()
    return True


def kill_and_resume(tmp_path: Path, rows: int, kills: int, seed: int) -> dict[str, int]:
    """Kill the job at random moments, let it finish, and compare with an uninterrupted job. Returns the counts."""
    draw = random.Random(seed)
    job = KilledCommand(tmp_path / "killed", rows)
    counts = {"driver": 0, "worker": 0, "with_parts": 0}
    running = job.start()
    while counts["driver"] + counts["worker"] < kills:
        before = len(job.outputs())
        deadline = time.monotonic() + 90
        early = draw.random() < 0.2  # before the plan or the first batch, too
        while not early and len(job.outputs()) <= before and time.monotonic() < deadline:
            assert running.poll() is None, running.stderr and running.stderr.read().decode()[-2000:]
            time.sleep(0.05)
        time.sleep(draw.uniform(0, 6 if early else 1.5))
        assert not job.finished(), "the job finished before all kills; use more rows"
        parts = bool(job.outputs())
        if draw.random() < 0.4:
            running = kill_driver(job, running)
            counts["driver"] += 1
        elif kill_worker(job, draw):
            counts["worker"] += 1
        else:
            continue
        counts["with_parts"] += parts
    _, errors = running.communicate(timeout=560)
    assert running.returncode == 0, errors.decode()[-2000:]
    whole = KilledCommand(tmp_path / "whole", rows)
    last_json(command(whole.home, "pseudolabel", *whole.arguments, "--json"))
    check_labels(job.labels(), whole.labels(), rows)
    return {**counts, "rows": rows, "lines": len(job.labels())}


def check_labels(lines: list[dict], expected: list[dict], rows: int) -> None:
    """Assert that the labels of a job that was killed are those of an uninterrupted job."""
    keys = [(row["id"], row["rank"]) for row in lines]
    assert len(set(keys)) == len(keys) == 2 * rows
    assert keys == [(row["id"], row["rank"]) for row in expected]
    assert [row["target"] for row in lines] == [row["target"] for row in expected]
    assert [row["score"] for row in lines] == pytest.approx([row["score"] for row in expected], abs=1e-5)


# The third batch waits in an actor until the driver is killed.
LABEL_TWO_BATCHES_AND_WAIT = """
import os, time
from functools import partial
from pathlib import Path
from raydistill.jobs import pseudolabel
from raydistill.pseudolabel import main

def open_engine_for_two_batches(*arguments, **options):
    from raydistill.inference.engines import open_engine

    engine = open_engine(*arguments, **options)
    generate = engine.generate

    def generate_or_wait(*arguments, **options):
        for name in ("first", "second"):
            try:
                (Path(os.environ["RAYDISTILL_HOME"]) / name).mkdir()
                return generate(*arguments, **options)
            except FileExistsError:
                pass
        time.sleep(3600)

    engine.generate = generate_or_wait
    return engine

pseudolabel.pseudolabel = partial(pseudolabel.pseudolabel, engine_factory=open_engine_for_two_batches)
main()
"""


def test_a_job_whose_driver_was_killed_labels_every_row_once(home, tmp_path):
    """The driver is killed while an actor labels the last of three batches. The same command labels only this batch."""
    job = KilledCommand(tmp_path / "killed", KILLED_ROWS)
    running = job.start(("-c", LABEL_TWO_BATCHES_AND_WAIT))
    while len(job.outputs()) < 2:
        assert running.poll() is None, running.stderr and running.stderr.read().decode()[-2000:]
        time.sleep(0.1)
    running = kill_driver(job, running)
    assert len(job.finished_batches) == 2
    _, errors = running.communicate(timeout=560)
    assert running.returncode == 0, errors.decode()[-2000:]
    assert "resuming, 2 of 3 batches finished" in errors.decode()
    with local_jobs(home):
        whole = pseudolabel(job.job, tmp_path / "whole", verbose=False)
    check_labels(job.labels(), read_lines(whole), KILLED_ROWS)


def open_engine_of_a_killed_worker(marker: Path, *arguments: Any, **options: Any) -> Engine:
    """Open an engine that kills its process at the first batch, if no process was killed before."""
    engine = open_engine(*arguments, **options)
    generate = engine.generate

    def kill_or_generate(*arguments: Any, **options: Any) -> list[list[Hypothesis]]:
        with contextlib.suppress(FileExistsError):
            marker.touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)
        return generate(*arguments, **options)

    engine.generate = kill_or_generate  # type: ignore[method-assign]
    return engine


def test_the_batch_of_a_killed_worker_is_labelled_by_its_successor(ray_here, teacher_and_data, label_set, tmp_path):
    marker = tmp_path / "killed"
    factory = partial(open_engine_of_a_killed_worker, marker)
    folder = pseudolabel(make_job(teacher_and_data), tmp_path / "labels", verbose=False, engine_factory=factory)
    assert marker.exists()
    assert list(read_candidates(folder)) == list(read_candidates(label_set))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_job_killed_thirty_times_gives_the_result_of_an_uninterrupted_job(tmp_path):
    counts = kill_and_resume(tmp_path, rows=6000, kills=32, seed=0)
    print(counts)
    assert counts["driver"] + counts["worker"] >= 30
    assert counts["with_parts"] >= 10
    assert min(counts["driver"], counts["worker"]) >= 5
