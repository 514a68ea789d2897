"""The repository keeps its promises: README against --help, Makefile, spaces, pins."""

import functools
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from raydistill.__main__ import COMMANDS
from raydistill.config.schema import json_schema
from raydistill.config.space import read_space

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SPACES = sorted((ROOT / "search_spaces").glob("*.yaml"))
SHELL = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
CODE = (
    "\n".join(SHELL) + "\n" + "\n".join(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL)))
)
LINES = re.findall(r"^(?:raydistill |python -m raydistill\.)([a-z]+\b[^#\n]*)", CODE, re.MULTILINE)


@functools.lru_cache
def _help(command: str) -> str:
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-m", f"raydistill.{command}", "--help"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=True,
        cwd=ROOT,
    )
    return done.stdout


def _name(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


def test_the_readme_shows_every_command() -> None:
    assert {line.split()[0] for line in LINES} == set(COMMANDS)


@pytest.mark.parametrize("line", [line for line in LINES if "--" in line])
def test_a_documented_option_exists(line: str) -> None:
    command = line.split()[0]
    for option in re.findall(r"(--[a-z][a-z-]*)", line):
        assert re.search(rf"{option}(?![a-z-])", _help(command)), f"raydistill {command} has no {option}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    text = _help(command)
    assert "xample" in text or f"raydistill {command} " in text
    assert "--json" in text


def test_the_readme_links_to_what_is_there() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    absent = [link for link in links if not (ROOT / link).exists()]
    assert absent == []


def test_the_readmes_space_is_one(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    spaces = [block for block in blocks if block.startswith("name:")]
    assert len(spaces) == 1
    (tmp_path / "space.yaml").write_text(spaces[0], encoding="utf-8")
    space = read_space(tmp_path / "space.yaml")
    assert set(space.budgets) == {"fast", "half"}


def test_the_makefile_has_what_is_promised() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"help", "install", "quickstart", "test", "slow", "audit", "ui", "schema", "clean"} <= targets
    documents = [README, *(path.read_text(encoding="utf-8") for path in ROOT.glob("*.md"))]
    named = {name for text in documents for name in re.findall(r"`make ([a-z]+)`", text)}
    assert named <= targets
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "make test" in run
    assert "make audit" in run
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_schema_for_editors_is_up_to_date() -> None:
    written = json.loads((ROOT / "search_spaces" / "schema.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(json_schema())), "run `make schema`"


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.name)
def test_every_space_loads(path: Path) -> None:
    assert read_space(path).run


def test_every_direct_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + [d for extra in project["optional-dependencies"].values() for d in extra]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "plain pins: no addresses, no local versions"
    pinned = {_name(line.split("==")[0]) for line in lines}
    named = {_name(re.split(r"[\[<>=~! ]", requirement)[0]) for requirement in wanted}
    assert named - pinned == set()
