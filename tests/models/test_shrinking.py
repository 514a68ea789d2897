"""Students against their teachers: copied layers, random layers, layers of another checkpoint."""

import pytest
import torch

from raydistill.config.run import Dataset, LayerChoice, Student
from raydistill.core.errors import UserError
from raydistill.models import families, shrinking
from raydistill.models.loading import load_model
from raydistill.models.shrinking import plan_layers, shrink
from raydistill.models.teacher import open_teacher
from tests.factories.models import FAMILIES, T5_FORMS, edit_config, save_tiny


def test_a_layer_can_be_copied_several_times():
    assert plan_layers((12, 12), Student(size="12-3", init="repeated")).decoder == [0, 0, 0]
    assert plan_layers((12, 12), Student(size="12-3", copied=LayerChoice(decoder=[7, 7, 2]))).decoder == [7, 7, 2]


def logits(model):
    torch.manual_seed(1)
    ids = torch.randint(5, 40, (2, 9))
    targets = torch.randint(5, 40, (2, 6))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=targets).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_student_of_full_depth_equals_its_teacher(family, tmp_path):
    teacher = load_model(str(save_tiny(family, tmp_path / "t", logits_bias=True)))
    student = shrink(teacher, plan_layers((2, 3), Student()), seed=1)
    assert torch.equal(logits(student), logits(teacher))


@pytest.mark.parametrize("family", FAMILIES)
def test_student_computes_with_the_copied_layers(family, tmp_path):
    """Deleting the layers that are not copied from the teacher gives the student."""
    teacher = load_model(str(save_tiny(family, tmp_path / "t", logits_bias=True)))
    student = shrink(teacher, plan_layers((2, 3), Student(size="1-2", copied=LayerChoice(encoder=[1], decoder=[0, 2]))))
    assert families.num_layers(student.config) == (1, 2)
    name = "block" if family in T5_FORMS else "layers"
    for stack, dropped in ((teacher.get_encoder(), 0), (teacher.get_decoder(), 1)):
        layers = getattr(stack, name)
        if family in T5_FORMS and dropped == 0:  # T5's first layer holds the relative bias of the whole stack
            bias = layers[0].layer[0].SelfAttention.relative_attention_bias
            layers[1].layer[0].SelfAttention.relative_attention_bias = bias
            layers[1].layer[0].SelfAttention.has_relative_attention_bias = True
        del layers[dropped]
        for layer in layers.modules():
            if hasattr(layer, "layer_idx"):
                layer.layer_idx = None
    teacher.config = student.config
    with torch.no_grad():
        ids = torch.randint(5, 40, (2, 9))
        mask = torch.ones_like(ids)
        encoded = families.encode(student, ids, mask).last_hidden_state
        assert torch.allclose(encoded, families.encode(teacher, ids, mask).last_hidden_state, atol=1e-6)
        decoder_ids = torch.randint(5, 40, (2, 4))
        decoded = families.decode(student, decoder_ids, encoded, mask).last_hidden_state
        assert torch.allclose(
            decoded, families.decode(teacher, decoder_ids, encoded, mask).last_hidden_state, atol=1e-6
        )


def test_students_skip_no_layers_in_training(tmp_path):
    """Published M2M100 models skip layers at random, and the hidden states of skipped layers would be missing."""
    folder = save_tiny("m2m100", tmp_path / "t", dropout=0.0)
    edit_config(folder, encoder_layerdrop=1.0, decoder_layerdrop=1.0, attention_dropout=0.0)
    teacher = load_model(folder)
    student = shrink(teacher, plan_layers((2, 3), Student()))
    assert (student.config.encoder_layerdrop, student.config.decoder_layerdrop) == (0.0, 0.0)
    ids = torch.randint(5, 40, (2, 9))
    encoded = families.encode(student.train(), ids, torch.ones_like(ids), layers=True)
    assert len(encoded.layers) == 2
    expected = families.encode(teacher, ids, torch.ones_like(ids)).last_hidden_state
    assert torch.allclose(encoded.last_hidden_state, expected, atol=1e-6)


def test_random_decoder_keeps_all_other_weights(tmp_path):
    teacher = load_model(str(save_tiny("bart", tmp_path / "t")))
    layers = plan_layers((2, 3), Student(size="2-2", init="random"))
    assert layers.decoder is None
    student = shrink(teacher, layers, seed=3)
    teacher_state, student_state = teacher.state_dict(), student.state_dict()
    assert torch.equal(
        teacher_state["model.encoder.layers.1.fc1.weight"], student_state["model.encoder.layers.1.fc1.weight"]
    )
    assert torch.equal(teacher_state["model.shared.weight"], student_state["model.shared.weight"])
    for layer in range(3):
        name = "model.decoder.layers.{}.fc1.weight"
        assert not torch.equal(teacher_state[name.format(layer)], student_state[name.format(0)])
    assert torch.equal(
        student_state["model.decoder.layers.0.fc1.weight"], shrink(teacher, layers, 3).state_dict()[name.format(0)]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_from_replaces_the_decoder_layers_only(family, tmp_path):
    teacher = load_model(str(save_tiny(family, tmp_path / "t", seed=0)))
    other = load_model(str(save_tiny(family, tmp_path / "o", seed=1)))
    student = shrink(teacher, plan_layers((2, 3), Student(size="2-2")), decoder_from=other)
    teacher_state, other_state = teacher.state_dict(), other.state_dict()
    layers = ("decoder.block.", "decoder.layers.")
    from_other = 0
    for key, value in student.state_dict().items():
        name = key.replace("block.1.", "block.2.").replace("layers.1.", "layers.2.") if "decoder." in key else key
        in_layer = any(part in key for part in layers) and "relative_attention_bias" not in key
        assert torch.equal(value, (other_state if in_layer else teacher_state)[name]), key
        from_other += in_layer
    assert from_other > 20


def test_decoder_from_with_another_architecture_is_an_error(tmp_path):
    teacher = load_model(str(save_tiny("bart", tmp_path / "t")))
    other = load_model(str(save_tiny("bart", tmp_path / "o", decoder_layers=4, ffn_dim=64)))
    with pytest.raises(UserError, match="decoder_ffn_dim 64 and not 32, decoder_layers 4 and not 3"):
        shrink(teacher, plan_layers((2, 3), Student(size="2-2")), decoder_from=other)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (Student(size="2-4"), "1 to 3, not 4"),
        (Student(size="3-3"), "1 to 2, not 3"),
        (Student(size="2-1", copied=LayerChoice(decoder=[3])), "layer 3 is out of range"),
        (Student(supervised=LayerChoice(decoder=[0, 1, 7])), "layer 7 is out of range"),
    ],
)
def test_plan_with_invalid_sizes_or_layers_is_an_error(student, message):
    with pytest.raises(UserError, match=message):
        plan_layers((2, 3), student)


def test_teacher_whose_full_depth_copy_differs_is_an_error(tmp_path, monkeypatch):
    """Every run checks its teacher; here the choice of layers is made wrong."""
    folder = save_tiny("bart", tmp_path / "t")
    assert 0 <= open_teacher(str(folder), Dataset(name="a")).alignment_error <= 1e-5
    monkeypatch.setattr(shrinking, "layers_to_copy", lambda teacher, student, init="spaced": [0, *range(student - 1)])
    with pytest.raises(UserError, match=r"the logits of a full-depth copy differ by \d"):
        open_teacher(str(folder), Dataset(name="b"))
