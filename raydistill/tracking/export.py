"""A chosen student as it is handed over: one folder that transformers, CTranslate2 and MLflow all read."""

import json
import shutil
from pathlib import Path
from typing import Any

from raydistill.cluster import sync
from raydistill.config.presets import teacher_preset
from raydistill.config.run import Run
from raydistill.core.errors import UserError
from raydistill.core.files import CARD, check_links, read_json, write_atomic, write_json_atomic
from raydistill.inference.ctranslate2_conversion import RefusedError, converted
from raydistill.models.loading import languages_of, load_config, load_tokenizer, max_tokens
from raydistill.results.records import Trial
from raydistill.results.selection import Outcome
from raydistill.tracking.mlflow_registry import write_mlmodel
from raydistill.tracking.model_card import model_card
from raydistill.training.run_folder import making


def export(found: Outcome, key: str, budget: str | None = None) -> Path:
    """SWEEP/exports/STUDENT: the checkpoint with its chosen decoding, a model card, MLflow's `MLmodel`, `ctranslate2/`.

    The last is left out where CTranslate2 does not load the model. Made once; made anew where the card would say
    something else (scores of more trials, other budgets). `budget` is the name of one that is not the sweep's own.
    UserError for a student whose checkpoint is gone.
    """
    student = found.student(key)
    if student.checkpoint is None:
        raise UserError(f"{student.folder}: its checkpoint was deleted; there is nothing to hand over")
    sync.fetch(student.checkpoint)
    place = found.sweep / "exports" / key.replace(" ", "-")
    budgets = [name for name, chosen in found.chosen.items() if chosen == key]
    card = model_card(found, student, list(dict.fromkeys([*budgets, *([budget] if budget else [])])))
    whole = (place / "README.md").is_file() and (place / "MLmodel").is_file()
    if whole and (place / "README.md").read_text(encoding="utf-8") == card:
        return place
    place.parent.mkdir(exist_ok=True)
    check_links(student.checkpoint)
    with making(place) as folder:
        shutil.copytree(student.checkpoint, folder)
        _set_decoding(folder, student)
        _add_ctranslate2(folder)
        write_mlmodel(folder)
        write_atomic(folder / "README.md", card.encode())
    return place


def _set_decoding(folder: Path, student: Trial) -> None:
    """The chosen decoding into generation_config.json and the card, so that every reader decodes as was measured."""
    card = read_json(folder / CARD)
    run = Run.model_validate(card["config"])
    preset = teacher_preset(str(run.teacher), run.dataset.name)
    card["max_source_tokens"] = max_tokens("max_source_tokens", run.dataset, preset, load_config(folder))
    card["languages"] = languages_of(run.teacher, run.dataset)
    if student.decoding:
        path = folder / "generation_config.json"
        generation: dict[str, Any] = read_json(path)
        generation |= {"num_beams": student.decoding["beams"], "length_penalty": student.decoding["length_penalty"]}
        if student.decoding["beams"] == 1:  # transformers warns of settings that only beam search reads
            generation.pop("length_penalty")
            generation.pop("early_stopping", None)
        write_json_atomic(path, generation)
        card["decoding"] |= student.decoding
    write_json_atomic(folder / CARD, card)


def _add_ctranslate2(folder: Path) -> None:
    """`ctranslate2/`: the conversion that proved itself; none where CTranslate2 cannot load this model."""
    languages = json.loads((folder / CARD).read_text(encoding="utf-8"))["languages"]
    scratch = folder.with_name(f"{folder.name}.ctranslate2")
    try:
        made = converted(folder, load_tokenizer(folder, tuple(languages) if languages else None), scratch, 1, None)
        shutil.copytree(made, folder / "ctranslate2")
    except RefusedError:
        return
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
