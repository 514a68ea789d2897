"""A full disk: commands stop with a clear message, lose nothing, and resume by the same command."""

import contextlib
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
from tests.factories.workspace import command, corpus_rows, environment, make_world

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="a small disk is a mount, which only root can make"),
]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A folder `outputs` on its own disk of 200 MB."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_disk(home: Path) -> Path:
    """Write a file that takes all free space."""
    filler = home / "filler"
    # Without a buffer, whose last bytes `close` would write, and fail.
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 65536)
    return filler


def start_command(home: Path, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", f"raydistill.{arguments[0]}", *map(str, arguments[1:])],
        env=environment(),
        cwd=home.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_files(home: Path, pattern: str, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while len(list(home.glob(pattern))) < count:
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_stops_on_full_disk(home: Path, process: subprocess.Popen[str]) -> None:
    """Fill the disk of a running command, check that the command exits and names the cause, then free the disk."""
    filler = fill_disk(home)
    output, _ = process.communicate(timeout=300)
    filler.unlink()
    assert process.returncode in (1, 2), output[-3000:]
    assert "No space left" in output or "disk" in output, output[-3000:]
    assert "Traceback" not in output


def run_to_end(home: Path, *arguments: object) -> str:
    """Run a command that must succeed, and return its messages."""
    done = command(home, *arguments, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def test_label_job_resumes_after_a_full_disk(home: Path, tmp_path: Path) -> None:
    teacher, _ = make_world(tmp_path / "world")
    source = tmp_path / "many.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in corpus_rows(2000, seed=7)))
    label = ("pseudolabel", "--teacher", teacher, "--dataset", source, "--batch-chars", "600", "--allow-repetitive")
    process = start_command(home, *label)
    wait_for_files(home, "labels/.many-*.work/out/*.parquet", 40, process)
    assert not list(home.glob("labels/many-*/manifest.json")), "the job finished before the disk was filled"
    assert_stops_on_full_disk(home, process)
    finished = list(home.glob("labels/.many-*.work/out/*.parquet"))
    assert len(finished) >= 40
    assert f"{len(finished)} of" in run_to_end(home, *label)
    [folder] = home.glob("labels/many-*")
    assert len(read_label_set(folder).targets) == 2000


def test_sweep_resumes_after_a_full_disk(home: Path, tmp_path: Path) -> None:
    teacher, data = make_world(tmp_path / "world")
    run = {
        "teacher": str(teacher),
        "dataset": {"name": str(data), "max_source_tokens": 32, "max_target_tokens": 16, "selection_share": 0},
        "method": {"choice": ["sft", "kd"]},
        "student": {"size": {"choice": ["2-2", "2-1"]}},
        "training": {"epochs": 30, "batch_size": 8, "warmup_steps": 2, "patience": 99, "seed": {"choice": [0, 1]}},
        "decoding": {"beams": 1, "max_length": 12},
        "evaluation": {"allow_repetitive_teacher": True},
    }
    path = tmp_path / "full.yaml"
    search = {"trials": 8, "sampler": "grid"}
    serving = {"beams": [1], "precision": ["fp32"]}
    path.write_text(yaml.safe_dump({"name": "full", "run": run, "search": search, "serving": serving}))
    process = start_command(home, "sweep", path)
    wait_for_files(home, "sweeps/full/trials/*/result.json", 2, process)
    assert_stops_on_full_disk(home, process)
    before = {file: file.read_bytes() for file in home.glob("sweeps/full/trials/*/result.json")}
    assert 2 <= len(before) < 8
    run_to_end(home, "sweep", path)
    results = {file: file.read_bytes() for file in home.glob("sweeps/full/trials/*/result.json")}
    assert [json.loads(result)["status"] for result in results.values()] == ["done"] * 8
    assert before.items() <= results.items(), "a finished trial was repeated"
