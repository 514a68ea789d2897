"""The choice of decoder layers by the divergence of the untrained student."""

import pytest
import torch

from raydistill.config.run import LayerChoice, Student
from raydistill.data.batching import Examples
from raydistill.models import families
from raydistill.models.calibration import Calibration
from raydistill.models.layer_choice import layers_to_copy
from raydistill.models.loading import load_model
from raydistill.models.measured_layers import measure_layers
from raydistill.models.shrinking import plan_student, shrink
from raydistill.models.tokenization import load_tokenizer, tokenize_sources, tokenize_targets
from tests.factories.models import FAMILIES, save_tiny
from tests.factories.training import text_pairs

PRE_NORM = ("mbart", "m2m100", "pegasus", "t5")  # a layer that adds nothing to its input is the identity


def calibration(folder, n=6):
    sources, targets = text_pairs(n)
    tokenizer = load_tokenizer(folder)
    examples = Examples(
        tokenize_sources(tokenizer, sources, 40), tokenize_targets(tokenizer, targets, 20), list(range(n))
    )
    return Calibration.of(examples)


@pytest.mark.parametrize("family", FAMILIES)
def test_divergence_is_the_kl_of_the_students_next_tokens(family, tmp_path):
    """The student is made by `shrink` here, and each row is computed alone, without padding, in float64."""
    folder = save_tiny(family, tmp_path / "t", logits_bias=True)
    teacher, rows = load_model(folder), calibration(folder)
    divergences = measure_layers(teacher, 2, rows)
    assert list(divergences.values()) == sorted(divergences.values())
    assert tuple(layers_to_copy(3, 2)) in divergences
    for layers, divergence in divergences.items():
        plan = plan_student(teacher.config, Student(size="2-2", copied=LayerChoice(decoder=list(layers))))
        student = shrink(teacher, plan)
        kl, tokens = 0.0, 0
        for i in rows.rows:
            ids = torch.tensor([rows.examples.sources[i]])
            labels = torch.tensor([rows.examples.targets[i]])
            with torch.no_grad():
                logits = [
                    model(input_ids=ids, labels=labels, use_cache=False).logits.double() for model in (teacher, student)
                ]
            p, q = (values.log_softmax(-1) for values in logits)
            kl += float((p.exp() * (p - q)).sum())
            tokens += labels.shape[1]
        assert divergence == pytest.approx(kl / tokens, rel=1e-3)


@pytest.mark.parametrize("family", PRE_NORM)
@pytest.mark.parametrize("idle", [1, 3])
def test_layers_that_add_nothing_are_removed_first(family, idle, tmp_path):
    folder = save_tiny(family, tmp_path / "t", decoder_layers=5)
    teacher = load_model(folder)
    with torch.no_grad():
        for name, weight in families.decoder_layers(teacher)[idle].named_parameters():
            if any(part in name for part in ("fc2", "out_proj", "Attention.o", "wo.")):
                weight.zero_()
    divergences = measure_layers(teacher, 4, calibration(folder))
    best = next(iter(divergences))
    assert best == tuple(layer for layer in range(5) if layer != idle)
    assert divergences[best] == pytest.approx(0, abs=1e-5)
    assert all(value > 1e-3 for layers, value in divergences.items() if layers != best)


def test_the_model_is_unchanged_and_all_rules_are_candidates(tmp_path):
    folder = save_tiny("bart", tmp_path / "t", decoder_layers=6)
    teacher = load_model(folder)
    divergences = measure_layers(teacher, 3, calibration(folder))
    for rule in ("spaced", "first", "middle", "last"):
        assert tuple(layers_to_copy(6, 3, rule)) in divergences
    assert len(families.decoder_layers(teacher)) == 6
    ids = torch.tensor([[5, 6, 7, 2]])
    with torch.no_grad():
        logits = [m(input_ids=ids, labels=ids).logits for m in (teacher, load_model(folder))]
    assert torch.equal(*logits)
