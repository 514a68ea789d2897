"""Replacements for GPU work in measurements of the cluster: they sleep in proportion to the work."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import log10
from pathlib import Path
from typing import Any

from raydistill.config.run import Run
from raydistill.core import artifact
from raydistill.core.files import write_atomic
from raydistill.inference.decoding import BeamSearchParams, EngineOptions, Hypothesis, Workload
from raydistill.jobs.pseudolabel import CHARS_PER_TOKEN
from raydistill.training.inputs import RunInputs
from raydistill.training.loop import ReportFn
from raydistill.training.records import RESULT_FILE, RunResult, write_history
from raydistill.training.run_folder import check_same_config
from raydistill.training.workers import Worker

OUTPUT_WORDS = 25  # per text that the engine writes
VALIDATIONS = 5  # per trial
SLEEP_FILE = "sleep.json"  # in a trial's folder


@dataclass
class SimulatedEngine:
    """An engine that returns the first words of each source after sleeping `seconds_per_char` per character."""

    seconds_per_char: float
    device: str
    precision: str = "none"
    name: str = "sleep"
    tokenizer: Any = field(default=None, repr=False)
    generation_config: Any = field(default=None, repr=False)

    def generate(
        self, texts: list[str], beam: BeamSearchParams, *, n_best: int = 1, **_: Any
    ) -> list[list[Hypothesis]]:
        """See `Engine.generate`; all `n_best` candidates of a row are equal."""
        time.sleep(self.seconds_per_char * sum(map(len, texts)))
        outputs = [" ".join(text.split()[:OUTPUT_WORDS]) for text in texts]
        return [[Hypothesis(text, -1.0, OUTPUT_WORDS)] * n_best for text in outputs]

    def make_benchmark_call(self, workload: Workload, texts: Sequence[str] = ()) -> Callable[[], None]:
        """See `Engine.make_benchmark_call`."""
        return lambda: time.sleep(self.seconds_per_char * CHARS_PER_TOKEN * workload.source_tokens * workload.batch)


def simulated_engine(
    checkpoint: str | Path, kind: str, options: EngineOptions, *, seconds_per_char: float, **_: Any
) -> SimulatedEngine:
    """Open a `SimulatedEngine`, with the parameters of `inference.engines.open_engine`."""
    return SimulatedEngine(seconds_per_char, options.device)


def simulated_run(
    run: Run,
    folder: Path,
    report: ReportFn,
    inputs: RunInputs,
    worker: Worker | None = None,
    *,
    seconds_per_step: float,
) -> RunResult:
    """Sleep instead of training `training.max_steps` steps, and write the files of `training.run.train`.

    No checkpoint is written, and the scores are synthetic. Process id, start, end and seconds of sleep are written to
    `SLEEP_FILE` in `folder`.
    """
    start = time.time()
    folder.mkdir(parents=True, exist_ok=True)
    steps = run.training.max_steps
    assert steps is not None
    with artifact.lock(folder):
        check_same_config(folder, run)
        if finished := RunResult.read_if_present(folder / RESULT_FILE):
            return finished
        history: list[dict[str, Any]] = []
        for validation in range(1, VALIDATIONS + 1):
            time.sleep(seconds_per_step * steps / VALIDATIONS)
            progress = validation / VALIDATIONS
            score = 20 * progress - abs(3 + log10(run.training.learning_rate or 1.0))
            hours = (time.time() - start) / 3600
            history.append(
                {"step": round(steps * progress), "total_steps": steps, "device_hours": hours}
                | {"metric": "rouge2", "score": score}
            )
            write_history(folder, history)
            if report(history[-1], folder):
                break
        sleep = [os.getpid(), start, time.time(), seconds_per_step * history[-1]["step"]]
        write_atomic(folder / SLEEP_FILE, json.dumps(sleep).encode())
        result = RunResult(
            key=folder.name,
            status="done",
            method=run.method,
            size=run.student.size,
            number=inputs.number,
            params=inputs.params,
            metrics={**inputs.costs, "score": history[-1]["score"], "device_hours": history[-1]["device_hours"]},
            steps=history[-1]["step"],
        )
        result.write(folder / RESULT_FILE)
    return result
