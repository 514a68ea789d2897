"""The console script: mistyped commands, and completion by the shell."""

import os
import subprocess
import sys

import pytest


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "raydistill", *arguments]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)


def test_a_mistyped_command_is_corrected():
    done = run("evalute")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no such command: 'evalute'; did you mean `raydistill evaluate`?\n"


def test_an_unknown_command_lists_all():
    done = run("xyz")
    assert done.returncode == 2
    assert "  sweep " in done.stderr


@pytest.mark.parametrize(
    ("words", "number", "completions"),
    [
        ("raydistill sta", 1, ["status"]),
        ("raydistill labels c", 2, ["compare", "curate"]),
        ("raydistill status --w", 2, ["--watch"]),
    ],
)
def test_the_shell_completes_commands_and_options(words, number, completions):
    done = run(_RAYDISTILL_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(number))
    assert done.stdout.split() == completions


def test_the_completion_script_is_printed():
    done = run("--show-completion", "bash")
    assert done.returncode == 0
    assert "_RAYDISTILL_COMPLETE=complete_bash" in done.stdout
