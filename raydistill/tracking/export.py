"""A chosen student as it is handed over: one folder that transformers, CTranslate2 and MLflow all read."""

import json
import shutil
from pathlib import Path
from typing import Any

from raydistill.cluster import sync
from raydistill.config.presets import teacher_preset
from raydistill.config.run import Run
from raydistill.core.errors import UserError
from raydistill.core.files import (
    CHECKPOINT_METADATA,
    atomic_dir,
    check_symlinks,
    read_json,
    write_atomic,
    write_json_atomic,
)
from raydistill.inference.ctranslate2_conversion import CTranslate2Unavailable, ensure_converted
from raydistill.models.loading import load_config, load_tokenizer, resolve_languages, resolve_max_tokens
from raydistill.results.records import Trial
from raydistill.results.selection import Selection
from raydistill.tracking.mlflow_registry import write_mlmodel
from raydistill.tracking.model_card import render_model_card


def export_student(selection: Selection, key: str, budget: str | None = None) -> Path:
    """SWEEP/exports/STUDENT: the checkpoint with its chosen decoding, a model card, MLflow's `MLmodel`, `ctranslate2/`.

    The last is left out where CTranslate2 does not load the model. Made once; made anew where the card would say
    something else (scores of more trials, other budgets). `budget` is the name of one that is not the sweep's own.
    UserError for a student whose checkpoint is gone.
    """
    student = selection.student(key)
    if student.checkpoint is None:
        raise UserError(f"{student.folder}: its checkpoint was deleted; there is nothing to hand over")
    sync.pull(student.checkpoint)
    place = selection.sweep / "exports" / key.replace(" ", "-")
    budgets = [name for name, chosen in selection.chosen_keys.items() if chosen == key]
    card = render_model_card(selection, student, list(dict.fromkeys([*budgets, *([budget] if budget else [])])))
    whole = (place / "README.md").is_file() and (place / "MLmodel").is_file()
    if whole and (place / "README.md").read_text(encoding="utf-8") == card:
        return place
    place.parent.mkdir(exist_ok=True)
    check_symlinks(student.checkpoint)
    with atomic_dir(place) as folder:
        shutil.copytree(student.checkpoint, folder)
        _write_decoding(folder, student)
        _add_ctranslate2_model(folder)
        write_mlmodel(folder)
        write_atomic(folder / "README.md", card.encode())
    return place


def _write_decoding(folder: Path, student: Trial) -> None:
    """The chosen decoding into generation_config.json and the card, so that every reader decodes as was measured."""
    card = read_json(folder / CHECKPOINT_METADATA)
    run = Run.model_validate(card["config"])
    preset = teacher_preset(str(run.teacher), run.dataset.name)
    card["max_source_tokens"] = resolve_max_tokens("max_source_tokens", run.dataset, preset, load_config(folder))
    card["languages"] = resolve_languages(run.teacher, run.dataset)
    if student.decoding:
        path = folder / "generation_config.json"
        generation: dict[str, Any] = read_json(path)
        generation |= {"num_beams": student.decoding["beams"], "length_penalty": student.decoding["length_penalty"]}
        if student.decoding["beams"] == 1:  # transformers warns of settings that only beam search reads
            generation.pop("length_penalty")
            generation.pop("early_stopping", None)
        write_json_atomic(path, generation)
        card["decoding"] |= student.decoding
    write_json_atomic(folder / CHECKPOINT_METADATA, card)


def _add_ctranslate2_model(folder: Path) -> None:
    """`ctranslate2/`: the conversion that proved itself; none where CTranslate2 cannot load this model."""
    languages = json.loads((folder / CHECKPOINT_METADATA).read_text(encoding="utf-8"))["languages"]
    scratch = folder.with_name(f"{folder.name}.ctranslate2")
    try:
        made = ensure_converted(
            folder, load_tokenizer(folder, tuple(languages) if languages else None), scratch, 1, None
        )
        shutil.copytree(made, folder / "ctranslate2")
    except CTranslate2Unavailable:
        return
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
