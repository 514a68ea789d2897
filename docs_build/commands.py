"""The command reference, generated from the typer applications of the commands."""

import importlib
import inspect
import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from docs_build.markdown import cell, code, table
from raydistill.__main__ import COMMANDS

INTRODUCTION = """\
# Command reference

`make docs` generates this page from the command line itself.

Each command is `raydistill NAME` or `python -m raydistill.NAME`. `--help` prints the text below.
Progress goes to stderr and the result to stdout. With `--json`, stdout holds exactly one JSON object.

| exit status | meaning |
| --- | --- |
| 0 | the command finished |
| 1 | the command ran, and its result is incomplete or the system refused something, such as a full disk |
| 2 | the input must be corrected; the message says what is wrong, where, and what to do |
| 130 | interrupted by Ctrl-C; the same command resumes |
"""


def commands_page() -> str:
    """The page in Markdown."""
    parts = [INTRODUCTION]
    rows = [[f"[`{name}`](#raydistill-{name})", cell(purpose)] for name, purpose in COMMANDS.items()]
    parts += [table(["command", "purpose"], rows), ""]
    for name in COMMANDS:
        command: Any = typer.main.get_command(importlib.import_module(f"raydistill.{name}").app)
        parts += _command(f"raydistill {name}", command, 2)
    return "\n".join(parts)


def _command(path: str, command: Any, level: int) -> list[str]:
    heading, prose = [f"{'#' * level} {path}", ""], [_prose(command.help or ""), ""]
    subcommands = getattr(command, "commands", None)
    if subcommands:
        parts = [*heading, *_usage(f"{path} COMMAND [OPTIONS]"), *prose]
        for name, subcommand in subcommands.items():
            parts += _command(f"{path} {name}", subcommand, level + 1)
        return parts
    shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
    arguments = [parameter for parameter in shown if parameter.param_type_name == "argument"]
    options = [parameter for parameter in shown if parameter not in arguments and parameter.name != "help"]
    hints = get_type_hints(inspect.unwrap(command.callback))
    parts = [*heading, *_usage(" ".join([path, *map(_placeholder, arguments), "[OPTIONS]"])), *prose]
    if arguments:
        rows = [[code(_metavar(a)), "yes" if a.required else "no", cell(a.help or "")] for a in arguments]
        parts += [table(["argument", "required", "meaning"], rows), ""]
    if options:
        rows = [[_names(o), cell(_type(o, hints.get(o.name))), _default(o), cell(o.help or "")] for o in options]
        parts += [table(["option", "type", "default", "meaning"], rows), ""]
    return parts


def _usage(line: str) -> list[str]:
    return ["```text", line, "```", ""]


def _prose(text: str) -> str:
    """A docstring as Markdown; indented blocks become fenced blocks."""
    text = inspect.cleandoc(text).replace("\b\n", "")
    blocks = re.split(r"\n\n+", text)
    rendered = []
    for block in blocks:
        lines = block.split("\n")
        if all(line.startswith("    ") for line in lines):
            rendered.append("\n".join(["```text", *(line[4:] for line in lines), "```"]))
        else:
            rendered.append(block)
    return "\n\n".join(rendered).replace("```\n\n```text\n", "")


def _metavar(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name).upper()


def _placeholder(argument: Any) -> str:
    name = _metavar(argument) + ("..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _names(option: Any) -> str:
    return ", ".join(code(name) for name in [*option.opts, *option.secondary_opts])


def _type(option: Any, annotation: Any) -> str:
    if getattr(option, "is_flag", False):
        return "flag"
    kind = code(option.metavar) if option.metavar else type_name(annotation)
    low = getattr(option, "min", None)
    bound = f" ≥ {low:g}" if low is not None else ""
    return kind + bound + (", repeatable" if option.multiple else "")


def type_name(annotation: Any) -> str:
    """The type of a parameter in words; `None` of optional parameters is ignored."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(code(str(value)) for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(type_name(inner) for inner in arguments if inner is not NoneType)
    if origin is tuple:
        return f"{len(arguments)} values"
    if origin is list:
        return type_name(arguments[0])
    return {str: "text", int: "integer", float: "number", Path: "path"}.get(annotation, "text")


def _default(option: Any) -> str:
    if option.required:
        return "required"
    default = getattr(option.default, "value", option.default)
    if callable(default) or default is None or default in ((), []):
        return "none"
    if isinstance(default, bool):
        return "on" if default else "off"
    return code(str(default))
