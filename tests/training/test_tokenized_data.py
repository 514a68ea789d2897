"""The tokenised pairs that a run trains on."""

import datasets
import pytest

from raydistill.config.presets import teacher_preset
from raydistill.config.run import Dataset, Run
from raydistill.core.errors import UserError
from raydistill.label_sets.label_set import Candidate, write_label_set
from raydistill.label_sets.manifest import LabelManifest
from raydistill.models.loading import load_config
from raydistill.models.teacher import open_teacher
from raydistill.models.tokenization import decode_text, load_tokenizer
from raydistill.training import tokenized_data
from raydistill.training.inputs import RunInputs
from raydistill.training.run import train
from raydistill.training.run_folder import check_same_inputs
from raydistill.training.tokenized_data import (
    input_fingerprints,
    load_tokenized_data,
    make_examples,
    tokenize_split,
)
from tests.factories.data_files import write_jsonl
from tests.factories.extra import label_extra, write_extra
from tests.factories.hub_cache import lay_out_dataset
from tests.factories.models import save_tiny
from tests.factories.training import make_run, no_report, read_metrics, write_run_workspace


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


@pytest.fixture
def extra_workspace(tmp_path):
    """A workspace with extra sources, and the folders of a run on pseudo-labels."""
    workspace = write_run_workspace(tmp_path)
    return workspace, label_extra(workspace, write_extra(tmp_path))


def examples_of(workspace, folders, labels, **pseudo):
    run = make_run(workspace, labels=labels, pseudo={"extra": str(workspace / "more.jsonl"), **pseudo})
    teacher = open_teacher(str(workspace / "teacher"), run.dataset)
    data = load_tokenized_data(run, None, teacher.tokenizer, teacher.model.config)
    return make_examples(run, data, teacher.tokenizer, folders)


def test_extra_sources_have_pseudo_labels_only_and_follow_the_training_rows(extra_workspace):
    workspace, folders = extra_workspace
    mixed = examples_of(workspace, folders, "original+pseudo")
    assert len(mixed.sources) == 24 + 5
    assert mixed.source_indices == [*range(24), *range(24), *range(24, 29)]
    tokenizer = load_tokenizer(workspace / "teacher")
    texts = [tokenizer.decode(target, skip_special_tokens=True).strip() for target in mixed.targets[48:]]
    assert texts == [f"A label of row {i}." for i in range(5)]
    sources = [tokenizer.decode(mixed.sources[row], skip_special_tokens=True) for row in mixed.source_indices[48:]]
    assert all(f"Number {i}." in source for i, source in enumerate(sources))


@pytest.mark.parametrize(
    ("labels", "extra_rows", "indices"),
    [
        ("pseudo", 2, [*range(24), 24, 25]),
        ("pseudo", 0, [*range(24)]),
        ("pseudo", 99, [*range(29)]),
        ("original", None, [*range(24)]),
    ],
)
def test_runs_with_other_numbers_of_extra_rows_share_the_sources_of_a_teacher_cache(
    extra_workspace, labels, extra_rows, indices
):
    workspace, folders = extra_workspace
    if labels == "original":
        folders = {"extra": folders["extra"]}
    examples = examples_of(workspace, folders, labels, extra_rows=extra_rows)
    assert examples.source_indices == indices
    assert examples.sources_key == examples_of(workspace, extra_workspace[1], "pseudo").sources_key


def test_extra_texts_that_are_not_labelled_are_an_error(extra_workspace):
    workspace, folders = extra_workspace
    with pytest.raises(UserError, match="the texts are not labelled"):
        examples_of(workspace, {"pseudo": folders["pseudo"]}, "pseudo")


@pytest.mark.parametrize("method", ["pl", "kd"])
def test_run_on_extra_sources_trains_and_notices_a_changed_file(extra_workspace, tmp_path, method):
    workspace, folders = extra_workspace
    run = make_run(workspace, method, labels="original+pseudo", pseudo={"extra": str(workspace / "more.jsonl")})
    inputs = RunInputs(label_folders=folders, cache_root=tmp_path / "cache")
    result = train(run, tmp_path / "run", no_report, inputs)
    assert result.status == "done"
    assert result.steps == -(-(24 + 24 + 5) // 8)  # 53 pairs in batches of 8
    check_same_inputs(tmp_path / "run", input_fingerprints(run))
    write_jsonl(workspace / "more.jsonl", [{"text": "Another text."}])
    tokenized_data._scan_once.cache_clear()  # the next command is another process
    with pytest.raises(UserError, match="inputs changed since this run was started: extra split"):
        check_same_inputs(tmp_path / "run", input_fingerprints(run))
