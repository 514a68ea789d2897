"""Consistency of the repository: README and --help, documents, Makefile, search spaces and pinned versions."""

import functools
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from docs_build import checks
from docs_build.settings import settings_page
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
def help_text(command: str) -> str:
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-m", f"raydistill.{command}", "--help"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=500,
        check=True,
        cwd=ROOT,
    )
    return done.stdout


def normalize_package_name(text: str) -> str:
    """The normalised name of PEP 503."""
    return re.sub(r"[-_.]+", "-", text).lower()


def test_readme_names_every_command() -> None:
    assert {line.split()[0] for line in LINES} == set(COMMANDS)


@pytest.mark.parametrize("line", [line for line in LINES if "--" in line])
def test_options_in_the_readme_exist(line: str) -> None:
    command = line.split()[0]
    for option in re.findall(r"(--[a-z][a-z-]*)", line):
        assert re.search(rf"{option}(?![a-z-])", help_text(command)), f"raydistill {command} has no {option}"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_an_example(command: str) -> None:
    text = help_text(command)
    assert "xample" in text or f"raydistill {command} " in text
    assert "--json" in text


def test_links_in_the_readme_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    missing = [link for link in links if not (ROOT / link).exists()]
    assert missing == []


def test_space_in_the_readme_is_valid(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    spaces = [block for block in blocks if block.startswith("name:")]
    assert len(spaces) == 1
    (tmp_path / "space.yaml").write_text(spaces[0], encoding="utf-8")
    space = read_space(tmp_path / "space.yaml")
    assert set(space.budgets) == {"fast", "half"}


def test_long_tests_of_the_default_run_exist() -> None:
    tests = ROOT / "tests"
    names = re.findall(r'^    "(test_\w+)": ', (tests / "conftest.py").read_text(encoding="utf-8"), re.MULTILINE)
    files = (path.read_text(encoding="utf-8") for path in tests.rglob("test_*.py"))
    defined = {name for text in files for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}
    assert len(names) > 20
    assert set(names) <= defined


def test_documents_have_no_problems() -> None:
    assert checks.problems(ROOT) == []


def test_every_setting_has_a_description() -> None:
    assert "| `training.learning_rate`\\* | number > 0 | `0.0003` | peak learning rate |" in settings_page()


def test_makefile_has_the_documented_targets() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"help", "install", "quickstart", "test", "slow", "docs", "audit", "ui", "schema", "clean"} <= targets
    documents = [README, *(path.read_text(encoding="utf-8") for path in ROOT.glob("*.md"))]
    documented = {name for text in documents for name in re.findall(r"`make ([a-z]+)`", text)}
    assert documented <= targets
    ci_script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "make test" in ci_script
    assert "make audit" in ci_script
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_schema_for_editors_is_current() -> None:
    schema = json.loads((ROOT / "search_spaces" / "schema.json").read_text(encoding="utf-8"))
    assert schema == json.loads(json.dumps(json_schema())), "run `make schema`"


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.name)
def test_search_spaces_are_valid(path: Path) -> None:
    assert read_space(path).run


def test_every_direct_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = project["dependencies"] + [d for extra in project["optional-dependencies"].values() for d in extra]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "plain pins: no URLs, no local versions"
    pinned = {normalize_package_name(line.split("==")[0]) for line in lines}
    direct = {normalize_package_name(re.split(r"[\[<>=~! ]", requirement)[0]) for requirement in requirements}
    assert direct - pinned == set()
