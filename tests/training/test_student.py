"""The student of a run: made from the teacher or from a random start."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from raydistill.config.run import Dataset, Run
from raydistill.jobs.teacher_cache import CacheRequest, cache_group_key
from raydistill.models.freezing import freeze
from raydistill.models.loading import load_config, load_model
from raydistill.models.metadata import CheckpointMetadata
from raydistill.models.teacher import open_teacher
from raydistill.models.tokenization import load_tokenizer
from raydistill.training.inputs import RunInputs
from raydistill.training.run import train
from raydistill.training.student import make_student, prepare_student
from raydistill.training.teacher_states import make_distillation_step
from raydistill.training.tokenized_data import load_tokenized_data, make_examples, select_student_tokens
from raydistill.training.workers import Worker
from tests.factories.models import FAMILIES, save_tiny
from tests.factories.training import make_run, no_report, parse_json_file, write_run_workspace


def test_student_has_its_own_generation_config(workspace):
    teacher = open_teacher(str(workspace / "teacher"), Dataset(name=str(workspace)))
    student, _ = make_student(make_run(workspace), teacher)
    student.generation_config.num_beams = 77
    assert teacher.model.generation_config.num_beams != 77


def test_configured_dropout_is_set_in_the_student_only(workspace, tmp_path):
    teacher = open_teacher(str(workspace / "teacher"), Dataset(name=str(workspace)))
    student, _ = make_student(make_run(workspace, training={"dropout": 0.25}), teacher)
    layers: Any = student.get_decoder().layers
    layer = layers[0]
    assert (layer.dropout, student.get_decoder().dropout, student.config.dropout) == (0.25, 0.25, 0.25)
    assert (layer.self_attn.dropout, layer.activation_dropout) == (0.0, 0.0)
    teacher_layers: Any = teacher.model.get_decoder().layers
    assert teacher_layers[0].dropout == 0.1
    student.train()
    assert layer.self_attn.dropout == student.config.attention_dropout


@pytest.mark.parametrize("family", ["bart", "marian"])
def test_random_start_trains_a_new_model(workspace, family, tmp_path):
    start = {"family": family, "encoder_layers": 1, "decoder_layers": 2, "d_model": 16, "heads": 2, "ffn_dim": 32}
    start |= {"vocab_size": 330, "max_positions": 64}
    run = make_run(workspace, teacher=None, student=None, start=start, training={"learning_rate": 0.01})
    folder = tmp_path / "run"
    result = train(run, folder, no_report)
    assert (result.status, result.size, result.copied) == ("done", "1-2", None)
    best, start_model = load_model(folder / "best"), load_model(folder / "start")
    for name, parameter in best.named_parameters():
        if "embed_positions" not in name or family == "bart":
            assert not torch.equal(parameter, dict(start_model.named_parameters())[name]), name
    if family == "marian":
        tables: Any = (best.get_input_embeddings(), best.get_decoder().embed_tokens, best.lm_head)
        for table in tables:
            assert not table.weight[best.config.pad_token_id].any()
    assert parse_json_file(folder / "best" / "raydistill.json")["teacher"] is None
    assert load_tokenizer(folder / "best").decode(load_tokenizer(folder / "best")("A dog").input_ids)


def test_copy_from_initializes_the_decoder_layers(tmp_path):
    teacher, other = save_tiny("bart", tmp_path / "t", seed=0), save_tiny("bart", tmp_path / "o", seed=1)
    settings = {"name": "r", "teacher": str(teacher), "dataset": str(tmp_path)}
    run = Run(**settings, student={"size": "2-1", "copy_from": str(other)})
    student, _ = make_student(run, open_teacher(str(teacher), run.dataset))
    name = "model.decoder.layers.0.fc1.weight"
    assert torch.equal(student.state_dict()[name], load_model(other).state_dict()[name])
    with pytest.raises(ValueError, match="measured compares the teacher's own layers"):
        Run(**settings, student={"size": "2-1", "copy_from": str(other), "init": "measured"})
    with pytest.raises(ValueError, match="random copies no decoder layer"):
        Run(**settings, student={"size": "2-1", "copy_from": str(other), "init": "random"})


# Students with a trimmed vocabulary
#
# The expected losses are computed from the logits of the full teacher, restricted to the kept tokens, in float64.


TEXTS = ["The old man sees a red bicycle.", "A young woman sees it.", "The man sees a woman.", "A red bicycle."]
TARGETS = ["The man sees.", "A woman.", "A man.", "The red bicycle."]
TEMPERATURE = 2.0


def write_data(folder: Path) -> Path:
    folder.mkdir()
    rows = [json.dumps({"id": str(i), "source": s, "target": t}) for i, (s, t) in enumerate(zip(TEXTS, TARGETS))]  # noqa: B905
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def kd_run(teacher: Path, data: Path, vocabulary, **training) -> Run:
    return Run.model_validate(
        {
            "name": "r",
            "teacher": str(teacher),
            "dataset": {"name": str(data), "max_source_tokens": 40, "max_target_tokens": 20},
            "method": "kd",
            "student": {"size": "2-1", "vocabulary": vocabulary},
            "loss": {"temperature": TEMPERATURE},
            "training": {"precision": "fp32", "cache_precision": "fp32", "dropout": 0.0, **training},
        }
    )


def make_step(run: Run, tmp_path: Path, cache_mode):
    setup = prepare_student(run, tmp_path / "run", Worker(), {})
    assert setup.teacher is not None
    data = load_tokenized_data(run, None, setup.tokenizer, setup.student.config)
    examples = make_examples(run, data, setup.tokenizer, {})
    freeze(setup.student, setup.frozen_parts(run))
    inputs = RunInputs(cache_root=tmp_path / "cache", cache_mode=cache_mode)
    return setup, make_distillation_step(run, setup, examples, inputs, Worker())


def num_required(teacher: Path) -> int:
    """Tokens that are always kept."""
    config, tokenizer = load_config(teacher), load_tokenizer(teacher)
    from raydistill.models.vocabulary import select_tokens

    return len(select_tokens(tokenizer, config, {}, "used"))


def expected_losses(run: Run, setup, examples, rows: Sequence[int]) -> list[dict[str, float]]:
    """Loss terms of examples: both models run alone, the teacher with all of its tokens, by name of the token."""
    teacher, id_by_token = load_model(run.teacher or ""), load_tokenizer(run.teacher or "").get_vocab()
    kept = [id_by_token[token] for token in setup.tokenizer.convert_ids_to_tokens(range(len(setup.tokenizer)))]
    return [row_losses(teacher, setup, kept, examples.sources[i], examples.targets[i]) for i in rows]


def row_losses(teacher, setup, kept: list[int], source: list[int], target: list[int]) -> dict[str, float]:
    """Loss terms of a row; `kept` are the teacher's ids of the student's tokens."""
    with torch.no_grad():
        own = setup.student(
            input_ids=torch.tensor([source]), labels=torch.tensor([target]), output_hidden_states=True, use_cache=False
        )
        full_target = torch.tensor([[kept[token] for token in target]])
        start = teacher.config.decoder_start_token_id
        if teacher.config.model_type == "mbart":  # the decoder starts with the last token of the target
            start = full_target[0, -1]
        decoder_ids = torch.cat([torch.tensor([[start]]), full_target[:, :-1]], dim=1)
        full = teacher(
            input_ids=torch.tensor([[kept[token] for token in source]]),
            decoder_input_ids=decoder_ids,
            output_hidden_states=True,
            use_cache=False,
        )
    student_logits, teacher_logits = own.logits[0].double(), full.logits[0][:, kept].double()
    log_p = student_logits.log_softmax(-1)
    teacher_p = (teacher_logits / TEMPERATURE).softmax(-1)
    divergence = teacher_p * (teacher_p.log() - (student_logits / TEMPERATURE).log_softmax(-1))
    layer = setup.layer_plan.supervised_decoder[0]
    difference = own.decoder_hidden_states[1] - full.decoder_hidden_states[layer + 1]
    return {
        "data": -float(log_p.gather(-1, torch.tensor(target)[:, None]).sum()),
        "logits": TEMPERATURE**2 * float(divergence.sum()),
        "hidden": float(difference.double().pow(2).mean(-1).sum()),
    }


@pytest.mark.parametrize("vocabulary", ["used", "number"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kd_compares_with_the_full_teacher_on_the_kept_tokens(family, vocabulary, tmp_path):
    teacher = save_tiny(family, tmp_path / "teacher", dropout=0.0, logits_bias=True)
    data = write_data(tmp_path / "data")
    run = kd_run(teacher, data, "used" if vocabulary == "used" else num_required(teacher) + 3)
    setup, step = make_step(run, tmp_path, "full")
    size = setup.student.config.vocab_size
    assert size == len(setup.tokenizer) < load_config(teacher).vocab_size
    assert step.cached_decoder_states
    assert step.teacher is None
    scales = dict.fromkeys(step.term_weights([0]), 1.0)
    for i, expected in enumerate(expected_losses(run, setup, step.examples, range(len(TEXTS)))):
        _, sums = step.loss_terms(step.read_batch([i]), scales)
        assert {name: float(sums[name]) for name in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("cache_mode", ["full", "off"])
def test_trained_embeddings_compare_with_the_teachers_head(cache_mode, tmp_path):
    teacher = save_tiny("marian", tmp_path / "teacher", dropout=0.0, logits_bias=True)
    data = write_data(tmp_path / "data")
    run = kd_run(teacher, data, num_required(teacher) + 3, freeze_embeddings=False)
    setup, step = make_step(run, tmp_path, cache_mode)
    with torch.no_grad():
        setup.student.get_input_embeddings().weight.mul_(1.3)
    scales = dict.fromkeys(step.term_weights([0]), 1.0)
    _, sums = step.loss_terms(step.read_batch([1]), scales)
    [expected] = expected_losses(run, setup, step.examples, [1])
    assert {name: float(sums[name]) for name in expected} == pytest.approx(expected, rel=1e-4)


def test_students_share_the_cache_unless_their_texts_have_other_tokens(tmp_path):
    teacher = save_tiny("bart", tmp_path / "teacher")
    data = write_data(tmp_path / "data")
    stores = []
    for vocabulary in (None, "used", num_required(teacher) + 3):
        run = kd_run(teacher, data, vocabulary)
        make_step(run, tmp_path, "full")
        stores.append({path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()})
        job = CacheRequest([run], {}, tmp_path / "cache", "cpu").make_layout("full")
        assert not job.is_incomplete()  # the job that prepares the cache would build the same stores
    assert stores[0] == stores[1] < stores[2]
    keys = [cache_group_key(kd_run(teacher, data, vocabulary)) for vocabulary in (None, "used", 300, 301)]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_tokens_of_sources_targets_and_label_sets_count(tmp_path):
    """The text of every label has a number that no source has."""
    workspace = write_run_workspace(tmp_path)
    runs = {
        labels: make_run(workspace, student={"size": "2-1", "vocabulary": "used"}, labels=labels)
        for labels in ("original", str(workspace / "labels"))
    }
    teacher = open_teacher(str(workspace / "teacher"), runs["original"].dataset)
    config = load_config(workspace / "teacher")
    kept = {labels: select_student_tokens(run, teacher.tokenizer, config, {}) for labels, run in runs.items()}
    own, with_labels = kept.values()
    label_ids = set(teacher.tokenizer("Two small dogs 7.").input_ids)
    assert label_ids <= set(with_labels)
    assert set(own) <= set(with_labels)
    assert select_student_tokens(make_run(workspace), teacher.tokenizer, config, {}) is None


def test_run_writes_a_checkpoint_of_the_auto_classes(tmp_path):
    workspace = write_run_workspace(tmp_path)
    run = make_run(workspace, "kd", student={"size": "2-1", "vocabulary": 300})
    result = train(run, tmp_path / "run", no_report)
    assert result is not None
    assert result.status == "done"
    folder = tmp_path / "run" / "best"
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) == 300 < load_config(workspace / "teacher").vocab_size
    assert result.metrics["params_m"] == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6)
    assert result.size == "2-1-v300"
    assert CheckpointMetadata.read_from(folder).vocabulary == 300
