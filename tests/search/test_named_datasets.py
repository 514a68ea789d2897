"""The named data sets with named teachers by the commands: rows that cannot be used, line breaks, and one decoding.

The caches have the formats of the hub. The teachers keep their decoding in config.json, as older checkpoints do, and
have no generation_config.json.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from raydistill.config.presets import DATASETS, TEACHERS
from raydistill.label_sets.label_set import read_label_set
from tests.factories.hub_cache import lay_out_dataset
from tests.factories.models import lay_out_model, save_tiny
from tests.factories.workspace import command, corpus_rows, last_json

OLDER_SETTINGS = {
    "num_beams": 3,
    "length_penalty": 1.7,
    "min_length": 3,
    "no_repeat_ngram_size": 3,
    "early_stopping": True,
    "max_length": 200,
}
# With the maximum of the preset
DECODING = {"beams": 3, "length_penalty": 1.7, "min_length": 3, "no_repeat_ngram": 3, "early_stopping": True}
NUM_ROWS = {"train": 80, "validation": 8, "test": 8}


@dataclass(frozen=True)
class Case:
    """A named data set with a named teacher, and a row of the hub's format from an id, a source and a target."""

    dataset: str
    teacher: str
    make_row: Callable[[str, str, str], dict[str, Any]]


CASES = [
    Case("xsum", "bart", lambda i, s, t: {"document": s.replace(". ", ".\n"), "summary": t, "id": i}),
    Case(
        "cnn_dailymail",
        "pegasus",
        lambda i, s, t: {"article": s, "highlights": t and f"{t} .\nNEW: {t} .\r\n\n {t}", "id": i},
    ),
    Case("wmt16_en_ro", "mbart", lambda i, s, t: {"translation": {"en": s, "ro": t}}),
]


def write_caches(folder: Path, case: Case) -> dict[str, str]:
    """Teacher and data in hub caches, with one blank source and one blank target in training; the environment."""
    teacher, dataset = TEACHERS[case.teacher][case.dataset], DATASETS[case.dataset]
    model = save_tiny(case.teacher, folder / "teacher", dropout=0.0)
    settings = json.loads((model / "generation_config.json").read_text())
    config = json.loads((model / "config.json").read_text())
    forced = {name: value for name, value in settings.items() if name.startswith("forced_")}
    (model / "config.json").write_text(json.dumps({**config, **forced, **OLDER_SETTINGS}))
    (model / "generation_config.json").unlink()
    lay_out_model(folder / "hub", teacher.hub, model, teacher.revision)
    splits = {}
    for seed, (split, count) in enumerate(NUM_ROWS.items()):
        splits[split] = [case.make_row(row["id"], row["source"], row["target"]) for row in corpus_rows(count, seed)]
    splits["train"].insert(3, case.make_row("no-source", " ", "a target"))
    splits["train"].insert(9, case.make_row("no-target", "a source", ""))
    lay_out_dataset(folder / "datasets", dataset.hub, dataset.config, splits, dataset.revision)
    return {
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "HF_HOME": str(folder),
        "HF_HUB_OFFLINE": "1",
    }


def check_decoding(decoding: dict[str, Any], case: Case) -> None:
    """The settings are those of the teacher, with the maximum length of its preset."""
    expected = {**DECODING, "max_length": TEACHERS[case.teacher][case.dataset].decoding.max_length}
    assert {name: decoding[name] for name in expected} == expected


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.dataset)
def test_every_command_reads_the_same_rows_and_decodes_with_the_settings_of_the_teacher(case, tmp_path):
    hub, home = write_caches(tmp_path, case), tmp_path / "outputs"
    described = last_json(command(home, "describe", case.dataset, "--json", **hub))["described"]
    assert {split: report["rows"] for split, report in described.items()} == NUM_ROWS

    names = ("--teacher", case.teacher, "--dataset", case.dataset)
    done = command(home, "pseudolabel", *names, "--allow-repetitive", "--json", **hub)
    labels = last_json(done)
    assert labels["rows"] == NUM_ROWS["train"]
    check_decoding(labels["decoding"], case)
    assert not [text for text in read_label_set(Path(labels["folder"])).targets.values() if "<n>" in text]

    run = {
        "teacher": case.teacher,
        "dataset": {"name": case.dataset, "selection_share": 0},
        "method": "kd",
        "student": {"size": "2-1"},
        "training": {"max_steps": 4, "batch_size": 8, "warmup_steps": 1, "checks_per_epoch": 1},
        "evaluation": {"allow_repetitive_teacher": True},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"name": "r", **run}))
    trained = last_json(command(home, "train", tmp_path / "run.yaml", "--json", **hub))
    checkpoint = Path(trained["checkpoint"])
    check_decoding(json.loads((checkpoint / "raydistill.json").read_text())["decoding"], case)

    evaluated = last_json(command(home, "evaluate", checkpoint, "--json", **hub))
    [report] = evaluated["checkpoints"].values()
    assert report["beams"] == DECODING["beams"]
    test = trained["test"]["metrics"] if "metrics" in trained["test"] else trained["test"]
    assert report["metrics"][evaluated["metric"]] == pytest.approx(test[evaluated["metric"]], abs=1e-6)

    space = {"name": "s", "run": run, "search": {"trials": 1, "sampler": "grid"}}
    space |= {"serving": {"precision": ["fp32"]}, "budgets": {"any": {"params_m": 100}}}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    summary = last_json(command(home, "sweep", tmp_path / "space.yaml", "--json", **hub))
    assert len(summary["trials"]) == 1
    teacher = json.loads((home / "sweeps" / "s" / "teacher.json").read_text())
    check_decoding(teacher["decoding"], case)
