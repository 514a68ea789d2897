"""Estimates what a sweep costs by training a few steps of the user's data and teacher, for `sweep --estimate`.

Real runs of a few steps are timed in a temporary folder: of every method, the smallest and the largest shape. The
estimate is too high in three respects: no trial stops early, no teacher cache is used, and the first step, which is
slower, counts. The timing of shapes and the serving of finalists are not included.
"""

import math
import os
import tempfile
import time
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from raydistill.config.run import Run
from raydistill.config.shapes import shape_sort_key
from raydistill.config.space import Space, corner_runs
from raydistill.core.console import print_progress
from raydistill.core.errors import UserError
from raydistill.results.formatting import format_count
from raydistill.training.tokenized_data import read_split

TIMED_STEPS = 8
TIMED_ROWS = 32  # decoded in a validation


@dataclass(frozen=True)
class RunTiming:
    """Measured times of a run, in seconds.

    Attributes:
        step: An optimiser step.
        validated_row: A row of a validation.
        startup: From the start to the first step.
    """

    step: float
    validated_row: float
    startup: float


@dataclass(frozen=True)
class Machine:
    """The devices of a machine: "cuda" and the number of GPUs, or "cpu" and the number of cores."""

    device: str
    devices: int


@dataclass(frozen=True)
class SweepEstimate:
    """What a sweep costs on devices as fast as that of this machine.

    Attributes:
        trial_hours: Mean device-hours of a trial.
        label_hours: Device-hours of the teacher's pass for pseudo-labels; 0 if none is needed.
        device_hours: All trials and the pass.
        machine: This machine.
        timings: By method and shape.
    """

    trial_hours: float
    label_hours: float
    device_hours: float
    machine: Machine
    timings: dict[str, RunTiming]

    def describe(self, trials: int) -> list[str]:
        """The estimate in lines."""
        kind, devices = "GPU" if self.machine.device == "cuda" else "CPU core", self.machine.devices
        lines = [
            f"timed {name}: {1000 * timing.step:.0f} ms per step, "
            f"{1000 * timing.validated_row:.0f} ms per validated row"
            for name, timing in self.timings.items()
        ]
        return [
            *lines,
            f"estimated device-hours ({kind}s): about {self.device_hours:.3g}: {trials} x {self.trial_hours:.3g} for "
            f"trials, {self.label_hours:.3g} for labels",
            f"estimated time on this machine's {format_count(devices, kind)}: about "
            f"{self.device_hours / devices:.3g} hours, without the timing of shapes and the serving of finalists",
        ]

    def to_json(self) -> dict[str, Any]:
        """The estimate for `--json`."""
        return asdict(self)


def estimate_sweep(space: Space) -> SweepEstimate:
    """Time a few steps of the runs of a space, and estimate its cost. The data and the teacher exist.

    Raises:
        UserError: A run fails.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    devices = torch.cuda.device_count() if device == "cuda" else len(os.sched_getaffinity(0))
    runs = corner_runs(space)
    rows = {split: _count_rows(runs[0], split) for split in ("train", "validation", "test")}
    timings = {}
    for run in runs_to_time(runs):
        name = f"{run.method} {run.student.shape.name}"
        print_progress(f"timing {TIMED_STEPS} steps of {name}")
        timings[name] = time_short_run(run, device)
    label_seconds = 0.0
    if any(run.uses_pseudo_labels for run in runs):
        print_progress(f"timing {TIMED_ROWS} labels of the teacher")
        label_seconds = rows["train"] * time_label(runs[0], device)
    return combine_timings(runs, space.search.trials, rows, timings, label_seconds / 3600, Machine(device, devices))


def runs_to_time(runs: list[Run]) -> list[Run]:
    """Of every method, a run of the smallest and of the largest shape, with the original targets as labels."""
    selected = []
    labelled = [_without_labels(run) for run in runs]
    for method in sorted({run.method for run in labelled}):
        shapes = {run.student.shape.name: run for run in labelled if run.method == method}
        names = sorted(shapes, key=shape_sort_key)
        selected += [shapes[name] for name in dict.fromkeys((names[0], names[-1]))]
    return selected


def combine_timings(
    runs: list[Run],
    trials: int,
    rows: dict[str, int],
    timings: dict[str, RunTiming],
    label_hours: float,
    machine: Machine,
) -> SweepEstimate:
    """The estimate from timings by method and shape: the mean over `runs`, with the mean timing of a run's method."""
    means = {}
    for method in {name.split()[0] for name in timings}:
        own = [timing for name, timing in timings.items() if name.split()[0] == method]
        means[method] = RunTiming(*(mean(values) for values in zip(*map(astuple, own), strict=True)))
    trial_hours = mean(
        trial_device_hours(run, rows, means[_without_labels(run).method], machine.device) for run in runs
    )
    return SweepEstimate(trial_hours, label_hours, trials * trial_hours + label_hours, machine, timings)


def trial_device_hours(run: Run, rows: dict[str, int], timing: RunTiming, device: str) -> float:
    """Device-hours of a run that takes all its steps: steps, validations, and the final scores of both splits."""
    from raydistill.training.loop import StepCounts
    from raydistill.training.workers import Worker

    counts = StepCounts.of(run.training, rows["train"])
    num_validations = math.ceil(counts.total / counts.per_validation)
    validated = (num_validations + 1) * rows["validation"] + rows["test"]
    seconds = timing.startup + counts.total * timing.step + validated * timing.validated_row
    return Worker(device=device, world_size=run.training.workers).device_hours(seconds, run.training)


def time_short_run(run: Run, device: str) -> RunTiming:
    """Train a run for `TIMED_STEPS` steps on a few rows, in this process and in a temporary folder."""
    from raydistill.training.run import train
    from raydistill.training.workers import Worker, set_torch_threads

    set_torch_threads(run.training.threads)
    rows = {"train_rows": TIMED_STEPS * run.training.batch_size, "validation_rows": TIMED_ROWS, "test_rows": 1}
    dataset = run.dataset.model_copy(update={**rows, "selection_share": 0.0, "selection_split": None})
    short = {
        "max_steps": TIMED_STEPS,
        "epochs": TIMED_STEPS,
        "checks_per_epoch": 1,
        "teacher_cache": "off",
        "workers": 1,
    }
    short_run = run.model_copy(
        update={"dataset": dataset, "training": run.training.model_copy(update={**short, "patience": None})}
    )
    reported: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        result = train(
            short_run, Path(folder) / "run", lambda metrics, _: reported.append(metrics), None, Worker(device=device)
        )
    if not reported or result is None:
        raise UserError(f"{run.method} {run.student.shape.name}: {result.reason if result else 'no validation'}")
    last = reported[-1]
    return RunTiming(
        step=last["step_ms"] / 1000,
        validated_row=last["validation_s"] / min(TIMED_ROWS, _count_rows(short_run, "validation")),
        startup=result.metrics.get("startup_s", 0.0),
    )


def time_label(run: Run, device: str) -> float:
    """Seconds of a device for one label of the run's teacher: beam search over the first rows of the train split."""
    from raydistill.inference.decoding import EngineOptions, resolve_decoding
    from raydistill.inference.engines import open_engine
    from raydistill.models.teacher import open_teacher
    from raydistill.models.tokenization import resolve_max_tokens

    assert run.teacher is not None
    teacher = open_teacher(run.teacher, run.dataset)
    config, preset = teacher.model.config, teacher.preset
    max_source = resolve_max_tokens("max_source_tokens", run.dataset, preset, config)
    max_target = resolve_max_tokens("max_target_tokens", run.dataset, preset, config)
    beam = resolve_decoding(
        run.decoding, teacher.model.generation_config, preset.decoding if preset else None, max_target
    )
    options = EngineOptions(device, languages=teacher.languages, source_prefix=teacher.source_prefix)
    engine = open_engine(teacher.location, options=options)
    corpus = read_split(run.dataset.model_copy(update={"train_rows": TIMED_ROWS}), "train")
    assert corpus is not None
    engine.generate(corpus.sources[:1], beam, max_source_tokens=max_source)
    started_at = time.perf_counter()
    engine.generate(corpus.sources, beam, max_source_tokens=max_source)
    return (time.perf_counter() - started_at) / len(corpus)


def _without_labels(run: Run) -> Run:
    """The run with the original targets: pseudo-labels do not exist yet, and their steps take as long."""
    if not run.uses_pseudo_labels:
        return run
    return run.model_copy(update={"labels": "original", "method": "sft" if run.method == "pl" else run.method})


def _count_rows(run: Run, split: str) -> int:
    """Rows of a split that a run reads; "validation" is without the rows that are kept for the choice."""
    corpus = read_split(run.dataset, split)
    return len(corpus) if corpus else 0
