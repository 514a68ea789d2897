"""The paper's variations of distillation (section 6.3): attention maps, cosine loss, and what is left out."""

import math
from dataclasses import replace

import pytest
import torch

from raydistill.config.run import Loss, Run
from raydistill.models import families
from raydistill.training.losses import attention_mse, cosine_distance
from tests.test_training import tiny, with_stores
from tests.tiny import FAMILIES

BATCH = list(range(6))
BOTH = Loss(alpha_attention=1.0, alpha_cosine=1.0)


def sums(supervision, batch=None):
    """Each term's sum over a batch."""
    batch = batch or BATCH
    return {k: float(v) for k, v in supervision.terms(supervision.read(batch), supervision.weights(batch))[1].items()}


def test_cosine_is_one_less_the_cosine_summed_over_tokens():
    a = torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]])
    b = torch.tensor([[4.0, 3.0], [0.0, 5.0], [-1.0, 0.0]])
    # cosines by hand: (12 + 12) / 25, 0 and -1
    assert float(cosine_distance(a, b)) == pytest.approx(1 - 24 / 25 + 1 + 2)
    assert float(cosine_distance(a, 7 * a)) == pytest.approx(0, abs=1e-6)


def test_attention_is_the_squared_error_over_real_keys_and_tokens():
    ours = torch.tensor(
        [[[[1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0], [0.2, 0.8]]]]
    )  # a row, two heads, two tokens, two keys
    theirs = torch.tensor([[[[1.0, 0.0], [0.1, 0.9]], [[1.0, 0.0], [0.2, 0.8]]]])
    real, keys = torch.tensor([[True, True]]), torch.tensor([2])
    # only one head's second token differs: (0.4 ** 2 + 0.4 ** 2) / 2 keys / 2 heads
    assert float(attention_mse(ours, theirs, real, keys)) == pytest.approx(0.08)
    assert float(attention_mse(ours, theirs, torch.tensor([[True, False]]), keys)) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_copy_pays_nothing_and_a_shrunk_student_what_is_worked_out_apart(family, tmp_path):
    whole = tiny(family, tmp_path, size="2-3", loss=BOTH)
    found = sums(replace(whole, plan=replace(whole.plan, supervised_decoder=[0, 1, 2])))
    assert found["attention"] == pytest.approx(0, abs=1e-6)
    assert found["cosine"] == pytest.approx(0, abs=1e-3)
    shrunk = tiny(family, tmp_path, size="2-2", loss=BOTH)
    found = sums(shrunk)
    attention, cosine = by_transformers(shrunk)
    assert found["attention"] == pytest.approx(attention, rel=1e-3)
    assert found["cosine"] == pytest.approx(cosine, rel=1e-3)
    assert attention > 0.1 < cosine


def by_transformers(supervision):
    """Both terms from the models' own forwards, one row after the other, so without any padding."""
    attention = cosine = 0.0
    for model in (supervision.student, supervision.teacher):
        model.set_attn_implementation("eager")
    for i in BATCH:
        ids = torch.tensor([supervision.examples.sources[i]])
        labels = torch.tensor([supervision.examples.targets[i]])
        with torch.no_grad():
            ours, theirs = (
                model(input_ids=ids, labels=labels, output_attentions=True, output_hidden_states=True, use_cache=False)
                for model in (supervision.student, supervision.teacher)
            )
        for layer, phi in enumerate(supervision.plan.supervised_decoder):
            for name in ("decoder_attentions", "cross_attentions"):
                a, b = getattr(ours, name)[layer], getattr(theirs, name)[phi]
                attention += float((a - b).pow(2).mean(dim=(1, 3)).sum())
        a, b = ours.decoder_hidden_states[-1][0], theirs.decoder_hidden_states[-1][0]
        cosine += float((1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).sum())
    for model in (supervision.student, supervision.teacher):
        model.set_attn_implementation("sdpa")
    return attention, cosine


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_from_the_cache_both_are_the_same_and_attention_goes_back_to_the_fast_kernel(family, tmp_path):
    live = tiny(family, tmp_path / "t", loss=BOTH)
    cached = replace(with_stores(live, live.teacher, tmp_path / "cache"), teacher=live.teacher)
    assert sums(cached) == pytest.approx(sums(live), rel=1e-4)
    assert live.student.config._attn_implementation == live.teacher.config._attn_implementation == "sdpa"


def test_with_an_encoder_that_is_shrunk_the_teacher_attends_to_its_own(tmp_path):
    supervision = tiny("bart", tmp_path, size="1-2", loss=BOTH)
    batch = supervision.read(BATCH)
    with torch.no_grad():
        own = families.encode(supervision.teacher, batch.ids, batch.mask).last
        wanted = families.decode(
            supervision.teacher,
            families.shift_right(supervision.teacher, batch.labels),
            own,
            batch.mask,
            attentions=True,
        )
    taken = supervision._teacher_decoder(batch, torch.zeros_like(own), attentions=True)
    assert torch.equal(wanted.attentions[0][1], taken.attentions[0][1])


@pytest.mark.parametrize(
    ("loss", "terms"),
    [
        (Loss(alpha_hidden=0), {"data", "logits"}),
        (Loss(alpha_logits=0), {"data", "hidden"}),
        (Loss(alpha_hidden=0, alpha_logits=0, alpha_attention=1), {"data", "attention"}),
        (BOTH, {"data", "logits", "hidden", "attention", "cosine"}),
    ],
)
def test_a_term_without_weight_is_not_worked_out(loss, terms, tmp_path):
    supervision = tiny("marian", tmp_path, loss=loss)
    found = sums(supervision)
    assert set(found) == set(supervision.weights(BATCH)) == terms
    assert all(math.isfinite(value) for value in found.values())


def test_distilling_nothing_is_refused():
    with pytest.raises(ValueError, match="is method sft"):
        Run(name="r", teacher="bart", dataset="xsum", method="kd", loss=Loss(alpha_logits=0, alpha_hidden=0))


def test_gradients_of_both_reach_the_student_and_not_the_teacher(tmp_path):
    supervision = tiny("bart", tmp_path, loss=Loss(alpha_logits=0, alpha_hidden=0, alpha_attention=1, alpha_cosine=1))
    scales = {**dict.fromkeys(supervision.weights(BATCH), 1.0), "data": 0.0}
    supervision.terms(supervision.read(BATCH), scales)[0].backward()
    layer = supervision.student.get_decoder().layers[0]
    assert float(layer.self_attn.q_proj.weight.grad.abs().max()) > 0
    assert float(layer.encoder_attn.k_proj.weight.grad.abs().max()) > 0
    assert all(p.grad is None for p in supervision.teacher.parameters())
