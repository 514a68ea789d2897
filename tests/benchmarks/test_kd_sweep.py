"""The comparison of a sweep with the released method: the precision of the frozen weights."""

import torch

from benchmarks.kd_sweep import FrozenValues


def test_frozen_weights_are_rounded_for_training_and_exact_for_scores():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    model[0].requires_grad_(False)
    model.register_buffer("bias", torch.full((1,), 0.1))
    exact, trained = model[0].weight.clone(), model[1].weight
    values = FrozenValues(model, torch.bfloat16)
    values.use_rounded()
    assert {p.dtype for p in model[0].parameters()} == {torch.bfloat16}
    assert model.get_buffer("bias").dtype == torch.bfloat16
    assert torch.equal(model[0].weight, exact.to(torch.bfloat16))
    assert model[1].weight is trained
    assert trained.dtype == torch.float32
    values.use_exact()
    assert torch.equal(model[0].weight, exact)
    assert model.get_buffer("bias").item() == torch.tensor(0.1).item()
