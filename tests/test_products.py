"""Products in float32: equal to torch's within rounding, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from expunge.products import FastLinear, product, speed_up


@pytest.fixture(autouse=True)
def all_sizes(monkeypatch):
    """Small products go the same way as large ones."""
    monkeypatch.setattr("expunge.products.LEAST", 0)


@pytest.fixture
def given():
    rng = torch.Generator().manual_seed(0)
    return torch.randn(2, 5, 24, generator=rng), torch.randn(40, 24, generator=rng)


@torch.no_grad()
def test_it_is_the_product_of_torch_within_rounding(given):
    x, weight = given
    bias = torch.arange(40.0)
    assert torch.allclose(product(x, weight, bias), F.linear(x, weight, bias), atol=1e-4)
    assert torch.allclose(product(x.mT.mT[:, ::2], weight), F.linear(x[:, ::2], weight), atol=1e-4)
    assert product(x[:, :0], weight).shape == (2, 0, 40)


@torch.no_grad()
def test_other_types_are_left_to_torch(given):
    x, weight = given
    for kind in (torch.bfloat16, torch.float64):
        assert torch.equal(
            product(x.to(kind), weight.to(kind)), F.linear(x.to(kind), weight.to(kind))
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product(x, weight).dtype == torch.bfloat16


@pytest.mark.parametrize("strided", [False, True])
def test_gradients_are_those_of_torch(given, strided):
    """Of x, W and b; a weight may be a transposed view."""
    x, weight = given
    bias = torch.arange(40.0) / 40
    found = []
    for function in (product, F.linear):
        leaves = [t.clone().requires_grad_() for t in (x, weight.T if strided else weight, bias)]
        y = function(leaves[0], leaves[1].T if strided else leaves[1], leaves[2])
        found.append(torch.autograd.grad((y * y.detach().cos()).sum(), leaves))
    for ours, torchs in zip(*found, strict=True):
        assert torch.allclose(ours, torchs, atol=1e-3)


def test_a_second_derivative_is_refused(given):
    x, weight = given
    (slope,) = torch.autograd.grad(
        product(x.requires_grad_(), weight).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.sum().backward()


def test_no_gradient_is_formed_that_is_not_wanted(given):
    x, weight = given
    frozen = product(x.requires_grad_(), weight)
    assert frozen.grad_fn.saved_tensors[0] is None
    (to_x,) = torch.autograd.grad(frozen.sum(), x)
    assert torch.allclose(to_x, weight.sum(0).expand_as(x), atol=1e-4)


def test_only_plain_layers_are_replaced():
    class Other(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(2, 2), Other(2, 2), nn.ReLU())
    speed_up(model)
    assert [type(m) for m in model] == [FastLinear, Other, nn.ReLU]
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]


@torch.no_grad()
def test_small_products_are_left_to_torch(given, monkeypatch):
    x, weight = given
    asked = []
    monkeypatch.setattr("expunge.products._product", lambda *a: asked.append(a))
    monkeypatch.setattr("expunge.products.LEAST", 10 * 24 * 40 + 1)
    assert torch.equal(product(x, weight), F.linear(x, weight))
    assert not asked
    monkeypatch.setattr("expunge.products.LEAST", 10 * 24 * 40)
    product(x, weight)
    assert len(asked) == 1
