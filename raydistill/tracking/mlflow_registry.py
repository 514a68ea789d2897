"""Register chosen students as versions of an MLflow model, with an alias for each budget."""

import hashlib
import shutil
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from raydistill.config.space import mlflow_alias
from raydistill.core.artifact import MANIFEST
from raydistill.core.errors import UserError
from raydistill.data.card import public_name
from raydistill.results.front_data import student_facts
from raydistill.results.records import Trial
from raydistill.results.selection import Selection, load_selection
from raydistill.tracking.mlflow_runs import find_run, metric_key, publish_lock, publish_locked
from raydistill.tracking.mlflow_store import (
    check_tracking,
    configure_mlflow,
    make_client,
    translate_mlflow_errors,
    ui_address,
)

CARD_TAG = "raydistill.card"  # SHA-256 of the README.md among a version's files
MLFLOW_FILES = (
    *("MLmodel", "requirements.txt", "python_env.yaml", "conda.yaml"),
    *("input_example.json", "serving_input_example.json"),
)
INPUT_EXAMPLE = ["a text", "another text"]
# The packages that a served student imports; raydistill itself is not on PyPI.
SERVING_PACKAGES = (
    *("torch", "transformers", "ctranslate2", "safetensors", "sentencepiece", "tokenizers", "huggingface_hub"),
    *("numpy", "pydantic", "pyyaml", "filelock"),
)
# Arguments of `inference.mlflow_pyfunc`; MLflow lets a user override only the keys listed here.
MODEL_CONFIG = {"device": "auto", "threads": "auto"}


@dataclass(frozen=True)
class RegisteredVersion:
    """A version of a registered model; MLflow loads and downloads it by its `uri`, and shows it at its `url`."""

    name: str
    version: str
    alias: str
    uri: str
    url: str


def register_choice(sweep: Path, student_key: str, budget_name: str, export_folder: Path) -> RegisteredVersion:
    """Register an exported student as a version of the model named after the sweep, with an alias for the budget.

    Repeating the call creates no new version, and choosing another student moves the alias. The sweep is published
    first if the student's trial is not in MLflow yet.

    Args:
        sweep: The sweep's folder.
        student_key: Key of the student in the sweep's `Selection`.
        budget_name: The budget's name, from which the alias is made.
        export_folder: The exported student, whose files become the version's artifacts.

    Raises:
        UserError: The student has no checkpoint.
        TrackingUnavailable: The store failed.
    """
    with publish_lock(sweep):
        selection = load_selection(sweep)
        student = next((student for student in selection.students if student.key == student_key), None)
        if student is None or student.checkpoint is None:
            raise UserError(f"{sweep}: {student_key} has no finished checkpoint to register")
        uri = selection.record.tracking_uri
        run = _published_run(selection, student, uri)
        with translate_mlflow_errors(uri):
            client, name, alias = make_client(uri), selection.name, mlflow_alias(budget_name)
            version = _get_or_create_version(client, name, run, export_folder)
            client.update_model_version(name, version, _describe_version(selection, student))
            for tag, value in _version_tags(selection, student).items():
                client.set_model_version_tag(name, version, tag, value)
            client.set_registered_model_alias(name, alias, version)
    url = f"{ui_address(uri)}/#/models/{name}/versions/{version}"
    return RegisteredVersion(name, version, alias, f"models:/{name}@{alias}", url)


def write_mlmodel(folder: Path) -> None:
    """Add MLflow's files to an exported student, so that `mlflow.pyfunc.load_model` and `mlflow models` read it.

    The files are `MLmodel`, which holds `MODEL_CONFIG` and the signature (texts in, texts out), an example of the
    input, and the description of an environment with the installed versions of `SERVING_PACKAGES`.
    """
    configure_mlflow()
    from mlflow import pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, Schema

    # Local version labels such as 2.13.0+cpu do not exist on PyPI
    pins = [f"{name}=={metadata.version(name).partition('+')[0]}" for name in SERVING_PACKAGES]
    with tempfile.TemporaryDirectory() as scratch:  # save_model requires a folder that does not exist yet
        model = Path(scratch) / "model"
        texts = Schema([ColSpec("string")])
        pyfunc.save_model(
            model,
            loader_module="raydistill.inference.mlflow_pyfunc",
            pip_requirements=pins,
            model_config=MODEL_CONFIG,
            signature=ModelSignature(inputs=texts, outputs=texts),
            input_example=INPUT_EXAMPLE,
        )
        for file in MLFLOW_FILES:
            shutil.copy(model / file, folder)


def _published_run(selection: Selection, student: Trial, uri: str) -> Any:
    """The MLflow run of the student's trial; publishes the sweep if the run is not complete."""
    key = student.folder.name
    check_tracking(uri)
    with translate_mlflow_errors(uri):
        run = find_run(selection, key, uri)
    if run is None or run.data.tags.get("raydistill.done") != "1":
        publish_locked(selection.sweep, finished=selection.record.status == "finished")
        with translate_mlflow_errors(uri):
            run = find_run(selection, key, uri)
    return run


def _describe_version(selection: Selection, student: Trial) -> str:
    """The description of a model version: scores, latency, speed-ups and size, one per line, and the reason."""
    facts = "\n".join(f"- {name}: {value}" for name, value in student_facts(selection, student) if name != "export")
    reasons = [
        f"Chosen for {budget}: {selection.choices[budget].reason}" for budget in selection.budgets_of(student.key)
    ]
    parts = [f"{student.label} of `{public_name(selection.teacher.name)}`", facts, *reasons]
    return "\n\n".join(parts)


def _version_tags(selection: Selection, student: Trial) -> dict[str, str]:
    """The tags of a model version; what is unknown is left out."""
    tags = {
        "size": student.size,
        "method": student.method,
        "metric": selection.metric,
        "score": student.score(selection.metric),
        **{metric_key(name): student.metrics.get(name) for name in selection.metrics.reported},
        "split": student.split,
        "latency_ms": student.metrics.get("latency_ms"),
        "params_m": student.metrics.get("params_m"),
        "measured_with": selection.measured_with(student),
        "tolerance": selection.record.tolerance,
        "serving": student.serving.label if student.serving else None,
        "speedup": student.metrics.get("speedup"),
        "speedup_same_serving": student.metrics.get("speedup_same_serving"),
        "trial": student.folder.name,
    }
    return {name: str(value) for name, value in tags.items() if value is not None}


def _get_or_create_version(client: Any, model_name: str, run: Any, export_folder: Path) -> str:
    """The model version of this export of this run, with the export's current model card."""
    _ensure_registered_model(client, model_name)
    run_id, source = run.info.run_id, f"{run.info.artifact_uri}/{export_folder.name}"
    card_digest = hashlib.sha256((export_folder / "README.md").read_bytes()).hexdigest()
    versions = [v for v in client.search_model_versions(f"name = '{model_name}'") if v.source == source]
    if not versions:
        client.log_artifacts(run_id, str(export_folder), export_folder.name)
        tags = {CARD_TAG: card_digest}
        created = client.create_model_version(model_name, source, run_id=run_id, await_creation_for=0, tags=tags)
        return str(created.version)
    version = str(versions[0].version)
    # The folder's name identifies weights and serving configuration, so that only the text files can have changed
    if versions[0].tags.get(CARD_TAG) != card_digest:
        for file in ("README.md", MANIFEST, *MLFLOW_FILES):
            client.log_artifact(run_id, str(export_folder / file), export_folder.name)
        client.set_model_version_tag(model_name, version, CARD_TAG, card_digest)
    return version


def _ensure_registered_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(name, description="Students chosen by raydistill, with an alias per budget")
