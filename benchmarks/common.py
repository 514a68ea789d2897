"""What every benchmark shares: on which machine it ran, and where its result goes."""

import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from raydistill.core.files import write_atomic, write_json_atomic
from raydistill.evaluation.latency import hardware

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "transformers", "ctranslate2", "ray")


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """What a figure depends on: processor, cores, memory, versions, the commit, and how busy the machine was."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = hardware(device)
    return {
        "processor": found["name"],
        "cores": found["cores"],
        "memory_gib": round(memory / 2**30, 1),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "load_before": [round(x, 2) for x in os.getloadavg()],
    }


def write_result(
    name: str,
    title: str,
    markdown: str,
    data: Any,
    machine: dict[str, Any],
    results: Path = RESULTS,
    device: str = "cpu",
    form: str = "",
) -> Path:
    """Write NAME.md into `results` and, with the same figures and more, NAME.json; returns the first.

    The command is the one that is running. `machine` is `describe_machine()` as it was before the work. Of another
    `device` the files are NAME_DEVICE, or NAME_DEVICE_FORM.
    """
    date = time.strftime("%Y-%m-%d")
    command = shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])
    facts = ", ".join(f"{key} {value}" for key, value in machine.items())
    text = f"# {title}\n\n{date}: {facts}.\n\n    {command}\n\n{markdown.strip()}\n"
    stem = name if device == "cpu" else "_".join(part for part in (name, device, form) if part)
    write_json_atomic(results / f"{stem}.json", {"date": date, "command": command, "machine": machine, "data": data})
    write_atomic(results / f"{stem}.md", text.encode())
    return results / f"{stem}.md"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _commit() -> str:
    """The short commit, with a + where the working tree differs from it; "unknown" outside of git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
