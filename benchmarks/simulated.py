"""What stands in for the GPU work where the cluster around it is measured: sleeps in proportion to the work."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raydistill.config.run import Run
from raydistill.core.files import read_json, write_atomic, write_json_atomic
from raydistill.inference.decoding import BeamSearchParams, EngineOptions, Hypothesis, Workload
from raydistill.jobs.pseudolabel import CHARS_PER_TOKEN
from raydistill.training.inputs import RunInputs
from raydistill.training.loop import ReportFn
from raydistill.training.run_folder import check_same_config, run_lock
from raydistill.training.workers import Worker

WORDS = 25  # of a text that the engine writes
CHECKS = 5  # validations of a trial


@dataclass
class SimulatedEngine:
    """An engine that writes the first words of a source, and takes `seconds_per_char` of it; see `simulated_engine`."""

    seconds_per_char: float
    device: str
    precision: str = "none"
    name: str = "sleep"
    tokenizer: Any = field(default=None, repr=False)
    generation_config: Any = field(default=None, repr=False)

    def generate(
        self, texts: list[str], beam: BeamSearchParams, *, n_best: int = 1, **_: Any
    ) -> list[list[Hypothesis]]:
        """As Engine.generate; all candidates of a row are alike."""
        time.sleep(self.seconds_per_char * sum(map(len, texts)))
        written = [" ".join(text.split()[:WORDS]) for text in texts]
        return [[Hypothesis(text, -1.0, WORDS)] * n_best for text in written]

    def make_benchmark_call(self, workload: Workload) -> Callable[[], None]:
        """As `Engine.make_benchmark_call`."""
        return lambda: time.sleep(self.seconds_per_char * CHARS_PER_TOKEN * workload.source_tokens * workload.batch)


def simulated_engine(
    checkpoint: str | Path, kind: str, options: EngineOptions, *, seconds_per_char: float, **_: Any
) -> SimulatedEngine:
    """An engine factory for the pseudo-label job, called like `open_engine`."""
    return SimulatedEngine(seconds_per_char, options.device)


def simulated_run(
    run: Run,
    folder: Path,
    report: ReportFn,
    inputs: RunInputs,
    worker: Worker | None = None,
    *,
    seconds_per_step: float,
) -> dict[str, Any]:
    """A run as training.run.train leaves one, of `training.max_steps` steps that are slept.

    It writes no checkpoint. Its score is made up. When it began and ended goes to stamps.jsonl in its folder.
    """
    began = time.time()
    folder.mkdir(parents=True, exist_ok=True)
    steps = run.training.max_steps
    assert steps is not None
    with run_lock(folder):
        check_same_config(folder, run)
        if (folder / "result.json").is_file():
            return read_json(folder / "result.json")
        history: list[dict[str, Any]] = []
        for check in range(1, CHECKS + 1):
            time.sleep(seconds_per_step * steps / CHECKS)
            share = check / CHECKS
            score = 20 * share - abs(3 + _magnitude(run.training.learning_rate))
            hours = (time.time() - began) / 3600
            history.append({"step": round(steps * share), "progress": share, "score": score, "gpu_hours": hours})
            write_atomic(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history).encode())
            if report(history[-1], folder):
                break
        stamp = [os.getpid(), began, time.time(), seconds_per_step * history[-1]["step"]]
        write_atomic(folder / "stamps.jsonl", json.dumps(stamp).encode())
        result = {
            "key": folder.name,
            "status": "done",
            "method": run.method,
            "size": run.student.size,
            **inputs.result_fields,
            "metrics": {**inputs.costs, "score": history[-1]["score"], "gpu_hours": history[-1]["gpu_hours"]},
            "steps": history[-1]["step"],
        }
        write_json_atomic(folder / "result.json", result)
    return result


def _magnitude(rate: float | None) -> float:
    from math import log10

    return log10(rate or 1.0)
