"""Layer choice against the reference table, and students against their teachers."""

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

from raydistill.config.run import Dataset, LayerChoice, Student
from raydistill.core.errors import UserError
from raydistill.models import families
from raydistill.models.layer_choice import layers_to_copy, layers_to_supervise
from raydistill.models.loading import load_model
from raydistill.models.shrinking import plan_layers, shrink
from tests.factories.models import FAMILIES, save_tiny

# Typed from ../shared/reference/README.md, apart from the code.
TABLE = {
    12: "1:0 2:0,6 3:0,6,11 4:0,4,8,11 6:0,2,4,7,9,11 9:0,1,2,4,5,7,9,10,11 12:0,1,2,3,4,5,6,7,8,9,10,11",
    16: "1:0 2:0,15 3:0,8,15 4:0,5,10,15 6:0,3,6,9,12,15 8:0,2,4,6,8,10,12,15 9:0,1,3,5,7,9,11,13,15 "
    "12:0,1,2,3,4,5,6,7,9,11,13,15 16:0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    6: "1:0 2:0,5 3:0,2,5 4:0,1,3,5 6:0,1,2,3,4,5",
}
PHI = {
    12: "1:11 2:5,11 3:3,7,11 6:1,3,5,8,10,11",
    16: "1:15 4:4,9,12,15 8:1,3,5,7,9,11,13,15",
    6: "1:5 2:3,5 3:1,4,5 4:1,2,4,5",
}


def rows(table):
    for teacher, line in table.items():
        for entry in line.split():
            depth, layers = entry.split(":")
            yield teacher, int(depth), [int(layer) for layer in layers.split(",")]


@pytest.mark.parametrize(("teacher", "student", "layers"), rows(TABLE))
def test_copied_layers_are_the_tables(teacher, student, layers):
    assert layers_to_copy(teacher, student) == layers


@pytest.mark.parametrize(("teacher", "student", "layers"), rows(PHI))
def test_supervised_layers_are_the_tables(teacher, student, layers):
    assert layers_to_supervise(teacher, student) == layers


@pytest.mark.parametrize(
    ("teacher", "student", "copied", "phi"),
    [
        (12, 5, [0, 3, 6, 8, 11], [2, 4, 7, 9, 11]),  # 2.75 5.5 8.25: halves go up; ceil(2.4 4.8 7.2 9.6 12) - 1
        (24, 3, [0, 12, 23], [7, 15, 23]),  # 11.5 goes up
        (3, 2, [0, 2], [1, 2]),
        (8, 1, [0], [7]),
    ],
)
def test_depths_without_an_entry_follow_the_formula(teacher, student, copied, phi):
    assert layers_to_copy(teacher, student) == copied
    assert layers_to_supervise(teacher, student) == phi


@pytest.mark.parametrize("teacher", range(1, 33))
def test_every_depth_works(teacher):
    for student in range(1, teacher + 1):
        for layers in (layers_to_copy(teacher, student), layers_to_supervise(teacher, student)):
            assert len(layers) == student
            assert layers == sorted(set(layers))
            assert layers[0] >= 0
            assert layers[-1] < teacher
        assert layers_to_supervise(teacher, student)[-1] == teacher - 1


def test_the_papers_other_initialisations():
    assert layers_to_copy(12, 3, "first") == [0, 1, 2]
    assert layers_to_copy(12, 3, "last") == [9, 10, 11]
    assert layers_to_copy(12, 3, "middle") == [5, 6, 7]


def test_one_layer_can_be_copied_again_and_again():
    assert layers_to_copy(12, 3, "repeated") == [0, 0, 0]
    assert plan_layers((12, 12), Student(size="12-3", init="repeated")).decoder == [0, 0, 0]
    assert plan_layers((12, 12), Student(size="12-3", copied=LayerChoice(decoder=[7, 7, 2]))).decoder == [7, 7, 2]


def logits(model):
    torch.manual_seed(1)
    ids = torch.randint(5, 40, (2, 9))
    targets = torch.randint(5, 40, (2, 6))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=targets).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_full_depth_equals_its_teacher(family, tmp_path):
    teacher = load_model(str(save_tiny(family, tmp_path / "t", logits_bias=family != "t5")))
    student = shrink(teacher, plan_layers((2, 3), Student()), seed=1)
    assert torch.equal(logits(student), logits(teacher))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_computes_with_the_copied_layers(family, tmp_path):
    """Zeroing what a left-out layer adds in the teacher gives the student: residual stacks skip it."""
    teacher = load_model(str(save_tiny(family, tmp_path / "t", logits_bias=family != "t5")))
    student = shrink(teacher, plan_layers((2, 3), Student(size="1-2", copied=LayerChoice(encoder=[1], decoder=[0, 2]))))
    assert families.num_layers(student.config) == (1, 2)
    name = "block" if family == "t5" else "layers"
    for stack, dropped in ((teacher.get_encoder(), 0), (teacher.get_decoder(), 1)):
        layers = getattr(stack, name)
        if family == "t5" and dropped == 0:  # the relative bias of the whole stack lives in the first layer
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
        ours = families.encode(student, ids, mask).last_hidden_state
        assert torch.allclose(ours, families.encode(teacher, ids, mask).last_hidden_state, atol=1e-6)
        decoder_ids = torch.randint(5, 40, (2, 4))
        ours_decoded = families.decode(student, decoder_ids, ours, mask).last_hidden_state
        assert torch.allclose(
            ours_decoded, families.decode(teacher, decoder_ids, ours, mask).last_hidden_state, atol=1e-6
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_head_are_those_of_the_models_own_forward(family, tmp_path):
    model = load_model(str(save_tiny(family, tmp_path / "t", logits_bias=family != "t5")))
    ids = torch.randint(5, 40, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    targets = torch.randint(5, 40, (2, 6))
    with torch.no_grad():
        out = model(
            input_ids=ids, attention_mask=mask, decoder_input_ids=targets, output_hidden_states=True, use_cache=False
        )
        states = families.decode(model, targets, families.encode(model, ids, mask).last_hidden_state, mask, layers=True)
        assert len(states.layers) == 3
        assert torch.equal(states.layers[-1], states.last_hidden_state)
        for layer in range(3):
            assert torch.allclose(states.layers[layer], out.decoder_hidden_states[layer + 1], atol=1e-6)
        assert torch.allclose(families.lm_head(model, states.last_hidden_state), out.logits, atol=1e-5)


def test_a_random_decoder_keeps_everything_else(tmp_path):
    teacher = load_model(str(save_tiny("bart", tmp_path / "t")))
    layers = plan_layers((2, 3), Student(size="2-2", init="random"))
    assert layers.decoder is None
    student = shrink(teacher, layers, seed=3)
    theirs, ours = teacher.state_dict(), student.state_dict()
    assert torch.equal(theirs["model.encoder.layers.1.fc1.weight"], ours["model.encoder.layers.1.fc1.weight"])
    assert torch.equal(theirs["model.shared.weight"], ours["model.shared.weight"])
    for layer in range(3):
        name = "model.decoder.layers.{}.fc1.weight"
        assert not torch.equal(theirs[name.format(layer)], ours[name.format(0)])
    assert torch.equal(
        ours["model.decoder.layers.0.fc1.weight"], shrink(teacher, layers, 3).state_dict()[name.format(0)]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_layers_can_come_from_another_checkpoint_and_nothing_else_does(family, tmp_path):
    teacher = load_model(str(save_tiny(family, tmp_path / "t", seed=0)))
    other = load_model(str(save_tiny(family, tmp_path / "o", seed=1)))
    student = shrink(teacher, plan_layers((2, 3), Student(size="2-2")), decoder_from=other)
    theirs, others = teacher.state_dict(), other.state_dict()
    layers = ("decoder.block.", "decoder.layers.")
    from_other = 0
    for key, value in student.state_dict().items():
        wanted = key.replace("block.1.", "block.2.").replace("layers.1.", "layers.2.") if "decoder." in key else key
        in_layer = any(part in key for part in layers) and "relative_attention_bias" not in key
        assert torch.equal(value, (others if in_layer else theirs)[wanted]), key
        from_other += in_layer
    assert from_other > 20


def test_another_checkpoint_must_have_the_teachers_shape(tmp_path):
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
def test_what_does_not_fit_is_said(student, message):
    with pytest.raises(UserError, match=message):
        plan_layers((2, 3), student)


@pytest.mark.parametrize(
    ("size", "millions"), [("12-1", 222), ("12-3", 255), ("6-6", 230), ("9-6", 268), ("12-6", 306), ("12-12", 406)]
)
def test_parameters_of_bart_large_xsum_students_are_the_papers(size, millions):
    """Table 6, with facebook/bart-large-xsum's real shape, on the meta device."""
    config = BartConfig(
        vocab_size=50264, d_model=1024, encoder_layers=12, decoder_layers=12, encoder_attention_heads=16,
        decoder_attention_heads=16, encoder_ffn_dim=4096, decoder_ffn_dim=4096, max_position_embeddings=1024,
    )  # fmt: skip
    with torch.device("meta"):
        layers = plan_layers((12, 12), Student(size=size))
        model = BartForConditionalGeneration(families.with_num_layers(config, *layers.size))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_a_run_names_the_checkpoint_that_its_decoder_layers_come_from(tmp_path):
    from raydistill.config.run import Run
    from raydistill.models.teacher import open_teacher
    from raydistill.training.student import make_student

    teacher, other = save_tiny("bart", tmp_path / "t", seed=0), save_tiny("bart", tmp_path / "o", seed=1)
    settings = {"name": "r", "teacher": str(teacher), "dataset": str(tmp_path)}
    run = Run(**settings, student={"size": "2-1", "copy_from": str(other)})
    student, _ = make_student(run, open_teacher(str(teacher), run.dataset))
    name = "model.decoder.layers.0.fc1.weight"
    assert torch.equal(student.state_dict()[name], load_model(other).state_dict()[name])
    with pytest.raises(ValueError, match="random copies no decoder layer"):
        Run(**settings, student={"size": "2-1", "copy_from": str(other), "init": "random"})


def test_a_teacher_whose_full_copy_is_another_model_is_refused(tmp_path, monkeypatch):
    """Every run asks this of its teacher; here the table of layers is wrong on purpose."""
    from raydistill.models import shrinking as module
    from raydistill.models.teacher import open_teacher

    folder = save_tiny("bart", tmp_path / "t")
    assert 0 <= open_teacher(str(folder), Dataset(name="a")).alignment_error <= 1e-5
    monkeypatch.setattr(module, "layers_to_copy", lambda teacher, student, init="spaced": [0, *range(student - 1)])
    with pytest.raises(UserError, match=r"a copy of full depth is off by \d"):
        open_teacher(str(folder), Dataset(name="b"))


def test_runs_on_other_numbers_of_rows_share_a_teacher(tmp_path):
    from raydistill.models.teacher import open_teacher

    folder = str(save_tiny("bart", tmp_path / "t"))
    few, many = Dataset(name="a", train_rows=10), Dataset(name="a", train_rows=20)
    assert open_teacher(folder, few) is open_teacher(folder, many)
    assert open_teacher(folder, few).commit is None
