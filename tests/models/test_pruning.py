"""Students with fewer feed-forward units: what they compute, which units they keep, and what reads them."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from raydistill.config.run import LayerChoice, Student
from raydistill.core.errors import UserError
from raydistill.data.batching import Examples
from raydistill.inference.engines import open_engine
from raydistill.models import families
from raydistill.models.calibration import Calibration
from raydistill.models.loading import load_model
from raydistill.models.pruning import best_units, random_units, score_units
from raydistill.models.saving import save_checkpoint
from raydistill.models.shrinking import plan_student, shrink
from raydistill.models.tokenization import load_tokenizer, tokenize_sources, tokenize_targets
from tests.factories.engines import GREEDY, TEXTS, first_texts, open_ctranslate2
from tests.factories.models import FAMILIES, save_tiny
from tests.factories.training import text_pairs

UNITS = 32  # of the tiny models


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path):
    return save_tiny(request.param, tmp_path / "teacher", logits_bias=True)


@pytest.fixture
def teacher(folder):
    return load_model(folder)


def pruned_student(model, size="2-3", **settings):
    """A student of which half of the units of the encoder are removed, and of the decoder all but a quarter."""
    decoder = 0.5 if model.config.model_type in ("t5", "mt5") else 0.25
    student = Student(**{"size": size, "encoder_ffn": 0.5, "decoder_ffn": decoder, **settings})
    return plan_student(model.config, student)


def calibration(folder, n=24):
    sources, targets = text_pairs(n)
    tokenizer = load_tokenizer(folder)
    examples = Examples(
        tokenize_sources(tokenizer, sources, 40), tokenize_targets(tokenizer, targets, 20), list(range(n))
    )
    return Calibration.of(examples, n)


def logits(model):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 40, (2, 9), generator=generator)
    targets = torch.randint(5, 40, (2, 6), generator=generator)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=targets).logits


def zero_outputs(model, removed):
    """Zero the weights of the removed units' outputs, by the names of each family."""
    with torch.no_grad():
        for side, layers in removed.items():
            for i, units in enumerate(layers):
                if model.config.model_type in ("t5", "mt5"):
                    block = getattr(model, side).block[i].layer[-1].DenseReluDense.wo
                else:
                    block = getattr(model.model, side).layers[i].fc2
                block.weight[:, units] = 0


def complement(kept):
    return {
        side: [torch.tensor(sorted(set(range(UNITS)) - set(layer.tolist()))) for layer in layers]
        for side, layers in kept.items()
    }


def test_a_student_with_all_units_equals_its_teacher(teacher):
    for units in (1, 1.0, UNITS):
        plan = plan_student(teacher.config, Student(encoder_ffn=units, decoder_ffn=units))
        assert plan.ffn == (None, None)
        assert plan.copies_full_encoder
        assert torch.equal(logits(shrink(teacher, plan)), logits(teacher))


def test_the_order_of_units_does_not_change_the_function(teacher):
    plan = replace(plan_student(teacher.config, Student()), ffn=(UNITS, UNITS))
    generator = torch.Generator().manual_seed(0)
    permutations = {
        side: [torch.randperm(UNITS, generator=generator) for _ in range(3)] for side in ("encoder", "decoder")
    }
    student = shrink(teacher, plan, units=permutations)
    assert not torch.equal(
        next(p for n, p in student.named_parameters() if "fc1" in n or ".wi" in n),
        next(p for n, p in teacher.named_parameters() if "fc1" in n or ".wi" in n),
    )
    # In double precision: in fp32, sums that are taken in another order change logits of about 10 by up to 2e-4.
    assert torch.allclose(logits(student.double()), logits(teacher.double()), atol=1e-4)


def test_a_pruned_student_computes_the_teacher_without_the_outputs_of_the_removed_units(teacher):
    plan = pruned_student(teacher)
    kept = random_units(teacher.config, plan, seed=3)
    student = shrink(teacher, plan, units=kept)
    assert families.ffn_units(student.config) == plan.ffn
    assert not torch.allclose(logits(student), logits(teacher), atol=1e-2)
    zero_outputs(teacher, complement(kept))
    assert torch.allclose(logits(student), logits(teacher), atol=1e-4)


def test_a_copied_layer_keeps_the_units_of_its_teacher_layer(teacher):
    plan = pruned_student(teacher, "1-2", copied=LayerChoice(encoder=[1], decoder=[2, 0]))
    kept = random_units(teacher.config, plan, seed=3)
    student = shrink(teacher, plan, units=kept)
    zero_outputs(teacher, complement(kept))
    unpruned = shrink(teacher, replace(plan, ffn=(None, None)))
    assert torch.allclose(logits(student), logits(unpruned), atol=1e-4)


def test_one_side_can_be_pruned_alone(tmp_path):
    teacher = load_model(save_tiny("marian", tmp_path / "m"))
    plan = plan_student(teacher.config, Student(decoder_ffn=8))
    assert (plan.ffn, plan.copies_full_encoder) == ((None, 8), True)
    student = shrink(teacher, plan, units=random_units(teacher.config, plan, seed=0))
    assert families.ffn_units(student.config) == (UNITS, 8)
    for name, weight in student.get_encoder().named_parameters():
        assert torch.equal(weight, dict(teacher.get_encoder().named_parameters())[name])
    assert not plan_student(teacher.config, Student(encoder_ffn=0.5)).copies_full_encoder


def test_scores_are_the_root_mean_square_of_each_units_output(folder, teacher):
    """Recomputed in float64, row by row and without padding, from the outputs of modules before the projection."""
    rows = calibration(folder, 6)
    scores = score_units(teacher, rows)
    model = load_model(folder).double()
    outputs = {"encoder": [[] for _ in range(2)], "decoder": [[] for _ in range(3)]}
    for side, stack in (("encoder", model.get_encoder()), ("decoder", model.get_decoder())):
        for i, layer in enumerate(stack.block if model.config.model_type in ("t5", "mt5") else stack.layers):
            projection = layer.layer[-1].DenseReluDense.wo if model.config.model_type in ("t5", "mt5") else layer.fc2
            projection.register_forward_hook(lambda _m, inputs, _o, s=side, i=i: outputs[s][i].append(inputs[0][0]))
    examples = rows.examples
    with torch.no_grad():
        for i in rows.rows:
            ids = torch.tensor([examples.sources[i]])
            model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([examples.targets[i]]))
    for side, stack in (("encoder", model.get_encoder()), ("decoder", model.get_decoder())):
        for i, layer in enumerate(stack.block if model.config.model_type in ("t5", "mt5") else stack.layers):
            projection = layer.layer[-1].DenseReluDense.wo if model.config.model_type in ("t5", "mt5") else layer.fc2
            vectors = torch.cat(outputs[side][i])[:, :, None] * projection.weight.detach().T  # tokens, units, width
            expected = vectors.pow(2).sum(-1).mean(0).sqrt()
            assert torch.allclose(scores[side][i], expected, rtol=1e-3)


def test_the_best_units_lose_less_than_the_worst(folder, teacher):
    plan, rows = pruned_student(teacher, decoder_ffn=0.5), calibration(folder)
    best = best_units(teacher, plan, rows)
    expected = logits(teacher)
    errors = [
        float((logits(shrink(teacher, plan, units=units)) - expected).pow(2).mean())
        for units in (best, complement(best))
    ]
    assert errors[0] < errors[1]


def test_units_of_another_checkpoints_decoder_are_ranked_on_that_checkpoint(tmp_path):
    teacher, other = (load_model(save_tiny("bart", tmp_path / str(seed), seed=seed)) for seed in (0, 1))
    plan, rows = pruned_student(teacher), calibration(tmp_path / "0")
    mixed, own, others = (
        best_units(teacher, plan, rows, other),
        best_units(teacher, plan, rows),
        best_units(other, plan, rows),
    )
    assert all(map(torch.equal, mixed["encoder"], own["encoder"]))
    assert all(map(torch.equal, mixed["decoder"], others["decoder"]))
    assert not all(map(torch.equal, mixed["decoder"], own["decoder"]))


def test_random_units_depend_on_the_seed_and_the_layer_only(tmp_path):
    config = load_model(save_tiny("bart", tmp_path / "m")).config
    plan = plan_student(config, Student(encoder_ffn=8, decoder_ffn=8))
    first, again, other = (random_units(config, plan, seed) for seed in (0, 0, 1))
    assert all(map(torch.equal, first["decoder"], again["decoder"]))
    assert not torch.equal(first["decoder"][0], other["decoder"][0])
    assert not torch.equal(first["decoder"][0], first["decoder"][1])
    layers = [*first["encoder"], *first["decoder"]]
    assert len(layers) == 5
    assert all(len(set(layer.tolist())) == 8 and layer.tolist() == sorted(layer) for layer in layers)
    fewer = random_units(config, plan_student(config, Student(size="1-1", decoder_ffn=8)), 0)
    assert torch.equal(fewer["decoder"][2], first["decoder"][2])


def test_a_random_decoder_can_have_fewer_units(tmp_path):
    teacher = load_model(save_tiny("bart", tmp_path / "m"))
    plan = plan_student(teacher.config, Student(size="2-2", init="random", decoder_ffn=8))
    student = shrink(teacher, plan, seed=3)
    assert student.get_decoder().layers[0].fc1.weight.shape == (8, 16)
    assert torch.isfinite(logits(student)).all()


def test_a_pruned_checkpoint_loads_and_decodes_the_same_text_with_both_engines(folder, teacher, tmp_path):
    plan = pruned_student(teacher, "2-2")
    student = shrink(teacher, plan, units=random_units(teacher.config, plan, seed=0))
    saved = tmp_path / "student"
    save_checkpoint(student, load_tokenizer(folder), saved)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(saved)
    assert families.ffn_units(loaded.config) == plan.ffn
    assert torch.equal(logits(loaded), logits(student))
    engine = open_ctranslate2({"student": saved, "cache": tmp_path / "cache"}, "student")
    greedy = replace(GREEDY, forced_bos_token_id=engine.generation_config.forced_bos_token_id)
    expected = open_engine(saved, "transformers").generate(TEXTS, greedy, max_source_tokens=50)
    assert first_texts(engine.generate(TEXTS, greedy, max_source_tokens=50)) == first_texts(expected)


def test_shares_are_rounded_to_units_and_numbers_are_exact(tmp_path):
    config = load_model(save_tiny("bart", tmp_path / "m")).config
    for value, units in ((0.5, 16), (0.26, 8), (0.001, 1), (0.999, None), (31, 31), (2, 2)):
        assert plan_student(config, Student(encoder_ffn=value)).ffn == (units, None)


def test_more_units_than_the_teachers_and_two_widths_for_t5_are_errors(tmp_path):
    bart, t5 = (load_model(save_tiny(family, tmp_path / family)).config for family in ("bart", "t5"))
    with pytest.raises(
        UserError, match=r"student\.decoder_ffn 33: the teacher has 32 feed-forward units in each decod"
    ):
        plan_student(bart, Student(decoder_ffn=33))
    for settings in ({"encoder_ffn": 0.5}, {"encoder_ffn": 0.5, "decoder_ffn": 8}):
        with pytest.raises(UserError, match="T5 has one feed-forward width for both sides"):
            plan_student(t5, Student(**settings))
    assert plan_student(t5, Student(encoder_ffn=0.5, decoder_ffn=16)).ffn == (16, 16)


def test_calibration_rows_are_spread_evenly_over_the_training_set():
    examples = Examples([[1]] * 10, [[2]] * 10, list(range(10)))
    assert Calibration.of(examples, 4).rows == [0, 2, 5, 7]
    assert Calibration.of(examples, 256).rows == list(range(10))
