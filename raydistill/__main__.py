"""The console script: `raydistill NAME ...` runs `python -m raydistill.NAME ...`."""

import importlib
import sys

COMMANDS = {
    "sweep": "search students of a teacher: the front of quality and latency, and the best student per budget",
    "train": "train one model: a student, or a teacher from a pre-trained checkpoint or from scratch",
    "pseudolabel": "generate labels for a training set with the teacher",
    "labels": "list, describe, compare and curate label sets",
    "cache": "list and remove stored teacher states",
    "evaluate": "score and time a checkpoint, or compare two",
    "choose": "select the best checkpoint of a sweep within a budget, and register it in MLflow",
    "report": "write the tables and figures of the paper from sweeps, next to the published numbers",
    "shrink": "create an untrained student checkpoint",
    "describe": "read and check a data set, and print statistics",
}


def main() -> None:
    """Run the command named by the first argument; only its module is imported."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name == "--version":
        from raydistill import __version__

        print(__version__)
        return
    if name not in COMMANDS:
        usage = "\n".join(f"  {command:12} {purpose}" for command, purpose in COMMANDS.items())
        text = (
            f"Usage: raydistill COMMAND ...\n\nCommands:\n{usage}\n\n"
            "`raydistill COMMAND --help` shows options and examples."
        )
        if name in ("--help", "-h"):
            print(text)
            return
        print(f"error: no such command: {name!r}\n\n{text}", file=sys.stderr)
        sys.exit(2)
    module = importlib.import_module(f"raydistill.{name}")
    sys.argv = [f"raydistill {name}", *sys.argv[2:]]
    module.main()


if __name__ == "__main__":
    main()
