"""Sweeps and trials on disk, as a search leaves them, without training anything."""

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from raydistill.config.serving import Serving, ServingConfig
from raydistill.config.space import Space
from raydistill.core.files import SCHEMA_VERSION, write_json_atomic
from raydistill.evaluation.latency import Hardware
from raydistill.evaluation.paired_latency import Pair, PairedTiming
from raydistill.inference.decoding import BeamSearchParams
from raydistill.models.metadata import CheckpointMetadata
from raydistill.results.outputs import outputs_filename, texts_filename, write_outputs, write_texts
from raydistill.results.records import rows_filename, seed_run_folder
from raydistill.results.selection import Selection
from raydistill.results.served_students import SERVED_FILE, ServedRecord, ServedStudent
from raydistill.results.serving_latency import LATENCY_FILE, LatencySession, TimedServing, read_session
from raydistill.results.sweep_record import (
    SWEEP_FILE,
    CheapestServing,
    ShapeTable,
    StopReason,
    SweepRecord,
    SweepTeacher,
    TeacherPasses,
    read_sweep,
)
from raydistill.tracking import mlflow_store
from raydistill.training.records import RESULT_FILE, RunResult, write_history
from tests.factories.models import save_tiny
from tests.factories.workspace import make_world

RUN: dict[str, Any] = {
    "teacher": "t",
    "dataset": "d",
    "method": {"choice": ["sft", "kd"]},
    "student": {"size": {"choice": ["2-3", "2-1"]}},
    "loss": {"alpha_hidden": {"choice": [1, 3], "when": {"method": "kd"}}},
}
"""The `run` section of a space of six combinations; neither the teacher nor the data set exists."""

MACHINE: Hardware = {"kind": "cpu", "name": "some CPU", "cores": 4, "threads": 2}

KILL_SPACE: dict[str, Any] = {
    "name": "killed",
    "run": {
        "method": {"choice": ["sft", "kd"]},
        "student": {"size": {"choice": ["2-3", "2-2", "2-1"]}},
        "training": {"epochs": 6, "batch_size": 8, "warmup_steps": 2, "checks_per_epoch": 2, "patience": 99},
        "decoding": {"beams": 1, "max_length": 12},
        "evaluation": {"allow_repetitive_teacher": True},
    },
    "search": {"trials": 6, "sampler": "grid"},
    "serving": {"beams": [1], "precision": ["fp32"]},
    "budgets": {"any": {"params_m": 100}},
}
"""A space of six short trials that lacks the teacher and the data set of `workspace.make_world`."""


def write_kill_space(folder: Path, run: Mapping[str, Any] | None = None, **settings: Any) -> Path:
    """Write a tiny teacher, a corpus and `KILL_SPACE` with other settings to a folder; return the space file.

    Args:
        folder: The folder of all files.
        run: Other entries of the space's `run` section.
        settings: Other sections of the space.
    """
    teacher, data = make_world(folder)
    run = {**KILL_SPACE["run"], **(run or {}), "teacher": str(teacher)}
    run["dataset"] = {"name": str(data), "max_source_tokens": 32, "max_target_tokens": 16, "selection_share": 0}
    path = folder / "killed.yaml"
    path.write_text(yaml.safe_dump({**KILL_SPACE, "run": run, **settings}))
    return path


def make_space(**search: Any) -> Space:
    """The space of `RUN` as a grid of six trials, with other settings of the search."""
    return Space.model_validate({"name": "s", "run": RUN, "search": {"sampler": "grid", "trials": 6, **search}})


def sweep_teacher(**changes: Any) -> SweepTeacher:
    """The teacher "big" with four layers on each side, which takes 300 ms and scores 20 on validation."""
    fields: dict[str, Any] = {
        "name": "big",
        "key": "k",
        "size": "4-4",
        "metric": "rouge2",
        "metrics": {"rouge2": 20.0},
        "interval": (19.0, 21.0),
        "repetition": 0.0,
        "source_tokens": 5,
        "output_tokens": 3,
        "decoding": {"beams": 4, "length_penalty": 1.0, "min_length": 0, "max_length": 12, "no_repeat_ngram": 0}
        | {"early_stopping": False, "forced_bos_token_id": None},
        "signature": "rouge2",
        "engine": "ctranslate2",
        "precision": "fp32",
        "machine": MACHINE,
        "data": {"validation": "v"},
        "rows": {"validation": 20},
        "corpus": {},
        "costs": {"latency_ms": 300.0},
        "passes": TeacherPasses(),
        "label_sets": {},
    }
    return SweepTeacher.model_validate({**fields, **changes})


def paired_timing(ratio: float, interval: tuple[float, float] | None = None, baseline_ms: float = 300) -> PairedTiming:
    """A comparison of one pair that is not noisy, by default with an interval of 1 % to either side."""
    pair = Pair(baseline_ms=(baseline_ms,), student_ms=(ratio * baseline_ms,), seconds=1.0, background_cores=0.0)
    fields: dict[str, Any] = {"confidence": 0.95, "bounds": (), "stop_reason": "precise", "pairs": (pair,)}
    return PairedTiming(ratio=ratio, interval=interval or (0.99 * ratio, 1.01 * ratio), **fields)


def shape_table(
    costs: dict[str, dict[str, float]],
    cheapest: Mapping[str, dict[str, float] | CheapestServing] | None = None,
    **changes: Any,
) -> ShapeTable:
    """Costs of shapes, of which the first is the teacher's; by default no serving is cheaper than the teacher's."""
    teacher = changes.get("teacher_size", next(iter(costs)))
    servings = {
        size: own
        if isinstance(own, CheapestServing)
        else CheapestServing(
            config=ServingConfig(beams=1, length_penalty=1.0),
            engine="ctranslate2 fp32",
            timings={
                name: paired_timing(value / costs[teacher][name])
                for name, value in own.items()
                if name.startswith("latency_ms")
            },
            costs={name: value for name, value in own.items() if not name.startswith("latency_ms")},
        )
        for size, own in (costs if cheapest is None else cheapest).items()
    }
    fields: dict[str, Any] = {"teacher_size": teacher, "engines": {}, "cheapest": servings}
    return ShapeTable(**{**fields, **changes}, costs=costs)


def sweep_record(teacher: SweepTeacher | None = None, **changes: Any) -> SweepRecord:
    """The record of the running sweep "mini" with the shape of its teacher only, and without budgets."""
    teacher = teacher or sweep_teacher()
    fields: dict[str, Any] = {
        "name": "mini",
        "status": "running",
        "stop": StopReason(),
        "teacher": teacher,
        "shapes": shape_table({teacher.size: teacher.costs}),
        "cost": "latency_ms",
        "budgets": {},
        "tolerance": 0.5,
        "serving": Serving(),
        "shortlists": {},
        "tracking_uri": mlflow_store.default_tracking_uri(),
        "versions": {},
    }
    return SweepRecord(**{**fields, **changes})


def change_sweep(sweep: Path, **changes: Any) -> None:
    """Replace fields of sweep.json."""
    path = sweep / SWEEP_FILE
    SweepRecord.read(path).model_copy(update=changes).write(path)


def make_sweep(folder: Path) -> Path:
    """Write a sweep without trials, whose teacher takes 300 ms and whose budget `fast` allows half of that."""
    sweep_record(name=folder.name, budgets={"fast": {"latency_ms": "50%"}}).write(folder / SWEEP_FILE)
    (folder / "space.yaml").write_text(f"name: {folder.name}\nrun: {{}}\n")
    return folder


def make_trial(sweep: Path, key: str, number: int, score: float, status: str | None = "done") -> Path:
    """Write the folder of a trial with two validations; a `status` of None leaves the trial running."""
    folder = sweep / "trials" / key
    run = {"schema": SCHEMA_VERSION, "name": sweep.name, "teacher": "big", "dataset": {"name": "d"}, "method": "kd"}
    run |= {"student": {"size": "4-1"}, "training": {"learning_rate": 3e-4}}
    write_json_atomic(folder / "run.json", run)
    scores = {1: score - 1, 2: score}
    lines = [
        {"step": 10 * i, "total_steps": 20, "epoch": i / 2, "time_s": 1.5 * i, "val_loss": 3.0 - i}
        | {"rouge2": scores[i], "metric": "rouge2", "score": scores[i]}
        for i in (1, 2)
    ]
    write_history(folder, lines)
    if status:
        finish_trial(folder, number, score, status)
    return folder


def finish_trial(folder: Path, number: int, score: float, status: str = "done") -> None:
    """Write the result and, for a trial that is done, an empty checkpoint and the per-row scores."""
    metrics = {"rouge2": score, "rouge1": 2 * score, "latency_ms": 10.0 * score, "params_m": 3.0}
    if status == "done":
        (folder / "best").mkdir()
        CheckpointMetadata().write_to(folder / "best")
        np.savez(folder / "rows.npz", validation=np.full(20, score))
    write_result(
        folder,
        number=number,
        status=status,
        reason="out of memory" if status == "failed" else "",
        method="kd",
        size="4-1",
        copied={"encoder": [0, 1, 2, 3], "decoder": [0]},
        metrics=metrics if status == "done" else {},
        interval=[score - 1, score + 1] if status == "done" else None,
        test={"rouge2": score - 0.5, "interval": [score - 2, score]} if status == "done" else None,
        steps=20,
    )


def write_result(folder: Path, **fields: Any) -> None:
    """Write the result of a trial, by default with the status "done", and its folder if that is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    RunResult.parse({"key": folder.name, "status": "done", **fields}).write(folder / RESULT_FILE)


def change_result(folder: Path, **fields: Any) -> None:
    """Change fields of a trial's result."""
    result = RunResult.read(folder / RESULT_FILE)
    RunResult.parse({**result.model_dump(), **fields}).write(folder / RESULT_FILE)


def make_student(sweep: Path, key: str, number: int, score: float, size: str = "4-1") -> Path:
    """Write a finished trial with a checkpoint that loads, served with its own four beams and with one beam."""
    folder = make_trial(sweep, key, number, score)
    change_result(folder, size=size)  # latency belongs to a size, so trials of different cost need different sizes
    save_tiny("bart", folder / "best")
    path = folder / "best" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_length": 20}))  # as training leaves the file
    metadata = {
        "teacher": "big",
        "config": {"name": "x", "teacher": "big", "dataset": {"name": "d", "max_source_tokens": 32}},
        "decoding": {"beams": 4, "length_penalty": 1.0, "min_length": 0, "max_length": 12},
        "supervised": {"decoder": [2]},
        "data": {"train": "f00d"},
    }
    CheckpointMetadata.parse(metadata).write_to(folder / "best")
    entries = []
    for beams, milliseconds in ((4, 10 * score), (1, 4 * score)):
        costs = {"latency_ms": milliseconds, "latency_ms_b1": 1.0}
        entries.append(served_student(beams, 1.0, score, costs))
        np.savez(folder / f"rows-validation-{entries[-1].entry.config.key}.npz", validation=np.full(20, score))
    write_served(folder, *entries)
    return folder


def make_repeat(sweep: Path, key: str, seed: int, score: float, rows: np.ndarray | None = None) -> Path:
    """Write the finished run of a trial with another seed, with 0.5 device-hours; with `rows`, served with four beams.

    `rows` are per-row statistics of the validation split.
    """
    folder = make_trial(sweep, "repeat", 0, score)
    change_result(folder, seed=seed, metrics={"rouge2": score, "device_hours": 0.5})
    if rows is not None:
        serve_trial(folder, score, rows)
    target = seed_run_folder(sweep, key, seed)
    target.parent.mkdir(exist_ok=True)
    return folder.rename(target)


def serve_trial(folder: Path, score: float, rows: np.ndarray, latency_ms: float = 100.0) -> None:
    """Write the scores and timings of a trial that is served with four beams, and its per-row statistics."""
    served = served_student(4, 1.0, score, {"latency_ms": latency_ms, "latency_ms_b1": 1.0}, rows=len(rows))
    np.savez(folder / f"rows-validation-{served.entry.config.key}.npz", validation=rows)
    write_served(folder, served)


@dataclass(frozen=True)
class Served:
    """An entry of served.json, and the latencies of its shape and configuration."""

    entry: ServedStudent
    costs: dict[str, float]


def served_student(
    beams: int,
    length_penalty: float,
    score: float,
    costs: dict[str, float],
    config: dict[str, Any] | None = None,
    **changes: Any,
) -> Served:
    """A served student whose 95 % interval is one point to either side of its score."""
    fields: dict[str, Any] = {"engine": "ctranslate2", "precision": "fp32", "version": "4.8.1", "rows": 20}
    fields |= {"metrics": {"rouge2": score, "score": score}, "interval": (score - 1, score + 1), "memory_mb": 12.0}
    serving = ServingConfig(beams=beams, length_penalty=length_penalty, **(config or {}))
    return Served(ServedStudent(config=serving, **{**fields, **changes}), costs)


def write_served(folder: Path, *students: Served) -> None:
    """Write served.json of a trial, and add the latencies of its size to the session of the sweep.

    The teacher takes 300 ms for 32 rows and 10 ms for one.
    """
    ServedRecord(entries=[student.entry for student in students]).write(folder / SERVED_FILE)
    sweep = folder.parents[1]
    session = read_session(sweep) or LatencySession.parse(
        {
            "started_at": "2026-01-01T00:00:00Z",
            "hardware": MACHINE,
            "versions": {},
            "baseline": {"beams": 4, "length_penalty": 1.0},
            "baseline_engine": "ctranslate2 fp32",
            "baseline_ms": {"latency_ms": 300.0, "latency_ms_b1": 10.0},
            "representatives": {},
            "servings": [],
        }
    )
    size = RunResult.read(folder / RESULT_FILE).size
    added = [
        TimedServing(
            shape=str(size),
            config=student.entry.config,
            cost=cost,
            engine=f"{student.entry.engine} {student.entry.precision}",
            timing=paired_timing(student.costs.get(cost, baseline_ms) / baseline_ms),
        )
        for student in students
        for cost, baseline_ms in session.baseline_ms.items()
    ]
    replaced = {(serving.shape, serving.config.key, serving.cost) for serving in added}
    kept = [s for s in session.servings if (s.shape, s.config.key, s.cost) not in replaced]
    session.model_copy(update={"servings": [*kept, *added]}).write(sweep / LATENCY_FILE)


def write_sample_texts(selection: Selection, outputs: list[str]) -> None:
    """Write sources, references, and the same outputs of the teacher and of every served student."""
    sweep, split = selection.sweep, selection.split
    assert selection.session is not None
    rows = [(f"row-{i}", f"source {i}", f"reference {i}") for i in range(len(outputs))]
    write_texts(sweep / texts_filename(split), rows)
    baseline = selection.session.baseline
    write_outputs(sweep / outputs_filename(split, baseline), outputs)
    np.savez(sweep / rows_filename(split, baseline), **{split: np.full(max(20, len(outputs)), 20.0)})  # type: ignore[arg-type]
    for student in selection.students:
        assert student.serving is not None
        write_outputs(student.folder / outputs_filename(split, student.serving), outputs)
        path = student.folder / rows_filename(split, student.serving)
        if not path.exists():
            np.savez(path, **{split: np.full(20, student.score(selection.metric))})  # type: ignore[arg-type]


def runs_of(sweep: Path) -> dict[str, Any]:
    """The MLflow runs of a sweep by trial key ("" for the sweep's own), of which each trial has only one.

    They are read from the store that the sweep recorded, which may be the store of another machine's home.
    """
    client = mlflow_store.make_client(read_sweep(sweep).tracking_uri)
    experiment = client.get_experiment_by_name(sweep.name)
    runs = client.search_runs([experiment.experiment_id])
    assert len({run.data.tags.get("raydistill.trial") for run in runs}) == len(runs), "a trial has two runs"
    return {run.data.tags.get("raydistill.trial", ""): run for run in runs}


def mlflow_children(home: Path) -> list[tuple[str, str]]:
    """(trial key, status) of every child run, read from MLflow's local database without MLflow."""
    with sqlite3.connect(home / "mlflow.db") as store:
        query = (
            "select t.value, r.status from runs r join tags t on r.run_uuid = t.run_uuid "
            "where t.key = 'raydistill.trial' and r.lifecycle_stage = 'active'"
        )
        return store.execute(query).fetchall()


def finished_sweep(folder: Path, teacher: Path, data: Path, **serving: Any) -> tuple[Space, SweepTeacher]:
    """A space whose sweep has one finished trial and nothing served, and the teacher's record."""
    decoding = asdict(BeamSearchParams(4, 1.0, 0, 12, 0, False, None))
    space = Space.model_validate(
        {
            "name": "m",
            "run": {"teacher": str(teacher), "dataset": {"name": str(data)}},
            "search": {"trials": 1},
            "serving": serving,
        }
    )
    record = sweep_teacher(costs={}, decoding=decoding, data={"validation": "v", "test": "t"})
    sweep_record(record, serving=space.serving).write(folder / "sweep.json")
    CheckpointMetadata(decoding=decoding).write_to(make_trial(folder, "a", 0, 10.0) / "best")
    return space, record


def decide_by_chrf(sweep: Path, *trials: Path) -> None:
    """Change a sweep and its finished, unserved trials to scores by chrF++, with BLEU and a user's metric reported."""
    scores = {"chrf++": 60.0, "bleu": 35.0, "terms:recall": 90.0}
    change_sweep(sweep, teacher=sweep_teacher(metric="chrf++", metrics=scores, metric_reason="a translation, by x"))
    for folder in trials:
        metrics = RunResult.read(folder / RESULT_FILE).metrics
        own = {"chrf++": 50.0, "bleu": 25.0, "terms:recall": 80.0}
        change_result(folder, metrics={**metrics, **own}, test={**own, "bleu": 24.0, "interval": (48.0, 52.0)})
