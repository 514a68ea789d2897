"""The tokenised pairs that a run trains on."""

import datasets
import pytest

from raydistill.config.presets import teacher_preset
from raydistill.config.run import Dataset, Run
from raydistill.label_sets.label_set import Candidate, write_label_set
from raydistill.label_sets.manifest import LabelManifest
from raydistill.models.loading import load_config
from raydistill.models.teacher import open_teacher
from raydistill.models.tokenization import decode_text, load_tokenizer
from raydistill.training.run import train
from raydistill.training.tokenized_data import load_tokenized_data, make_examples, tokenize_split
from tests.factories.hub_cache import lay_out_dataset
from tests.factories.models import save_tiny
from tests.factories.training import make_run, no_report, read_metrics


def test_pl_student_learns_the_pseudo_labels(workspace, tmp_path):
    """A student of one constant sentence reaches a far lower loss than a student of the original targets."""
    constant = [(f"train{i}", [Candidate("No one.", 0.0)]) for i in range(24)]
    write_label_set(tmp_path / "constant", constant, lambda: LabelManifest(rows=24))
    training = {"epochs": 10, "learning_rate": 0.03, "checks_per_epoch": 1, "patience": 10}
    run = make_run(workspace, "pl", training=training, labels=str(tmp_path / "constant"))
    train(run, tmp_path / "pl", no_report)
    train(make_run(workspace, training=training), tmp_path / "sft", no_report)
    losses = {name: read_metrics(tmp_path / name)[-1]["loss_data"] for name in ("pl", "sft")}
    assert losses["pl"] < 0.8 * losses["sft"]


def test_runs_with_different_numbers_of_rows_share_a_teacher(tmp_path):
    folder = str(save_tiny("bart", tmp_path / "t"))
    few, many = Dataset(name="a", train_rows=10), Dataset(name="a", train_rows=20)
    assert open_teacher(folder, few) is open_teacher(folder, many)
    assert open_teacher(folder, few).commit is None


@pytest.mark.parametrize(("family", "line_break"), [("bart", " "), ("t5", " "), ("pegasus", "\n")])
def test_summaries_of_cnn_dailymail_are_trained_on_as_the_released_models_write_them(
    tmp_path, monkeypatch, family, line_break
):
    """BART writes one line per summary, Pegasus its token <n>; also on labels that Pegasus wrote."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    rows = [{"article": "The old man.", "highlights": "The old man.\nNo one today.", "id": i} for i in "ab"]
    lay_out_dataset(tmp_path / "datasets", "abisee/cnn_dailymail", "3.0.0", {"train": rows, "validation": rows})
    labels = [(i, [Candidate("My brother.\nNo one.", 0.0)]) for i in "ab"]
    write_label_set(tmp_path / "labels", labels, lambda: LabelManifest(rows=2))
    folder = save_tiny(family, tmp_path / family, **({"line_breaks": True} if family == "pegasus" else {}))
    tokenizer = load_tokenizer(folder)
    run = Run(
        name="cnn",
        teacher=str(folder),
        method="sft",
        dataset=Dataset(name="cnn_dailymail", max_target_tokens=40, max_source_tokens=40, selection_share=0),
        labels=f"original+{tmp_path / 'labels'}",
    )
    data = load_tokenized_data(run, teacher_preset("bart", "cnn_dailymail"), tokenizer, load_config(folder))
    assert data.corpora["validation"].targets[0] == rows[0]["highlights"]  # references are the same for all families
    examples = make_examples(run, data, tokenizer, {})
    original, label = (
        line_break.join(lines) for lines in (["The old man.", "No one today."], ["My brother.", "No one."])
    )
    assert [decode_text(tokenizer, ids) for ids in examples.targets] == [original, original, label, label]
    validation = tokenize_split(tokenizer, run.dataset, "validation", "target", 40)
    assert decode_text(tokenizer, validation[0]) == original


def test_line_breaks_of_own_files_are_trained_on_as_they_are(tmp_path):
    rows = '{"source": "The old man.", "target": "The old man.\\n\\nNo one today."}\n'
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(rows)
    tokenizer = load_tokenizer(save_tiny("bart", tmp_path / "bart"))
    [ids] = tokenize_split(tokenizer, Dataset(name=str(tmp_path)), "train", "target", 40)
    assert decode_text(tokenizer, ids) == "The old man.\n\nNo one today."
