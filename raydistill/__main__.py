"""The console script: `raydistill NAME ...` is `python -m raydistill.NAME ...`."""

import importlib
import sys

COMMANDS = {
    "sweep": "search students of one teacher: the quality/latency front and the choice per budget",
    "train": "one run: a student, or a teacher from a pre-trained or random start",
    "pseudolabel": "teacher beam search over a training set",
    "labels": "list, describe, compare and curate label sets",
    "cache": "list the teacher cache on disk, remove what is not needed",
    "evaluate": "score and time a checkpoint, or two against each other",
    "choose": "the best checkpoint of a sweep within a budget; registers it in MLflow",
    "report": "the paper's tables and figures from sweeps, its own figures beside ours",
    "shrink": "make a student checkpoint, untrained",
    "describe": "read and check a data set, print its statistics",
}


def main() -> None:
    """Hand the remaining arguments to the command's own module, which alone imports what it needs."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name == "--version":
        from raydistill import __version__

        print(__version__)
        return
    if name not in COMMANDS:
        usage = "\n".join(f"  {command:12} {what}" for command, what in COMMANDS.items())
        more = "`raydistill COMMAND --help` shows examples."
        text = f"Usage: raydistill COMMAND ...\n\nCommands:\n{usage}\n\n{more}"
        if name in ("--help", "-h"):
            print(text)
            return
        print(f"error: there is no command {name!r}\n\n{text}", file=sys.stderr)
        sys.exit(2)
    module = importlib.import_module(f"raydistill.{name}")
    sys.argv = [f"raydistill {name}", *sys.argv[2:]]
    module.main()


if __name__ == "__main__":
    main()
