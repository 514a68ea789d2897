"""The console script: `raydistill NAME ...` runs `python -m raydistill.NAME ...`."""

import importlib
import os
import sys

import typer

from raydistill.core.suggestions import closest_name

COMMANDS = {
    "init": "write a checked space file for your data and teacher",
    "sweep": "search students of a teacher: the front of quality and latency, and the best student per budget",
    "status": "print the state of every sweep, run and label job",
    "train": "train one model: a student, or a teacher from a pre-trained checkpoint or from scratch",
    "pseudolabel": "generate labels for a training set with the teacher",
    "labels": "list, describe, compare and curate label sets",
    "cache": "list and remove stored teacher states",
    "evaluate": "score and time a checkpoint, or compare two",
    "choose": "select the best checkpoint of a sweep within a budget, and register it in MLflow",
    "push": "upload an exported student with its model card to the Hugging Face hub",
    "report": "write the tables and figures of the paper from sweeps, next to the published numbers",
    "shrink": "create an untrained student checkpoint",
    "describe": "read and check a data set, and print statistics",
}
COMPLETION_OPTIONS = ("--install-completion", "--show-completion")
COMPLETION_VARIABLE = "_RAYDISTILL_COMPLETE"  # set by the shell's completion script


def main() -> None:
    """Run the command named by the first argument; only its module is imported."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMPLETION_OPTIONS or COMPLETION_VARIABLE in os.environ:
        all_commands()(prog_name="raydistill")
    if name == "--version":
        from raydistill import __version__

        print(__version__)
        return
    if name not in COMMANDS:
        usage = "\n".join(f"  {command:12} {purpose}" for command, purpose in COMMANDS.items())
        text = (
            f"Usage: raydistill COMMAND ...\n\nCommands:\n{usage}\n\n"
            "`raydistill COMMAND --help` shows options and examples. `raydistill --install-completion` completes "
            "commands\nand options in your shell."
        )
        if name in ("--help", "-h"):
            print(text)
            return
        similar = closest_name(name, COMMANDS)
        hint = f"; did you mean `raydistill {similar}`?" if similar else f"\n\n{text}"
        print(f"error: no such command: {name!r}{hint}", file=sys.stderr)
        sys.exit(2)
    module = importlib.import_module(f"raydistill.{name}")
    sys.argv = [f"raydistill {name}", *sys.argv[2:]]
    module.main()


def all_commands() -> typer.Typer:
    """One application of all commands, which a shell needs for completion."""
    app = typer.Typer()
    for name in COMMANDS:
        command_app = importlib.import_module(f"raydistill.{name}").app
        if len(command_app.registered_commands) == 1:
            app.command(name)(command_app.registered_commands[0].callback)
        else:
            app.add_typer(command_app, name=name)
    return app


if __name__ == "__main__":
    main()
