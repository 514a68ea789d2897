"""Chosen students as versions of a registered MLflow model, with an alias for each budget."""

import hashlib
import shutil
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from raydistill.config.space import mlflow_alias
from raydistill.core.errors import UserError
from raydistill.results.records import decoding_label
from raydistill.results.selection import load_selection
from raydistill.tracking.mlflow_runs import (
    FetchCheckpoint,
    find_run,
    publish_lock,
    publish_locked,
    resolve_tracking_uri,
)
from raydistill.tracking.mlflow_store import check_tracking, configure_mlflow, make_client, translate_mlflow_errors

CARD_TAG = "raydistill.card"  # which README.md a version's files have
MLFLOW_FILES = ("MLmodel", "requirements.txt", "python_env.yaml", "conda.yaml")
# What a served student imports. raydistill itself is in no index that pip could take it from.
SERVING_PACKAGES = (
    *("torch", "transformers", "ctranslate2", "safetensors", "sentencepiece", "tokenizers", "huggingface_hub"),
    *("numpy", "pydantic", "pyyaml", "filelock"),
)
MODEL_CONFIG = {"device": "auto", "threads": "all"}  # what `model.served` takes; MLflow lets a person change no others


@dataclass(frozen=True)
class RegisteredVersion:
    """A version of a registered model; `uri` is what MLflow loads or downloads it by."""

    name: str
    version: str
    alias: str
    uri: str


def register_choice(
    sweep: Path,
    student_key: str,
    budget_name: str,
    export_folder: Path,
    tracking_uri: str | None = None,
    fetch: FetchCheckpoint | None = None,
) -> RegisteredVersion:
    """Register a student as a version of the model named like the sweep, with an alias for the budget.

    `export_folder` is the folder to hand over; it becomes the version's source, in a form that MLflow loads and
    serves too.
    Repeating it makes no new version; choosing another student moves the alias. Publishes the sweep first if its
    trial is not yet in MLflow, with `fetch` as `publish` has it. UserError for a student that has no checkpoint.
    """
    with publish_lock(sweep):
        return _register_locked(sweep, student_key, budget_name, export_folder, tracking_uri, fetch)


def _register_locked(
    sweep: Path,
    student_key: str,
    budget_name: str,
    export_folder: Path,
    tracking_uri: str | None,
    fetch: FetchCheckpoint | None,
) -> RegisteredVersion:
    found = load_selection(sweep)
    trial = next((t for t in found.students if t.key == student_key), None)
    if trial is None or trial.checkpoint is None:
        raise UserError(f"{sweep}: {student_key} has no finished checkpoint to register")
    key = trial.folder.name
    uri = resolve_tracking_uri(found, tracking_uri)
    check_tracking(uri)
    with translate_mlflow_errors(uri):
        client = make_client(uri)
        run = find_run(client, found, key, uri)
    if run is None or run.data.tags.get("raydistill.done") != "1":
        publish_locked(sweep, uri, finished=found.record.get("status") not in (None, "running"), fetch=fetch)
    with translate_mlflow_errors(uri):
        run = find_run(client, found, key, uri)
        version = _get_or_create_version(client, found.name, run, export_folder)
        tags = {"size": trial.size, "method": trial.method, "score": trial.score(found.metric)}
        tags |= {"metric": found.metric, "latency_ms": trial.metrics.get("latency_ms"), "trial": key}
        tags |= {"params_m": trial.metrics.get("params_m"), "measured_with": found.measured_with(trial) or None}
        tags |= {"decoding": decoding_label(trial.decoding) if trial.decoding else None}
        for name, value in tags.items():
            if value is not None:
                client.set_model_version_tag(found.name, version, name, str(value))
        alias = mlflow_alias(budget_name)
        client.set_registered_model_alias(found.name, alias, version)
    return RegisteredVersion(found.name, version, alias, f"models:/{found.name}@{alias}")


def _get_or_create_version(client: Any, model_name: str, run: Any, export_folder: Path) -> str:
    """The model version made from this export of this run, which is made if there is none; with its present card."""
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(model_name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(model_name, description="Students chosen by raydistill, an alias per budget")
    run_id, source = run.info.run_id, f"{run.info.artifact_uri}/{export_folder.name}"
    card = hashlib.sha256((export_folder / "README.md").read_bytes()).hexdigest()
    known = [one for one in client.search_model_versions(f"name = '{model_name}'") if one.source == source]
    if not known:
        client.log_artifacts(run_id, str(export_folder), export_folder.name)
        made = client.create_model_version(
            model_name, source, run_id=run_id, await_creation_for=0, tags={CARD_TAG: card}
        )
        return str(made.version)
    if known[0].tags.get(CARD_TAG) != card:  # of an export only its texts change: weights and decoding are its name
        for file in ("README.md", *MLFLOW_FILES):
            client.log_artifact(run_id, str(export_folder / file), export_folder.name)
        client.set_model_version_tag(model_name, known[0].version, CARD_TAG, card)
    return str(known[0].version)


def write_mlmodel(folder: Path) -> None:
    """Make a folder to hand over one that MLflow loads: `mlflow.pyfunc.load_model` and `mlflow models`.

    Beside `MLmodel` with `MODEL_CONFIG` come MLflow's files of an environment, with the versions of
    `SERVING_PACKAGES` here.
    """
    configure_mlflow()
    from mlflow import pyfunc

    pins = [
        f"{name}=={metadata.version(name).partition('+')[0]}" for name in SERVING_PACKAGES
    ]  # PyPI has no torch 2.13.0+cpu
    with tempfile.TemporaryDirectory() as scratch:  # save_model wants a folder of its own
        made = Path(scratch) / "made"
        pyfunc.save_model(
            made, loader_module="raydistill.inference.mlflow_pyfunc", pip_requirements=pins, model_config=MODEL_CONFIG
        )
        for file in MLFLOW_FILES:
            shutil.copy(made / file, folder)
