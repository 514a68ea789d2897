"""Named teachers of each family by the commands: a label job, and a sweep to an exported choice."""

from pathlib import Path

import pytest
import yaml

from raydistill.config.presets import TEACHERS
from raydistill.models.tokenization import load_tokenizer, source_prefix
from tests.factories.models import LANGUAGES, lay_out_model, save_tiny
from tests.factories.workspace import command, last_json, write_corpus

FAMILIES = ("mbart50", "m2m100", "nllb", "madlad400")
LANGUAGES_OF = {**LANGUAGES, "madlad400": ("en", "ro")}


def write_space(path: Path, teacher: str, data: Path, num_tokens: int) -> Path:
    """A space of two short trials with vocabularies of `num_tokens`, and a budget that both fit.

    The random teachers may repeat a word in more than half of their outputs, and so may their students.
    """
    dataset = {"name": str(data), "max_source_tokens": 32, "max_target_tokens": 16, "selection_share": 0}
    run = {
        "teacher": teacher,
        "dataset": {**dataset, "languages": list(LANGUAGES_OF[teacher])},
        "method": "kd",
        "student": {"size": {"choice": ["2-2", "2-1"]}, "vocabulary": num_tokens},
        "training": {"epochs": 6, "batch_size": 8, "warmup_steps": 2, "checks_per_epoch": 2, "patience": 99},
        "decoding": {"beams": 1, "max_length": 12},
        "evaluation": {"allow_repetitive_teacher": True},
    }
    search = {"trials": 2, "sampler": "grid"}
    serving = {"beams": [1], "precision": ["fp32"]}
    space = {"name": "named", "run": run, "search": search, "serving": serving, "budgets": {"any": {"params_m": 100}}}
    path.write_text(yaml.safe_dump(space))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_named_teacher_labels_and_is_distilled_to_an_exported_choice(family, tmp_path):
    [preset] = TEACHERS[family].values()
    lay_out_model(tmp_path / "hub", preset.hub, save_tiny(family, tmp_path / "teacher", dropout=0.0), preset.revision)
    data, home = write_corpus(tmp_path / "data"), tmp_path / "outputs"
    hub = {"HF_HUB_CACHE": str(tmp_path / "hub")}
    arguments = ("--teacher", family, "--dataset", data, "--languages", *LANGUAGES_OF[family], "--beams", 2)
    labels = last_json(command(home, "pseudolabel", *arguments, "--allow-repetitive", "--json", **hub))
    assert labels["rows"] == 48
    assert labels["languages"] == list(LANGUAGES_OF[family])
    num_tokens = len(load_tokenizer(tmp_path / "teacher")) - 10
    space = write_space(tmp_path / "named.yaml", family, data, num_tokens)
    summary = last_json(command(home, "sweep", space, "--json", **hub))
    assert [trial["status"] for trial in summary["trials"]] == ["done", "done"]
    [exported] = map(Path, summary["exports"].values())
    assert (exported / "ctranslate2" / "model.bin").is_file()
    tokenizer = load_tokenizer(exported)
    if family in LANGUAGES:
        assert (tokenizer.src_lang, tokenizer.tgt_lang) == LANGUAGES[family]
    assert source_prefix(tokenizer) == ("<2ro> " if family == "madlad400" else "")
    assert len(tokenizer) <= num_tokens
