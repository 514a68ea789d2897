"""The pseudo-label job on real Ray: what it writes, how it goes on after a death, what it refuses."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from raydistill.cluster.actor_pool import run_batches
from raydistill.config.run import Curation, Dataset, Decoding, PseudoLabeling
from raydistill.core.errors import UserError
from raydistill.data.streaming import scan_split
from raydistill.inference.decoding import resolve_decoding
from raydistill.inference.engines import open_engine
from raydistill.jobs.label_outputs import is_batch_complete
from raydistill.jobs.pseudolabel import LabelJob, Labeller, _check_same_engine, _slug, describe_job, pseudolabel
from raydistill.label_sets.batch_plan import BatchPlan
from raydistill.label_sets.label_set import read_candidates, read_manifest
from tests.factories.models import save_tiny
from tests.factories.workspace import command, corpus_rows, environment, last_json, processes_of, wait_for_ray_to_end

DECODING = Decoding(beams=2, max_length=12)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A teacher and a data set in two shards."""
    root = tmp_path_factory.mktemp("world")
    save_tiny("bart", root / "teacher", dropout=0.0)
    (root / "data").mkdir()
    rows = corpus_rows(60)
    for n, part in enumerate((rows[:35], rows[35:])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (root / "data" / f"train-0000{n}-of-00002.jsonl").write_text(lines)
    return root, rows


def job_of(world, **changes):
    root, _ = world
    return LabelJob(
        str(root / "teacher"), Dataset(name=str(root / "data")), decoding=DECODING, batch_chars=800, **changes
    )


def test_every_row_of_every_shard_has_what_the_engine_writes_for_it(ray_here, world, tmp_path):
    root, rows = world
    folder = pseudolabel(job_of(world, pseudo=PseudoLabeling(n_best=2)), tmp_path, verbose=False)
    found = dict(read_candidates(folder))
    assert list(found) == [row["id"] for row in rows]
    engine = open_engine(root / "teacher", cache_dir=tmp_path / "c")
    beam = resolve_decoding(DECODING, engine.generation_config, None, 64)
    wanted = engine.generate([row["source"] for row in rows], beam, max_source_tokens=64, n_best=2)
    for candidates, hypotheses in zip(found.values(), wanted, strict=True):
        assert [c.target for c in candidates] == [h.text.strip() for h in hypotheses]
        assert [c.score for c in candidates] == pytest.approx([h.score for h in hypotheses], abs=1e-4)
    manifest = read_manifest(folder)
    assert (manifest["rows"], manifest["engine"], manifest["n_best"]) == (60, "ctranslate2 fp32", 2)
    assert manifest["device_hours"] > 0
    lines = [row for part in sorted(folder.glob("part-*")) for row in pq.read_table(part).to_pylist()]
    assert len({(line["id"], line["rank"]) for line in lines}) == len(lines) == 120
    assert not list(tmp_path.glob(".*.work"))


def test_the_same_job_is_found_and_another_decoding_precision_or_rule_is_another_set(ray_here, world, tmp_path):
    plain = pseudolabel(job_of(world), tmp_path, verbose=False)
    before = {p: p.stat().st_mtime_ns for p in plain.iterdir()}
    assert pseudolabel(job_of(world), tmp_path, verbose=False) == plain
    assert {p: p.stat().st_mtime_ns for p in plain.iterdir()} == before
    eight = pseudolabel(job_of(world, pseudo=PseudoLabeling(precision="int8")), tmp_path, verbose=False)
    assert read_manifest(eight)["engine"] == "ctranslate2 int8"
    curated = pseudolabel(
        job_of(world, pseudo=PseudoLabeling(curation=Curation(max_copy_rate=0.9))), tmp_path, verbose=False
    )
    assert len({plain, eight, curated}) == 3
    assert read_manifest(curated)["of"] == plain.name


def test_a_teacher_with_other_settings_makes_another_set_and_none_changes_during_a_job(ray_here, world, tmp_path):
    root, _ = world
    teacher = tmp_path / "teacher"
    shutil.copytree(root / "teacher", teacher)
    job = LabelJob(str(teacher), Dataset(name=str(root / "data"), train_rows=4), decoding=DECODING)
    first = pseudolabel(job, tmp_path / "labels", verbose=False)
    about = describe_job(job, scan_split(job.dataset, "train"))
    settings = json.loads((teacher / "generation_config.json").read_text())
    (teacher / "generation_config.json").write_text(json.dumps(settings | {"repetition_penalty": 1.5}))
    assert pseudolabel(job, tmp_path / "labels", verbose=False) != first
    with pytest.raises(UserError, match="has changed since the job began"):
        Labeller(job, about, BatchPlan(tmp_path, [], [], []), tmp_path, "cpu")


def test_a_label_set_is_called_as_its_data_are():
    """As the README's `labels describe my-texts-train` finds it."""
    names = {"data/my_texts.jsonl.gz": "my-texts", "x/train.source": "train", "EdinburghNLP/xsum": "xsum", "a.b": "a-b"}
    assert {name: _slug(name) for name in names} == names


def test_a_disk_that_does_not_answer_deletes_no_batch(tmp_path, monkeypatch):
    """A torn file is deleted and made again; of one that cannot be read just now nothing is known."""
    path = tmp_path / "batch.parquet"
    path.write_bytes(b"PAR1 torn")
    monkeypatch.setattr("pyarrow.parquet.read_metadata", lambda _: (_ for _ in ()).throw(OSError(5, "I/O error")))
    with pytest.raises(OSError, match="I/O error"):
        is_batch_complete(path)
    assert path.is_file()
    monkeypatch.undo()
    assert not is_batch_complete(path)
    assert not path.exists()


def test_a_batch_that_a_lost_machine_left_damaged_is_done_again(ray_here, world, tmp_path, monkeypatch):
    whole = pseudolabel(job_of(world), tmp_path / "whole", verbose=False)
    wanted = list(read_candidates(whole))

    def killed(*rest):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("raydistill.jobs.pseudolabel.compact", killed)
        with pytest.raises(KeyboardInterrupt):
            pseudolabel(job_of(world), tmp_path / "hurt", verbose=False)
    outputs = sorted((tmp_path / "hurt").glob(".*.work/out/*.parquet"))
    outputs[1].write_bytes(outputs[1].read_bytes()[:-20])
    outputs[2].write_bytes(b"")
    assert list(read_candidates(pseudolabel(job_of(world), tmp_path / "hurt", verbose=False))) == wanted


def test_more_threads_than_a_machine_has_are_refused(ray_here, world, tmp_path):
    with pytest.raises(UserError, match="no machine of the cluster has 3 CPUs for a teacher"):
        pseudolabel(job_of(world, threads=3), tmp_path, verbose=False)


def test_a_model_that_ctranslate2_gets_wrong_is_labelled_by_transformers_or_refused(ray_here, world, tmp_path):
    root, _ = world
    teacher = save_tiny("marian", tmp_path / "marian", marian_padding_row=0.5)
    job = LabelJob(str(teacher), Dataset(name=str(root / "data"), train_rows=4), decoding=DECODING)
    manifest = read_manifest(pseudolabel(job, tmp_path / "labels", verbose=False))
    assert manifest["engine"] == "transformers fp32"
    assert "padding row is not zero" in manifest["engine_why"]
    strict = LabelJob(str(teacher), job.dataset, decoding=Decoding(beams=3, max_length=12), allow_fallback=False)
    with pytest.raises(UserError, match="padding row is not zero"):
        pseudolabel(strict, tmp_path / "labels", verbose=False)


def test_a_batch_that_fails_ends_the_job_with_its_error(ray_here):
    def make():
        def work(number):
            if number == 2:
                raise UserError("the disk is full")
            return {"rows": 1.0}

        return work

    done = []
    with pytest.raises(UserError, match="the disk is full"):
        run_batches(range(4), make, device="cpu", on_done=done.append)


def test_a_teacher_that_cannot_be_opened_ends_the_job_with_the_cause(ray_here):
    def make():
        raise RuntimeError("CUDA error: the real cause")

    with pytest.raises(Exception, match="CUDA error: the real cause"):
        run_batches(range(2), make, device="cpu", on_done=lambda facts: None)


def test_a_batch_that_kills_its_actor_each_time_ends_the_job_with_advice(ray_here):
    def make():
        def work(number):
            if number == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return {"rows": 1.0}

        return work

    with pytest.raises(ConnectionError, match=r"lost and could not be restarted .* Run the same command again"):
        run_batches(range(2), make, device="cpu", on_done=lambda facts: None)


def test_texts_of_two_engines_are_not_mixed(tmp_path):
    _check_same_engine(tmp_path, "ctranslate2 fp32", [])
    _check_same_engine(tmp_path, "ctranslate2 fp32", [])
    with pytest.raises(UserError, match="written by ctranslate2 fp32, and this machine opens transformers fp32"):
        _check_same_engine(tmp_path, "transformers fp32", ["no ctranslate2"])
    assert json.loads((tmp_path / "engine.json").read_text())["why"] == ""


# Deaths


class Killed:
    """The command on a corpus of `rows` rows, killed again and again."""

    def __init__(self, root: Path, rows: int) -> None:
        self.home = root / "outputs"
        save_tiny("bart", root / "teacher", dropout=0.0)
        lines = "".join(json.dumps(row) + "\n" for row in corpus_rows(rows))
        (root / "train.jsonl").write_text(lines)
        self.arguments = ["--teacher", root / "teacher", "--dataset", root / "train.jsonl", "--beams", "2"]
        self.arguments += ["--engine", "transformers", "--batch-chars", "3000", "--n-best", "2"]
        self.seen: dict[Path, int] = {}

    def start(self) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "raydistill.pseudolabel", *map(str, self.arguments)],
            env=environment(),
            cwd=self.home.parent,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def outputs(self) -> dict[Path, int]:
        found = {}
        for path in self.home.glob("labels/.*.work/out/batch-*.parquet"):
            found[path] = path.stat().st_mtime_ns
        return found

    def check_untouched(self) -> None:
        """No batch that was finished before has been written again."""
        now = self.outputs()
        if now:  # else the job has just finished and removed them
            assert {path: now.get(path) for path in self.seen} == self.seen
        self.seen = now or self.seen

    def finished(self) -> bool:
        return any(self.home.glob("labels/*/manifest.json"))

    def labels(self) -> list[dict]:
        [folder] = [path.parent for path in self.home.glob("labels/*/manifest.json")]
        return [row for part in sorted(folder.glob("part-*")) for row in pq.read_table(part).to_pylist()]


def kill_driver(world: Killed, running: subprocess.Popen) -> subprocess.Popen:
    os.kill(running.pid, signal.SIGKILL)
    running.communicate()
    wait_for_ray_to_end(world.home)
    world.check_untouched()
    return world.start()


def kill_worker(world: Killed, draw: random.Random) -> bool:
    """One of Ray's worker processes, most often an actor that labels."""
    workers = []
    for process in processes_of(world.home):
        line = " ".join(process.cmdline())
        if line.startswith("ray::") and "Dashboard" not in line:
            workers.append(process)
    if not workers:
        return False
    draw.choice(workers).kill()
    return True


def carry_on(tmp_path: Path, rows: int, kills: int, seed: int) -> dict[str, int]:
    """Kill at random moments, then let it end, and compare with an uninterrupted run; returns the counts."""
    draw = random.Random(seed)
    world = Killed(tmp_path / "killed", rows)
    counts = {"driver": 0, "worker": 0, "with_parts": 0}
    running = world.start()
    while counts["driver"] + counts["worker"] < kills:
        before = len(world.outputs())
        deadline = time.monotonic() + 90
        early = draw.random() < 0.2  # before the plan or the first batch, too
        while not early and len(world.outputs()) <= before and time.monotonic() < deadline:
            assert running.poll() is None, running.stderr and running.stderr.read().decode()[-2000:]
            time.sleep(0.05)
        time.sleep(draw.uniform(0, 6 if early else 1.5))
        assert not world.finished(), "the job ended before it was killed often enough: give it more rows"
        parts = bool(world.outputs())
        if draw.random() < 0.4:
            running = kill_driver(world, running)
            counts["driver"] += 1
        elif kill_worker(world, draw):
            counts["worker"] += 1
        else:
            continue
        counts["with_parts"] += parts
    _, errors = running.communicate(timeout=280)
    assert running.returncode == 0, errors.decode()[-2000:]
    found = world.labels()
    whole = Killed(tmp_path / "whole", rows)
    last_json(command(whole.home, "pseudolabel", *whole.arguments, "--json"))
    wanted = whole.labels()
    keys = [(row["id"], row["rank"]) for row in found]
    assert len(set(keys)) == len(keys) == 2 * rows
    assert keys == [(row["id"], row["rank"]) for row in wanted]
    assert [row["target"] for row in found] == [row["target"] for row in wanted]
    assert [row["score"] for row in found] == pytest.approx([row["score"] for row in wanted], abs=1e-5)
    return {**counts, "rows": rows, "lines": len(found)}


def test_a_killed_job_goes_on_and_every_row_is_there_once(tmp_path):
    counts = carry_on(tmp_path, rows=1500, kills=2, seed=5)
    assert counts["driver"] + counts["worker"] == 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_job_that_is_killed_thirty_times_ends_as_if_nothing_had_been(tmp_path):
    counts = carry_on(tmp_path, rows=6000, kills=32, seed=0)
    print(counts)
    assert counts["driver"] + counts["worker"] >= 30
    assert counts["with_parts"] >= 10
    assert min(counts["driver"], counts["worker"]) >= 5
