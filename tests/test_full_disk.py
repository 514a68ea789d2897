"""A disk that is full: what was at work stops with a clear message, loses nothing, and goes on by the same command."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from raydistill.label_sets.label_set import read_label_set
from tests.world import command, corpus_rows, environment, make_world

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="a small disk is a mount, which only root can make"),
]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A folder `outputs` on a disk of its own, of 200 MB."""
    place = tmp_path / "outputs"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(home: Path) -> Path:
    """A file that takes all that is free."""
    filler = home / "filler"
    with filler.open("wb") as file:
        try:
            while True:
                file.write(b"\0" * 65536)
                file.flush()
        except OSError:
            pass
    return filler


def start(home: Path, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", f"raydistill.{arguments[0]}", *map(str, arguments[1:])],
        env=environment(),
        cwd=home.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(home: Path, pattern: str, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while len(list(home.glob(pattern))) < count:
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def strike(home: Path, process: subprocess.Popen[str]) -> None:
    """Fill the disk under a command; it ends by itself and says why, and the disk has room again."""
    filler = fill(home)
    said, _ = process.communicate(timeout=300)
    filler.unlink()
    assert process.returncode in (1, 2), said[-3000:]
    assert "No space left" in said or "disk" in said, said[-3000:]
    assert "Traceback" not in said


def finishes(home: Path, *arguments: object) -> str:
    done = command(home, *arguments, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def test_a_label_job_on_a_full_disk(home: Path, tmp_path: Path) -> None:
    teacher, _ = make_world(tmp_path / "world")
    source = tmp_path / "many.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in corpus_rows(2000, seed=7)))
    label = ("pseudolabel", "--teacher", teacher, "--dataset", source, "--batch-chars", "600")
    process = start(home, *label)
    wait_for(home, "labels/.many-*.work/out/*.parquet", 40, process)
    assert not list(home.glob("labels/many-*/manifest.json")), "the job was over before it could be struck"
    strike(home, process)
    done = {path: path.stat().st_mtime_ns for path in home.glob("labels/.many-*.work/out/*.parquet")}
    assert len(done) >= 40
    assert f"{len(done)} of" in finishes(home, *label)
    [folder] = home.glob("labels/many-*")
    assert len(read_label_set(folder).targets) == 2000


def test_a_sweep_on_a_full_disk(home: Path, tmp_path: Path) -> None:
    teacher, data = make_world(tmp_path / "world")
    run = {
        "teacher": str(teacher),
        "dataset": {"name": str(data), "max_source_tokens": 32, "max_target_tokens": 16},
        "method": {"choice": ["sft", "kd"]},
        "student": {"size": {"choice": ["2-2", "2-1"]}},
        "training": {"epochs": 30, "batch_size": 8, "warmup_steps": 2, "patience": 99, "seed": {"choice": [0, 1]}},
        "decoding": {"beams": 1, "max_length": 12},
    }
    path = tmp_path / "full.yaml"
    search = {"trials": 8, "sampler": "grid", "decoding": {"beams": [1]}}
    path.write_text(yaml.safe_dump({"name": "full", "run": run, "search": search}))
    process = start(home, "sweep", path)
    wait_for(home, "sweeps/full/trials/*/result.json", 2, process)
    strike(home, process)
    before = {found: found.read_bytes() for found in home.glob("sweeps/full/trials/*/result.json")}
    assert 2 <= len(before) < 8
    finishes(home, "sweep", path)
    results = {found: found.read_bytes() for found in home.glob("sweeps/full/trials/*/result.json")}
    assert [json.loads(result)["status"] for result in results.values()] == ["done"] * 8
    assert before.items() <= results.items(), "a finished trial was done again"
