"""The command `raydistill init`."""

import json
import subprocess
import sys

import pytest

from raydistill.config.space import read_space
from tests.factories.workspace import invoke, write_corpus


def run(folder, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "raydistill.init", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=folder, stdin=subprocess.DEVNULL, timeout=500
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: name the data set"),
        (["data"], "error: name the teacher: a folder, a hub name or a named teacher (--teacher, or --start"),
        (["data", "--start", "--teacher", "bart"], "error: give either --teacher or --start"),
        (["data", "--teacher", "brat"], "did you mean 'bart'?"),
        (["data", "--start", "--metric", "meteor"], "error: unknown metric 'meteor'; known metrics: rouge1"),
        (["data", "--start", "--name", "a b"], "error: name 'a b': letters, digits"),
    ],
)
def test_missing_and_wrong_arguments_are_reported(tmp_path, arguments, message):
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_files_are_written_once_and_the_next_commands_are_named(tmp_path):
    write_corpus(tmp_path / "my data")
    done = run(tmp_path, "my data", "--start", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["space"], result["teacher_run"]) == ("my-data.yaml", "my-data-teacher.yaml")
    assert result["metric"] == "rouge2"
    assert "raydistill train my-data-teacher.yaml; raydistill sweep my-data.yaml --dry-run" in done.stderr
    assert read_space(tmp_path / "my-data.yaml").run["teacher"] == result["teacher"]
    again = invoke(tmp_path / "outputs", "init", "my data", "--start")
    assert again.returncode == 2
    assert "my-data.yaml, my-data-teacher.yaml: exists; replace with --force" in again.stderr
