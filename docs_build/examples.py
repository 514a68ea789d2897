"""Checks of the examples in documents: YAML files are valid, and commands have the options in the examples."""

import importlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from raydistill.__main__ import COMMANDS
from raydistill.config.loader import read_yaml
from raydistill.config.run import Run
from raydistill.config.space import read_space
from raydistill.config.validation import validate
from raydistill.core.errors import UserError

YAML = re.compile(r"^```yaml\n(name:.*?)^```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"\b(?:raydistill |python -m raydistill\.)([a-z]+)\b([^`\n#|]*)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


def example_problems(paths: list[Path], root: Path) -> list[str]:
    """The problems of the examples in `paths`, one message each."""
    options = {name: options_of(name) for name in COMMANDS}
    messages = []
    for path in paths:
        name, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        messages += [f"{name}: an example does not load: {reason}" for reason in _yaml(text)]
        messages += [f"{name}: {reason}" for reason in _commands(text, options)]
    return messages


def options_of(name: str) -> set[str]:
    """The options of a command and its subcommands, with dashes."""
    command: Any = typer.main.get_command(importlib.import_module(f"raydistill.{name}").app)
    members = [command, *getattr(command, "commands", {}).values()]
    return {
        option
        for member in members
        for parameter in member.params
        for option in [*parameter.opts, *parameter.secondary_opts, "--help"]
    }


def _yaml(text: str) -> Iterator[str]:
    for block in YAML.findall(text):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "example.yaml"
            path.write_text(block, encoding="utf-8")
            try:
                if "\nrun:" in block:
                    read_space(path)
                else:
                    data, lines = read_yaml(path)
                    validate(Run, data, path, lines)
            except UserError as error:
                yield str(error)


def _commands(text: str, options: dict[str, set[str]]) -> Iterator[str]:
    for name, rest in COMMAND.findall(text.replace("\\\n", " ")):
        for option in OPTION.findall(rest) if name in options else ():
            if option not in options[name]:
                yield f"raydistill {name} has no option {option}"
