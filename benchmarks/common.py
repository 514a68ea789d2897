"""Functions shared by all benchmarks: the description of the machine, and the result files."""

import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from raydistill.core.files import write_atomic, write_json_atomic
from raydistill.evaluation.latency import hardware
from raydistill.models.families import size_name

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# The keys of config.json that, with the numbers of layers, decide the speed of a model of any family
SPEED_KEYS = (
    *("d_model", "d_kv", "d_ff", "num_heads", "feed_forward_proj", "encoder_ffn_dim", "decoder_ffn_dim"),
    *("encoder_attention_heads", "decoder_attention_heads", "activation_function", "vocab_size"),
)
PACKAGES = ("torch", "transformers", "ctranslate2", "ray")


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Everything that timings depend on: processor, cores, memory, versions, commit, and the load before the start."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    processor = hardware(device)
    return {
        "processor": processor["name"],
        "cores": processor["cores"],
        "memory_gib": round(memory / 2**30, 1),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "load_before": [round(x, 2) for x in os.getloadavg()],
    }


def architecture_key(config: PretrainedConfig) -> str:
    """All settings that decide the speed of a model, as text: "marian 6-6 d_model=512 ..."."""
    settings = [f"{name}={getattr(config, name)}" for name in SPEED_KEYS if hasattr(config, name)]
    return " ".join([config.model_type, size_name(config), *settings])


def device_suffix(device: str, *parts: str) -> str:
    """The suffix of result files: empty for the CPU, otherwise the device and `parts`, joined by underscores."""
    return "" if device == "cpu" else "_".join((device, *parts))


@dataclass(frozen=True)
class BenchmarkResult:
    """The result of a benchmark.

    Attributes:
        name: the module's name.
        title: the heading of the Markdown file.
        markdown: the tables and text.
        data: the figures, as written to the JSON file.
        machine: what `describe_machine` returned before the benchmark started.
        suffix: appended to the names of the files, see `device_suffix`.
    """

    name: str
    title: str
    markdown: str
    data: Any
    machine: dict[str, Any]
    suffix: str = ""

    def write(self, folder: Path = RESULTS) -> Path:
        """Write NAME.md and NAME.json, with the command that is running, to `folder`; return the first path."""
        date = time.strftime("%Y-%m-%d")
        command = shlex.join(["python", "-m", f"benchmarks.{self.name}", *sys.argv[1:]])
        machine = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        text = f"# {self.title}\n\n{date}: {machine}.\n\n    {command}\n\n{self.markdown.strip()}\n"
        stem = f"{self.name}_{self.suffix}" if self.suffix else self.name
        record = {"date": date, "command": command, "machine": self.machine, "data": self.data}
        write_json_atomic(folder / f"{stem}.json", record)
        write_atomic(folder / f"{stem}.md", text.encode())
        return folder / f"{stem}.md"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _commit() -> str:
    """The short commit, with a + if the working tree differs from it; "unknown" outside of git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
