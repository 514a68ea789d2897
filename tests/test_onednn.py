"""Linear layers through oneDNN: the same results as torch's own, the same models otherwise."""

import copy

import pytest
import torch
from torch import nn

from raydistill.models import onednn_linear

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no oneDNN product"
)


@pytest.fixture(autouse=True)
def on_any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products are right on every CPU that torch has oneDNN for; only their speed is not."""
    monkeypatch.setattr(onednn_linear, "helps", lambda: True)
    monkeypatch.setattr(onednn_linear, "SMALLEST", 0)
    monkeypatch.setattr(onednn_linear, "SMALLEST_WEIGHT", {"training": 0, "inference": 0})


@pytest.mark.parametrize("rows", [1, 3, 17, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_results_and_gradients_are_those_of_float64(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(48, 72, bias=bias)
    exact = copy.deepcopy(layer).double()
    onednn_linear.quicken(layer)
    assert type(layer) is onednn_linear.Linear
    inputs, slope = torch.randn(2, rows, 48), torch.randn(2, rows, 72)
    ours, theirs = inputs.clone().requires_grad_(), inputs.double().requires_grad_()
    found, wanted = layer(ours), exact(theirs)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)
    found.backward(slope)
    wanted.backward(slope.double())
    torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]
    for mine, other in zip(layer.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad.float(), rtol=1e-5, atol=5e-5)  # type: ignore[union-attr]


def test_only_what_is_trained_gets_a_gradient() -> None:
    layer = nn.Linear(8, 8)
    onednn_linear.quicken(layer)
    layer.weight.requires_grad_(False)
    layer(torch.randn(4, 8)).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None


def test_names_weights_and_subclasses_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    onednn_linear.quicken(model)
    assert type(model[1]) is nn.modules.linear.NonDynamicallyQuantizableLinear
    copied = copy.deepcopy(model)
    assert type(copied[0]) is onednn_linear.Linear
    assert copied[0].weight is not model[0].weight
    assert {name: weight.tolist() for name, weight in copied.state_dict().items()} == {
        name: weight.tolist() for name, weight in before.items()
    }


def test_bf16_autocast_goes_the_usual_way() -> None:
    layer = nn.Linear(16, 16)
    plain = copy.deepcopy(layer)
    onednn_linear.quicken(layer)
    inputs = torch.randn(3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(inputs), plain(inputs))
        assert layer(inputs).dtype == torch.bfloat16


def test_nothing_is_changed_where_it_does_not_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn_linear, "helps", lambda: False)
    layer = nn.Linear(4, 4)
    onednn_linear.quicken(layer)
    assert type(layer) is nn.Linear


def test_numbers_of_rows_are_few() -> None:
    sizes = {len(onednn_linear._filled(torch.zeros(n, 1))) for n in range(1, 1025)}
    assert len(sizes) <= 8 * 8
    assert all(len(onednn_linear._filled(torch.zeros(n, 1))) <= n * 9 / 8 + 1 for n in range(1, 1025))
