"""Export a student as one folder that transformers, CTranslate2 and MLflow can load."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from raydistill.config.presets import teacher_preset
from raydistill.core import artifact
from raydistill.core.artifact import MANIFEST, Manifest
from raydistill.core.console import print_progress
from raydistill.core.errors import UserError
from raydistill.core.files import check_symlinks, read_json, write_atomic, write_json_atomic
from raydistill.inference.ctranslate2_conversion import CTranslate2Unavailable, ensure_converted
from raydistill.models.fingerprints import settings_fingerprint, weights_fingerprint
from raydistill.models.loading import load_config
from raydistill.models.metadata import CheckpointMetadata
from raydistill.models.tokenization import load_tokenizer, resolve_languages, resolve_max_tokens
from raydistill.results.records import Trial, repeat_trial_remedy
from raydistill.results.selection import Selection
from raydistill.tracking.checkpoints import download_checkpoint
from raydistill.tracking.mlflow_registry import write_mlmodel
from raydistill.tracking.model_card import render_model_card

KIND = "export"
LOCK_TIMEOUT_S = 600.0  # the conversion of a large model takes minutes


def export_student(selection: Selection, key: str, budget: str | None = None) -> Path:
    """Write SWEEP/exports/STUDENT and return its path.

    The folder holds the checkpoint with its chosen decoding as the default, a model card, MLflow's `MLmodel`, and
    `ctranslate2/` if CTranslate2 supports the model. The folder is an artifact; one with the same content is kept.

    Args:
        selection: The sweep.
        key: Key of the student.
        budget: Name of a budget that is not stored in the sweep, for the model card.

    Raises:
        UserError: The student's checkpoint was deleted.
        LockHeld: Another process is writing the export.
    """
    student = download_checkpoint(selection.student(key))
    if student.checkpoint is None:
        raise UserError(
            f"{student.folder}: the checkpoint was deleted, so that the student cannot be exported. "
            f"{repeat_trial_remedy(student.folder)}"
        )
    export_folder = selection.sweep / "exports" / key.replace(" ", "-")
    budgets = list(dict.fromkeys([*selection.budgets_of(key), *([budget] if budget else [])]))
    card = render_model_card(selection, student, budgets)
    content_key = _content_key(student, student.checkpoint, card)
    with artifact.lock(export_folder, LOCK_TIMEOUT_S, print_progress):
        existing = artifact.open_if_whole(export_folder, Manifest, KIND)
        if existing is None or existing.key != content_key:
            check_symlinks(student.checkpoint)
            with artifact.build(export_folder, lambda: Manifest(kind=KIND, key=content_key)) as folder:
                shutil.copytree(student.checkpoint, folder, dirs_exist_ok=True)
                _write_decoding(folder, student)
                _add_ctranslate2_model(folder)
                write_mlmodel(folder)
                write_atomic(folder / "README.md", card.encode())
    return export_folder


def _content_key(student: Trial, checkpoint: Path, card: str) -> str:
    """The key of an export: a SHA-256 over weights, settings and metadata of the checkpoint, decoding and card."""
    content = {
        "weights": weights_fingerprint(checkpoint),
        "settings": settings_fingerprint(checkpoint),
        "metadata": CheckpointMetadata.read_from(checkpoint).to_json(),
        "decoding": student.decoding.model_dump() if student.decoding else None,
        "card": card,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _write_decoding(folder: Path, student: Trial) -> None:
    """Write the chosen decoding to generation_config.json and raydistill.json, so that every reader uses it."""
    metadata = CheckpointMetadata.read_from(folder)
    run = metadata.config
    assert run is not None
    preset = teacher_preset(str(run.teacher), run.dataset.name)
    changes: dict[str, Any] = {
        "max_source_tokens": resolve_max_tokens("max_source_tokens", run.dataset, preset, load_config(folder)),
        "languages": resolve_languages(run.teacher, run.dataset),
    }
    if student.decoding:
        path = folder / "generation_config.json"
        generation: dict[str, Any] = read_json(path)
        generation |= {"num_beams": student.decoding.beams, "length_penalty": student.decoding.length_penalty}
        if student.decoding.beams == 1:  # transformers warns about unused beam search settings
            generation.pop("length_penalty")
            generation.pop("early_stopping", None)
        write_json_atomic(path, generation)
        changes["decoding"] = {**(metadata.decoding or {}), **student.decoding.model_dump()}
    metadata.model_copy(update=changes).write_to(folder)


def _add_ctranslate2_model(folder: Path) -> None:
    """Write the validated CTranslate2 conversion to `ctranslate2/`, if CTranslate2 supports the model."""
    tokenizer = load_tokenizer(folder, CheckpointMetadata.read_from(folder).languages)
    scratch = folder / ".ctranslate2"  # in the artifact's temporary folder, so that no kill leaves it behind
    try:
        converted = ensure_converted(folder, tokenizer, scratch, 1, None)
        shutil.copytree(converted, folder / "ctranslate2", ignore=shutil.ignore_patterns(MANIFEST))
    except CTranslate2Unavailable:
        return
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
