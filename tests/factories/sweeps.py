"""Sweeps and trials on disk, as a search leaves them, without training anything."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np

from raydistill.config.space import Space
from raydistill.core.files import SCHEMA_VERSION, write_json_atomic
from raydistill.models.metadata import CheckpointMetadata
from raydistill.results.records import decoding_key
from raydistill.tracking import mlflow_store
from raydistill.training.records import RESULT_FILE, RunResult
from tests.factories.models import save_tiny

RUN: dict[str, Any] = {
    "teacher": "t",
    "dataset": "d",
    "method": {"choice": ["sft", "kd"]},
    "student": {"size": {"choice": ["2-3", "2-1"]}},
    "loss": {"alpha_hidden": {"choice": [1, 3], "when": {"method": "kd"}}},
}
"""The `run` section of a space of six combinations; neither the teacher nor the data set exists."""

KILL_SPACE: dict[str, Any] = {
    "name": "killed",
    "run": {
        "method": {"choice": ["sft", "kd"]},
        "student": {"size": {"choice": ["2-3", "2-2", "2-1"]}},
        "training": {"epochs": 6, "batch_size": 8, "warmup_steps": 2, "checks_per_epoch": 2, "patience": 99},
        "decoding": {"beams": 1, "max_length": 12},
    },
    "search": {"trials": 6, "sampler": "grid"},
    "budgets": {"any": {"params_m": 100}},
}
"""A space of six short trials that lacks the teacher and the data set of `workspace.make_world`."""


def make_space(**search: Any) -> Space:
    """The space of `RUN` as a grid of six trials, with other settings of the search."""
    return Space.model_validate({"name": "s", "run": RUN, "search": {"sampler": "grid", "trials": 6, **search}})


def make_sweep(folder: Path) -> Path:
    """Write a sweep without trials, whose teacher takes 300 ms and whose budget `fast` allows half of that."""
    teacher = {"metrics": {"rouge2": 20.0}, "costs": {"latency_ms": 300.0}}
    record = {"schema": SCHEMA_VERSION, "name": folder.name, "metric": "rouge2", "teacher": teacher}
    record["budgets"] = {"fast": {"latency_ms": "50%"}}
    write_json_atomic(folder / "sweep.json", record)
    (folder / "space.yaml").write_text(f"name: {folder.name}\nrun: {{}}\n")
    return folder


def make_trial(sweep: Path, key: str, number: int, score: float, status: str | None = "done") -> Path:
    """Write the folder of a trial with two validations; a `status` of None leaves the trial running."""
    folder = sweep / "trials" / key
    run = {"name": sweep.name, "method": "kd", "student": {"size": "4-1"}, "training": {"learning_rate": 3e-4}}
    write_json_atomic(folder / "run.json", run)
    lines = [
        {"step": 10 * i, "epoch": i / 2, "time_s": 1.5 * i, "val_loss": 3.0 - i, "rouge2": score - 2 + i}
        for i in (1, 2)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
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
    change_result(folder, size=size)  # latency is pooled per size, so trials of different cost need different sizes
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
    served = []
    for beams, milliseconds in ((4, 10 * score), (1, 4 * score)):
        costs = {"latency_ms": milliseconds, "latency_ms_b1": 1.0}
        served.append({"beams": beams, "length_penalty": 1.0, "metrics": {"rouge2": score, "score": score}})
        served[-1] |= {"interval": [score - 1, score + 1], "costs": costs}
        np.savez(folder / f"rows-validation-{decoding_key(served[-1])}.npz", validation=np.full(20, score))
    hardware = {"kind": "cpu", "name": "some CPU", "cores": 4, "threads": 2}
    measurement = {"engine": "ctranslate2 int8", "hardware": hardware}
    write_json_atomic(folder / "served.json", {**measurement, "decodings": served})
    return folder


def runs_of(sweep: Path) -> dict[str, Any]:
    """The MLflow runs of a sweep by trial key ("" for the sweep's own), of which each trial has only one."""
    client = mlflow_store.make_client(mlflow_store.default_tracking_uri())
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
