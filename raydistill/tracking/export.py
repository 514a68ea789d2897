"""Export a student as one folder that transformers, CTranslate2 and MLflow can load."""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from raydistill.config.serving import CTranslate2Serving, ServingConfig, ServingRecord, ThroughputSetting
from raydistill.core import artifact
from raydistill.core.artifact import MANIFEST, Manifest
from raydistill.core.console import print_progress
from raydistill.core.errors import UserError
from raydistill.core.files import check_symlinks, read_json, write_atomic, write_json_atomic
from raydistill.core.hashing import content_hash
from raydistill.inference.ctranslate2_conversion import CTranslate2Unavailable, ensure_converted
from raydistill.inference.ctranslate2_engine import describe_serving
from raydistill.inference.decoding import EngineOptions
from raydistill.inference.shortlist import MAP_FILE, restrict_map, stored_map
from raydistill.models.fingerprints import settings_fingerprint, weights_fingerprint
from raydistill.models.metadata import CheckpointMetadata
from raydistill.models.tokenization import (
    line_break,
    load_tokenizer,
    resolve_languages,
    source_limit,
    tokens_by_id,
)
from raydistill.results.records import Trial, repeat_trial_remedy
from raydistill.results.selection import Selection
from raydistill.tracking.checkpoints import download_checkpoint
from raydistill.tracking.mlflow_registry import write_mlmodel
from raydistill.tracking.model_card import render_model_card

KIND = "export"
LOCK_TIMEOUT_S = 600.0  # the conversion of a large model takes minutes
CTRANSLATE2_FOLDER = "ctranslate2"


def export_student(selection: Selection, key: str, budget: str | None = None) -> Path:
    """Write SWEEP/exports/STUDENT and return its path.

    The folder holds the checkpoint with its chosen decoding as the default, a model card, MLflow's `MLmodel`, the
    vocabulary map if the student is served with a shortlist, and `ctranslate2/` if CTranslate2 supports the model. Its
    raydistill.json holds the serving record. The folder is an artifact; an export with equal content is kept.

    Args:
        selection: The sweep.
        key: Key of the student.
        budget: Name of a budget that is not stored in the sweep, for the model card.

    Raises:
        UserError: The student's checkpoint or its shortlist was deleted.
        LockHeld: Another process is writing the export.
    """
    student = download_checkpoint(selection.student(key))
    if student.checkpoint is None:
        raise UserError(
            f"{student.folder}: the checkpoint was deleted, so that the student cannot be exported. "
            f"{repeat_trial_remedy(student.folder)}"
        )
    export_folder = selection.export_folder(key)
    budgets = list(dict.fromkeys([*selection.budgets_of(key), *([budget] if budget else [])]))
    card = render_model_card(selection, student, budgets)
    config = student.serving or _unserved_config(selection, student.checkpoint)
    vocabulary_map = _find_map(selection, config)
    content_key = _content_key(config, student.checkpoint, vocabulary_map, card)
    with artifact.lock(export_folder, LOCK_TIMEOUT_S, print_progress):
        existing = artifact.open_if_whole(export_folder, Manifest, KIND)
        if existing is None or existing.key != content_key:
            check_symlinks(student.checkpoint)
            with artifact.build(export_folder, lambda: Manifest(kind=KIND, key=content_key)) as folder:
                ignore = shutil.ignore_patterns(MANIFEST)  # the export has a manifest of its own, written last
                shutil.copytree(student.checkpoint, folder, dirs_exist_ok=True, ignore=ignore)
                _write_serving(folder, config, vocabulary_map, _Threads.of(selection, student))
                write_mlmodel(folder)
                write_atomic(folder / "README.md", card.encode())
    return export_folder


def _unserved_config(selection: Selection, checkpoint: Path) -> ServingConfig:
    """The configuration of a checkpoint that was not served yet: the decoding and precision of its validation."""
    own = CheckpointMetadata.read_from(checkpoint).decoding or {}
    fields = {name: own.get(name, 1) for name in ("beams", "length_penalty")}
    return ServingConfig.model_validate({**fields, "precision": selection.teacher.precision})


def _find_map(selection: Selection, config: ServingConfig) -> Path | None:
    """The vocabulary map of the sweep for a configuration; None without a shortlist."""
    if config.shortlist == "off":
        return None
    coverage = selection.record.shortlists.get(str(config.shortlist))
    if coverage is None:
        raise UserError(f"the sweep has no shortlist {config.shortlist} any more; add it to serving.shortlist again")
    path = stored_map(coverage.folder)
    if not path.is_file():
        raise UserError(f"{path}: the shortlist was deleted; run the sweep again to make it again")
    return path


def _content_key(config: ServingConfig, checkpoint: Path, vocabulary_map: Path | None, card: str) -> str:
    """The key of an export: a SHA-256 over weights, settings, metadata, serving configuration, shortlist and card."""
    content = {
        "weights": weights_fingerprint(checkpoint),
        "settings": settings_fingerprint(checkpoint),
        "metadata": CheckpointMetadata.read_from(checkpoint).to_json(),
        "serving": config.model_dump(),
        "shortlist": hashlib.sha256(vocabulary_map.read_bytes()).hexdigest() if vocabulary_map else None,
        "card": card,
    }
    return content_hash(content)


@dataclass(frozen=True)
class _Threads:
    """The CPU threads of a single batch, and the threads and batches of many rows; None if not measured."""

    batch: int | None
    many_rows: ThroughputSetting | None

    @classmethod
    def of(cls, selection: Selection, student: Trial) -> Self:
        """The measured threads of a student."""
        on_cpu = selection.teacher.machine.get("kind") == "cpu"
        return cls(selection.teacher.threads if on_cpu else None, selection.throughput_setting(student))


def _write_serving(folder: Path, config: ServingConfig, vocabulary_map: Path | None, threads: _Threads) -> None:
    """Write decoding, shortlist, converted model and serving record, so that every reader serves as measured."""
    metadata = CheckpointMetadata.read_from(folder)
    run = metadata.config
    assert run is not None
    _write_decoding(folder, config)
    languages = resolve_languages(run.teacher, run.dataset)
    tokenizer = load_tokenizer(folder, languages)
    if vocabulary_map is not None:
        tokens = tokens_by_id(tokenizer)
        restricted = restrict_map(vocabulary_map, tokens, folder)
        if restricted == vocabulary_map:
            shutil.copy(vocabulary_map, folder / MAP_FILE)
    options = EngineOptions(
        precision=config.precision, languages=languages, shortlist=folder / MAP_FILE if vocabulary_map else None
    )
    serving = ServingRecord(
        config=config,
        max_source_tokens=source_limit(str(run.teacher), run.dataset, folder),
        languages=languages,
        line_break=line_break(tokenizer),
        vocabulary_map=MAP_FILE if vocabulary_map else None,
        ctranslate2=_add_ctranslate2_model(folder, options),
        threads=threads.batch,
        throughput=threads.many_rows,
    )
    decoding = {**(metadata.decoding or {}), "beams": config.beams, "length_penalty": config.length_penalty}
    metadata.model_copy(update={"serving": serving, "decoding": decoding}).write_to(folder)


def _write_decoding(folder: Path, config: ServingConfig) -> None:
    """Make the chosen decoding the default of generation_config.json."""
    path = folder / "generation_config.json"
    generation: dict[str, Any] = read_json(path)
    generation |= {"num_beams": config.beams, "length_penalty": config.length_penalty}
    if config.beams == 1:  # transformers warns about unused beam search settings
        generation.pop("length_penalty")
        generation.pop("early_stopping", None)
    write_json_atomic(path, generation)


def _add_ctranslate2_model(folder: Path, options: EngineOptions) -> CTranslate2Serving | None:
    """Write the validated CTranslate2 conversion to `ctranslate2/`, if CTranslate2 supports the model.

    A vocabulary map is copied into the folder of the conversion, where every CTranslate2 program finds it.
    """
    scratch = folder / ".ctranslate2"  # in the artifact's temporary folder, so that no kill leaves it behind
    target = folder / CTRANSLATE2_FOLDER
    try:
        converted = ensure_converted(folder, load_tokenizer(folder, options.languages), scratch, 1, None)
        shutil.copytree(converted, target, ignore=shutil.ignore_patterns(MANIFEST))
    except CTranslate2Unavailable:
        return None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if options.shortlist is not None:
        shutil.copy(options.shortlist, target / MAP_FILE)
    return describe_serving(target, folder, options)
