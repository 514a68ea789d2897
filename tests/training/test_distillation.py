"""The loss terms of a step against transformers' own forward, from the teacher and from the teacher cache."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from raydistill.config.run import LayerChoice, Loss, Run, Student
from raydistill.models import families
from raydistill.models.loading import load_model
from raydistill.teacher_cache.layout import CacheDtypes
from raydistill.training.teacher_states import frozen_lm_head_weight
from tests.factories.models import FAMILIES, T5_FORMS
from tests.factories.training import (
    loss_and_gradient,
    relative_distance,
    tiny_distillation,
    transformers_forward,
    with_cache,
)

BATCH = list(range(6))
ATTENTION_AND_COSINE = Loss(alpha_attention=1.0, alpha_cosine=1.0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", ["2-2", "1-2"])
def test_every_term_matches_the_forward_of_transformers(family, size, tmp_path):
    """Covers masks, the index of layer outputs, each model's own encoder, and biases and scales of the LM head."""
    distillation = tiny_distillation(family, tmp_path / "t", size)
    batch = [0, 1, 2, 5]
    sums, _ = loss_and_gradient(distillation, batch)
    student_output, labels = transformers_forward(distillation.student, distillation, batch)
    teacher_output, _ = transformers_forward(distillation.teacher, distillation, batch)
    real = labels != -100
    assert distillation.term_weights(batch)["logits"] == int(real.sum())
    assert sums["data"] == pytest.approx(float(student_output.loss) * int(real.sum()), rel=1e-4)
    p = F.log_softmax(teacher_output.logits[real].double() / 2, -1)
    q = F.log_softmax(student_output.logits[real].double() / 2, -1)
    assert sums["logits"] == pytest.approx(float((p.exp() * (p - q)).sum()) * 4, rel=1e-4)
    phi = [1, 2]  # ceil((i + 1) * 3 / 2) - 1
    teacher_layers = [teacher_output.decoder_hidden_states[n + 1] for n in phi]
    pairs = zip(student_output.decoder_hidden_states[1:], teacher_layers, strict=True)
    hidden = sum((a[real] - b[real]).pow(2).mean(-1).sum() for a, b in pairs)
    assert sums["hidden"] == pytest.approx(float(hidden), rel=1e-4)
    if size == "1-2":
        tokens = torch.zeros_like(student_output.encoder_last_hidden_state[..., 0], dtype=torch.bool)
        for row, i in enumerate(batch):
            tokens[row, : len(distillation.examples.sources[i])] = True
        states = (student_output.encoder_hidden_states[1] - teacher_output.encoder_hidden_states[2])[tokens]
        assert sums["encoder_hidden"] == pytest.approx(float(states.pow(2).mean(-1).sum()), rel=1e-4)
        assert distillation.term_weights(batch)["encoder_hidden"] == int(tokens.sum())
        over_student_encoder, _ = transformers_forward(
            distillation.teacher, distillation, batch, student_output.encoder_last_hidden_state
        )
        wrong_p = F.log_softmax(over_student_encoder.logits[real].double() / 2, -1)
        assert sums["logits"] != pytest.approx(float((wrong_p.exp() * (wrong_p - q)).sum()) * 4, rel=1e-2)
    else:
        assert "encoder_hidden" not in sums


def test_full_depth_copy_has_no_distillation_loss(tmp_path):
    distillation = tiny_distillation("bart", tmp_path / "t", "2-3")
    sums, _ = loss_and_gradient(distillation, [0, 1])
    assert sums["logits"] == pytest.approx(0, abs=1e-4)
    assert sums["hidden"] == pytest.approx(0, abs=1e-6)
    assert sums["data"] > 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", ["2-2", "1-2"])
def test_padding_does_not_change_the_sums(family, size, tmp_path):
    distillation = tiny_distillation(family, tmp_path / "t", size)
    lengths = {(len(distillation.examples.sources[i]), len(distillation.examples.targets[i])) for i in (0, 1, 3)}
    assert len(lengths) == 3
    padded, _ = loss_and_gradient(distillation, [0, 1, 3])
    single_rows = [loss_and_gradient(distillation, [i])[0] for i in (0, 1, 3)]
    assert padded == pytest.approx({term: sum(row[term] for row in single_rows) for term in padded}, rel=1e-4)


def test_layer_choice_sets_copied_and_supervised_layers(tmp_path):
    choice = Student(size="2-2", copied=LayerChoice(decoder=[1, 2]), supervised=LayerChoice(decoder=[0, 1]))
    distillation = tiny_distillation("bart", tmp_path / "t", choice)
    assert distillation.layers_needed == [0, 1, 2]  # the last one for the logits
    sums, _ = loss_and_gradient(distillation, [0])
    student_output, _ = transformers_forward(distillation.student, distillation, [0])
    teacher_output, _ = transformers_forward(distillation.teacher, distillation, [0])
    pairs = zip(student_output.decoder_hidden_states[1:], teacher_output.decoder_hidden_states[1:3], strict=True)
    hidden = sum((a - b).pow(2).mean(-1).sum() for a, b in pairs)
    assert sums["hidden"] == pytest.approx(float(hidden), rel=1e-4)


def soften_attention(distillation):
    """Scale down the queries of T5 in both models: unscaled attention of a tiny model is close to an argmax."""
    if distillation.student.config.model_type == "t5":
        with torch.no_grad():
            for model in (distillation.teacher, distillation.student):
                for name, weight in model.named_parameters():
                    weight.mul_(0.25 if name.endswith("Attention.q.weight") else 1)
    return distillation


@pytest.mark.parametrize("family", ["bart", "marian", "t5"])
@pytest.mark.parametrize(("method", "size"), [("kd", "2-2"), ("kd", "2-1"), ("sft", "2-2"), ("kd", "1-2")])
def test_cached_and_live_teacher_give_equal_losses_and_gradients(family, method, size, tmp_path):
    live = tiny_distillation(family, tmp_path / "t", size)
    if method == "sft":
        live = replace(live, method="sft", teacher=None)
    cached = with_cache(live, load_model(tmp_path / "t"), tmp_path / "cache")
    assert (cached.cached_encoder_states is not None) == (size != "1-2")
    assert bool(cached.cached_decoder_states) == (method == "kd")
    batch = [4, 0, 3]
    sums, gradient = loss_and_gradient(live, batch)
    cached_sums, cached_gradient = loss_and_gradient(cached, batch)
    assert cached_sums == pytest.approx(sums, rel=1e-5)
    assert relative_distance(cached_gradient, gradient) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_kd_of_a_pruned_student_is_equal_with_a_cached_and_a_live_teacher(family, tmp_path):
    """A pruned encoder is trained; otherwise the cached encoder states serve as for a student with all units."""
    encoder_ffn = 0.5 if family in T5_FORMS else None
    student = Student(size="2-2", encoder_ffn=encoder_ffn, decoder_ffn=0.5)
    live = tiny_distillation(family, tmp_path / "t", student)
    cached = with_cache(live, load_model(tmp_path / "t"), tmp_path / "cache")
    assert (cached.cached_encoder_states is not None) == (family not in T5_FORMS)
    assert live.encoder_supervised == (family in T5_FORMS)
    sums, gradient = loss_and_gradient(live, [4, 0, 3])
    cached_sums, cached_gradient = loss_and_gradient(cached, [4, 0, 3])
    assert all(map(math.isfinite, sums.values()))
    assert {"data", "logits", "hidden"} <= set(sums)
    assert cached_sums == pytest.approx(sums, rel=1e-5)
    assert relative_distance(cached_gradient, gradient) < 1e-5


@pytest.mark.parametrize("family", ["bart", "marian", "t5"])
@pytest.mark.parametrize("size", ["2-2", "2-1"])
def test_cached_and_live_teacher_agree_in_bf16(family, size, tmp_path):
    """Observed differences: terms up to 2.1e-4, gradients up to 0.012; the cache rounds states of the final norm."""
    live = soften_attention(tiny_distillation(family, tmp_path / "t", size))
    live = replace(live, lm_head_weight=frozen_lm_head_weight(live.student, torch.bfloat16))
    cached = with_cache(live, live.teacher, tmp_path / "cache", CacheDtypes("bf16", "bf16"))
    batch = [0, 1, 2, 3]
    exact, _ = loss_and_gradient(replace(live, lm_head_weight=None), batch)
    sums, gradient = loss_and_gradient(live, batch, "bf16")
    cached_sums, cached_gradient = loss_and_gradient(cached, batch, "bf16")
    assert sums != exact
    assert cached_sums == pytest.approx(sums, rel=5e-4)
    assert relative_distance(cached_gradient, gradient) < 0.025


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_rows_beyond_the_vocabulary_change_neither_losses_nor_gradients(family, tmp_path):
    """On a GPU the frozen LM head is padded to a multiple of 8 rows. Here the rows are large, not zeros."""
    live = soften_attention(tiny_distillation(family, tmp_path / "t"))
    weight = frozen_lm_head_weight(live.student, torch.bfloat16)
    padded = torch.cat([weight, torch.full((5, weight.shape[1]), 50.0, dtype=weight.dtype)])
    sums, gradient = loss_and_gradient(replace(live, lm_head_weight=weight), [0, 1, 2], "bf16")
    padded_sums, padded_gradient = loss_and_gradient(replace(live, lm_head_weight=padded), [0, 1, 2], "bf16")
    assert padded_sums == pytest.approx(sums, rel=1e-6)
    assert relative_distance(padded_gradient, gradient) < 1e-6


@pytest.mark.parametrize(
    ("storage", "term_tolerance", "gradient_tolerance"), [("bf16", 1e-2, 0.1), ("int8", 3e-2, 0.4)]
)
@pytest.mark.parametrize("family", ["bart", "marian", "t5"])
def test_rounded_cache_changes_losses_little(family, storage, term_tolerance, gradient_tolerance, tmp_path):
    """bf16 has a relative error of at most 2**-8 per value, int8 an error of at most the largest value / 254.

    The errors average out in the sums. Observed with int8, on models of width 16: up to 0.0124 of a
    term and 0.24 of the gradient.
    """
    live = soften_attention(tiny_distillation(family, tmp_path / "t"))
    cached = with_cache(live, live.teacher, tmp_path / "cache", CacheDtypes(storage, "fp32"))
    sums, gradient = loss_and_gradient(live, [0, 1, 2, 3])
    cached_sums, cached_gradient = loss_and_gradient(cached, [0, 1, 2, 3])
    assert cached_sums == pytest.approx(sums, rel=term_tolerance)
    assert 0 < relative_distance(cached_gradient, gradient) < gradient_tolerance


def test_cached_step_runs_neither_encoder_nor_teacher(tmp_path):
    live = tiny_distillation("bart", tmp_path / "t")
    cached = replace(with_cache(live, live.teacher, tmp_path / "cache"), teacher=None)

    def fail(*_args, **_kwargs):
        raise AssertionError("the encoder ran although its states are cached")

    expected = loss_and_gradient(live, [0, 1])
    cached.student.get_encoder().forward = fail
    sums, gradient = loss_and_gradient(cached, [0, 1])
    assert sums == pytest.approx(expected[0], rel=1e-5)
    assert relative_distance(gradient, expected[1]) < 1e-5


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_student_with_trained_embeddings_reads_cached_decoder_states(family, tmp_path):
    """Trained embeddings change the student's encoder and LM head: of the cache only decoder states apply."""
    live = tiny_distillation(family, tmp_path / "t")
    for parameter in families.embedding_parameters(live.student):
        parameter.requires_grad_(True)
    live = replace(live, encoder_shared=False, lm_head_shared=False)
    with torch.no_grad():
        for parameter in live.student.parameters():
            parameter.mul_(1.01)
    cached = with_cache(live, live.teacher, tmp_path / "cache")
    assert cached.cached_encoder_states is None
    assert sorted(cached.cached_decoder_states) == live.layers_needed

    sums, gradient = loss_and_gradient(live, [0, 3])
    cached.teacher.get_encoder().forward = cached.teacher.get_decoder().forward = None  # only the LM head is used
    cached_sums, cached_gradient = loss_and_gradient(cached, [0, 3])
    assert cached_sums == pytest.approx(sums, rel=1e-5)
    assert relative_distance(cached_gradient, gradient) < 1e-5


@pytest.mark.parametrize("family", ["bart", "pegasus", "mbart", "m2m100", "marian"])
def test_sdpa_masks_equal_the_padding_mask(family, tmp_path):
    distillation = tiny_distillation(family, tmp_path / "t")
    batch, student = distillation.read_batch([0, 1, 2]), distillation.student.eval()
    assert not batch.source_mask.all()
    with torch.no_grad():
        encoded = families.encode(student, batch.source_ids, batch.source_mask).last_hidden_state
        ids = families.shift_right(student, batch.labels)
        expected = families.decode(student, ids, encoded, batch.source_mask).last_hidden_state
        masks = families.sdpa_masks(student, ids, batch.source_mask)
        output = student.get_decoder()(ids, encoder_hidden_states=encoded, use_cache=False, **masks)
    torch.testing.assert_close(expected, output.last_hidden_state)


def term_sums(distillation):
    """The sum of every loss term over a batch."""
    _, sums = distillation.loss_terms(distillation.read_batch(BATCH), distillation.term_weights(BATCH))
    return {name: float(value) for name, value in sums.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_cosine_terms_match_the_forward_of_transformers(family, tmp_path):
    copy = tiny_distillation(family, tmp_path, "2-3", loss=ATTENTION_AND_COSINE)
    sums = term_sums(replace(copy, layer_plan=replace(copy.layer_plan, supervised_decoder=[0, 1, 2])))
    assert sums["attention"] == pytest.approx(0, abs=1e-6)
    assert sums["cosine"] == pytest.approx(0, abs=1e-3)
    shrunk = tiny_distillation(family, tmp_path, "2-2", loss=ATTENTION_AND_COSINE)
    sums = term_sums(shrunk)
    attention, cosine = attention_and_cosine_by_transformers(shrunk)
    assert sums["attention"] == pytest.approx(attention, rel=1e-3)
    assert sums["cosine"] == pytest.approx(cosine, rel=1e-3)
    assert attention > 0.1 < cosine


def attention_and_cosine_by_transformers(distillation):
    """The sums of both terms from the models' own forwards, row by row without padding."""
    attention = cosine = 0.0
    for model in (distillation.student, distillation.teacher):
        model.set_attn_implementation("eager")
    for i in BATCH:
        ids = torch.tensor([distillation.examples.sources[i]])
        labels = torch.tensor([distillation.examples.targets[i]])
        with torch.no_grad():
            student_output, teacher_output = (
                model(input_ids=ids, labels=labels, output_attentions=True, output_hidden_states=True, use_cache=False)
                for model in (distillation.student, distillation.teacher)
            )
        for layer, phi in enumerate(distillation.layer_plan.supervised_decoder):
            for name in ("decoder_attentions", "cross_attentions"):
                a, b = getattr(student_output, name)[layer], getattr(teacher_output, name)[phi]
                attention += float((a - b).pow(2).mean(dim=(1, 3)).sum())
        a, b = student_output.decoder_hidden_states[-1][0], teacher_output.decoder_hidden_states[-1][0]
        cosine += float((1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).sum())
    for model in (distillation.student, distillation.teacher):
        model.set_attn_implementation("sdpa")
    return attention, cosine


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_attention_maps_are_compared_before_dropout(family, tmp_path):
    """A copy of all layers has the teacher's maps, also while dropout zeroes a part of the weights in the forward."""
    copy = tiny_distillation(family, tmp_path, "2-3", loss=ATTENTION_AND_COSINE)
    student = copy.student
    modules = [m for name, m in student.get_decoder().named_modules() if name.endswith(("attn", "Attention"))]
    assert modules
    student.train()
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    for module in modules:
        module.dropout = 0.5
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    encoded = families.encode(copy.teacher, ids, torch.ones_like(ids)).last_hidden_state
    maps = [
        families.decode(m, ids, encoded, torch.ones_like(ids), attentions=True).attentions[0][0]
        for m in (copy.teacher, student)
    ]
    torch.testing.assert_close(maps[0], maps[1], rtol=1e-4, atol=1e-6)
    assert float((maps[1].sum(dim=-1) - 1).abs().max()) < 1e-5
    outputs = [
        families.decode(student, ids, encoded, torch.ones_like(ids), attentions=True).last_hidden_state
        for _ in range(2)
    ]
    assert not torch.equal(*outputs), "dropout still acts on the outputs"


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_attention_term_leaves_the_sdpa_kernel_set(family, tmp_path):
    live = tiny_distillation(family, tmp_path / "t", loss=ATTENTION_AND_COSINE)
    cached = replace(with_cache(live, live.teacher, tmp_path / "cache"), teacher=live.teacher)
    assert term_sums(cached) == pytest.approx(term_sums(live), rel=1e-4)
    assert live.student.config._attn_implementation == live.teacher.config._attn_implementation == "sdpa"


def test_teacher_decoder_attends_to_its_own_encoder(tmp_path):
    distillation = tiny_distillation("bart", tmp_path, "1-2", loss=ATTENTION_AND_COSINE)
    batch = distillation.read_batch(BATCH)
    with torch.no_grad():
        teacher_states = families.encode(distillation.teacher, batch.source_ids, batch.source_mask).last_hidden_state
        expected = families.decode(
            distillation.teacher,
            families.shift_right(distillation.teacher, batch.labels),
            teacher_states,
            batch.source_mask,
            attentions=True,
        )
    student_states = torch.zeros_like(teacher_states)
    output = distillation._run_teacher_decoder(batch, student_states, attentions=True)
    assert torch.equal(expected.attentions[0][1], output.attentions[0][1])


@pytest.mark.parametrize(
    ("loss", "terms"),
    [
        (Loss(alpha_hidden=0), {"data", "logits"}),
        (Loss(alpha_logits=0), {"data", "hidden"}),
        (Loss(alpha_hidden=0, alpha_logits=0, alpha_attention=1), {"data", "attention"}),
        (ATTENTION_AND_COSINE, {"data", "logits", "hidden", "attention", "cosine"}),
    ],
)
def test_term_with_zero_weight_is_not_computed(loss, terms, tmp_path):
    distillation = tiny_distillation("marian", tmp_path, loss=loss)
    sums = term_sums(distillation)
    assert set(sums) == set(distillation.term_weights(BATCH)) == terms
    assert all(math.isfinite(value) for value in sums.values())


def test_kd_without_a_distillation_term_is_rejected():
    with pytest.raises(ValueError, match="is method sft"):
        Run(name="r", teacher="bart", dataset="xsum", method="kd", loss=Loss(alpha_logits=0, alpha_hidden=0))


def test_attention_and_cosine_gradients_reach_only_the_student(tmp_path):
    loss = Loss(alpha_logits=0, alpha_hidden=0, alpha_attention=1, alpha_cosine=1)
    distillation = tiny_distillation("bart", tmp_path, loss=loss)
    scales = {**dict.fromkeys(distillation.term_weights(BATCH), 1.0), "data": 0.0}
    distillation.loss_terms(distillation.read_batch(BATCH), scales)[0].backward()
    layer = distillation.student.get_decoder().layers[0]
    assert float(layer.self_attn.q_proj.weight.grad.abs().max()) > 0
    assert float(layer.encoder_attn.k_proj.weight.grad.abs().max()) > 0
    assert all(p.grad is None for p in distillation.teacher.parameters())
