"""The export of a student: complete or absent after a kill at any step; created again only if its content changed."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import ctranslate2
import mlflow
import numpy as np
import pytest

from raydistill.config.run import Decoding, Student
from raydistill.config.serving import ServingConfig
from raydistill.core import artifact
from raydistill.core.artifact import LockHeld
from raydistill.core.errors import UserError
from raydistill.evaluate import serving_options
from raydistill.inference.decoding import EngineOptions, resolve_decoding
from raydistill.inference.engines import open_engine
from raydistill.inference.shortlist import Shortlist, kept_tokens, stored_map, write_map
from raydistill.models.loading import load_config, load_generation_config, load_model
from raydistill.models.metadata import CheckpointMetadata
from raydistill.models.pruning import random_units
from raydistill.models.saving import CHECKPOINT_KIND, save_checkpoint
from raydistill.models.shrinking import plan_student, shrink
from raydistill.models.tokenization import load_tokenizer, tokens_by_id
from raydistill.results.selection import Selection, load_selection
from raydistill.results.sweep_record import ShortlistCoverage
from raydistill.tracking import export
from tests.factories.kills import kill_at_every_step
from tests.factories.models import edit_json, sentences
from tests.factories.sweeps import change_sweep, make_student, served_student, write_served


@pytest.fixture
def selection(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> Selection:
    """A sweep with one student. The files of MLflow and CTranslate2 are left out, which take seconds to create."""
    folder = make_student(sweep, "a", 0, 10.0)
    artifact.seal(folder / "best", artifact.Manifest(kind=CHECKPOINT_KIND))
    monkeypatch.setattr(export, "_add_ctranslate2_model", lambda folder, options: None)
    monkeypatch.setattr(export, "write_mlmodel", lambda folder: (folder / "MLmodel").write_text("x"))
    return load_selection(sweep)


def card(folder: Path) -> str | None:
    """The model card of a complete export; None if there is none. Fails for anything in between."""
    if not artifact.is_complete(folder):
        assert not folder.exists()
        return None
    artifact.open_artifact(folder, artifact.Manifest, "export")
    return (folder / "README.md").read_text()


@pytest.mark.parametrize("has_old", [True, False])
def test_a_kill_at_any_step_leaves_the_old_or_the_new_export(selection: Selection, has_old: bool) -> None:
    """The second export differs in its model card, which names one more budget."""
    folder = export.export_student(selection, "a b1")
    saved = shutil.copytree(folder, selection.sweep / "saved")
    old = card(folder) if has_old else None

    def prepare() -> None:
        if has_old:
            shutil.copytree(saved, folder)

    def write_new() -> None:
        export.export_student(selection, "a b1", "cheap")

    contents = kill_at_every_step(write_new, prepare, folder, card)
    # Steps: three for the lock, two for the temporary folder; open, utime and chmod for each of the six files of the
    # checkpoint, utime and chmod for the folder; five for each of generation_config.json, raydistill.json and
    # README.md, one for MLmodel; fsync of eight files and a folder, five for the manifest, the rename. Then the fsync
    # of the parent folder, the unlink of what is left, the end of the lock; after an old export also the second rename
    # and the deletion of nine files and a folder. The last value is that without a kill.
    assert contents == [old] * 56 + [contents[-1]] * (15 if has_old else 4)
    assert contents[-1] not in (old, None)


def test_an_export_is_created_again_if_weights_serving_or_card_changed_or_a_file_is_missing(
    selection: Selection,
) -> None:
    folder = export.export_student(selection, "a b1")

    def generation() -> int:
        return artifact.open_artifact(export.export_student(selection, "a b1"), artifact.Manifest, "export").generation

    assert generation() == generation() == 1
    (folder / "config.json").unlink()
    assert generation() == 2
    student = selection.student("a b1")
    changed = replace(student, metrics={**student.metrics, "params_m": 9.0})
    selection.students[selection.students.index(student)] = changed
    assert generation() == 3
    weights = selection.sweep / "trials" / "a" / "best" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert generation() == 4
    assert generation() == 4


def test_one_process_at_a_time_writes_an_export(selection: Selection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "LOCK_TIMEOUT_S", 0.1)
    folder = selection.sweep / "exports" / "a-b1"
    with artifact.lock(folder), pytest.raises(LockHeld, match="a-b1: in use by process"):
        export.export_student(selection, "a b1")
    assert not folder.exists()


def test_a_student_with_fewer_units_is_exported_with_its_conversion(sweep: Path) -> None:
    folder = make_student(sweep, "a", 0, 10.0, "4-1-ffn0.5-0.25")
    teacher, tokenizer = load_model(folder / "best"), load_tokenizer(folder / "best")
    plan = plan_student(teacher.config, Student(encoder_ffn=0.5, decoder_ffn=0.25))
    student: Any = shrink(teacher, plan, units=random_units(teacher.config, plan, seed=0))
    metadata = CheckpointMetadata.read_from(folder / "best").model_copy(update={"ffn": plan.kept_ffn})
    save_checkpoint(student, tokenizer, folder / "best")
    metadata.write_to(folder / "best")
    exported = export.export_student(load_selection(sweep), "a b1")
    text = (exported / "README.md").read_text()
    assert "4-1-ffn0.5-0.25 student" in text
    assert "| encoder feed-forward units | 16 |" in text
    assert "| decoder feed-forward units | 8 |" in text
    ids = tokenizer(["A young woman sees a red bicycle today."], return_tensors="pt")
    expected = student.generate(**ids, num_beams=1, max_length=20)[0].tolist()[1:]
    source = [tokenizer.convert_ids_to_tokens(ids.input_ids[0].tolist())]
    translator = ctranslate2.Translator(str(exported / "ctranslate2"))
    prefix = [[tokenizer.bos_token]]  # BART's forced first token, which the format does not have
    [result] = translator.translate_batch(source, target_prefix=prefix, beam_size=1, max_decoding_length=15)
    written: Any = tokenizer.convert_tokens_to_ids(result.hypotheses[0])
    assert written == expected[: len(written)]
    assert len(written) > 5


def test_plain_ctranslate2_mlflow_and_evaluate_write_the_texts_that_were_scored(sweep: Path) -> None:
    """A student in int8 with shortlist and prefix: the lines of the card, without raydistill, give the same texts."""
    checkpoint = make_student(sweep, "a", 0, 10.0) / "best"
    edit_json(checkpoint / "tokenizer_config.json", source_prefix="the city council ")
    config = ServingConfig(beams=2, length_penalty=0.6, precision="int8", shortlist=60)
    tokenizer = load_tokenizer(checkpoint)
    allowed = sorted({*range(60), *kept_tokens(tokenizer, load_config(checkpoint))})
    write_map(stored_map("list"), Shortlist(np.array(allowed)), tokens_by_id(tokenizer))
    coverage = ShortlistCoverage(
        folder="list",
        allowed_tokens=60.0,
        allowed_tokens_batch=60.0,
        share_of_tokens_outside=0.1,
        share_of_rows_outside=0.256,
    )
    change_sweep(sweep, shortlists={"60": coverage})
    variant = {"precision": config.precision, "shortlist": config.shortlist}
    write_served(sweep / "trials" / "a", served_student(2, 0.6, 10.0, {"latency_ms": 30.0}, variant))

    sources = sentences(12, seed=3)
    options = EngineOptions(precision="int8", shortlist=stored_map("list"), cache_dir=sweep / "engine")
    beam = resolve_decoding(Decoding(beams=2, length_penalty=0.6), load_generation_config(checkpoint), None, 128)
    engine = open_engine(checkpoint, "ctranslate2", options)
    scored = [h[0].text.strip() for h in engine.generate(sources, beam, max_source_tokens=32)]
    full = open_engine(checkpoint, "ctranslate2", replace(options, precision="fp32", shortlist=None))
    assert scored != [h[0].text.strip() for h in full.generate(sources, beam, max_source_tokens=32)]

    folder = export.export_student(load_selection(sweep), f"a {config.key}")
    assert folder.name == "a-b2-p0.6-int8-s60"
    card = (folder / "README.md").read_text()
    assert "25.6% of the references of the rows that students are chosen on have a token outside the list" in card
    [code] = [block for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "ctranslate2" in block]
    scope: dict[str, object] = {}
    exec(code.replace("FOLDER", str(folder)).replace('["a text", "another text"]', repr(sources)), scope)
    assert scope["outputs"] == scored
    assert mlflow.pyfunc.load_model(str(folder)).predict(sources) == scored
    evaluated = serving_options(str(folder), EngineOptions())
    assert (evaluated.precision, evaluated.shortlist) == ("int8", folder / "vmap.txt")
    serving = CheckpointMetadata.read_from(folder).serving
    assert serving is not None
    assert serving.config == config
    assert serving.ctranslate2 is not None
    assert serving.ctranslate2.source_prefix == "the city council "
    assert (folder / "ctranslate2" / "vmap.txt").read_bytes() == stored_map("list").read_bytes()
    shutil.rmtree(stored_map("list").parent)
    with pytest.raises(UserError, match="the shortlist was deleted; run the sweep again"):
        export.export_student(load_selection(sweep), f"a {config.key}")
