"""The student of a run: made from the teacher or from a random start."""

from typing import Any

import pytest
import torch

from raydistill.config.run import Dataset, Run
from raydistill.models.loading import load_model
from raydistill.models.teacher import open_teacher
from raydistill.models.tokenization import load_tokenizer
from raydistill.training.run import train
from raydistill.training.student import make_student
from tests.factories.models import save_tiny
from tests.factories.training import make_run, no_report, parse_json_file


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
