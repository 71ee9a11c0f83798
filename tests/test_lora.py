"""The low-rank term and its hand-written gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from expunge.lora import Lora, LoraLinear
from expunge.low_rank import keep_mask


def layer(dtype: torch.dtype = torch.float32) -> tuple[LoraLinear, torch.Tensor]:
    torch.manual_seed(0)
    made = LoraLinear(nn.Linear(5, 7).to(dtype), Lora(rank=3, alpha=6, dropout=0))
    nn.init.normal_(made.lora_B)
    return made, torch.randn(2, 4, 5).to(dtype).requires_grad_()


def plain(made: LoraLinear, x: torch.Tensor) -> torch.Tensor:
    """The definition, W x + b + (α/r) B A x, left to autograd."""
    a, b = made.lora_A.to(x.dtype), made.lora_B.to(x.dtype)
    return made.base(x) + 2 * F.linear(F.linear(x, a), b)


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)], ids=["f32", "bf16"]
)
def test_value_and_gradients_are_those_of_the_definition(dtype, error):
    made, x = layer(dtype)
    weights = torch.randn(2, 4, 7).to(dtype)
    found = []
    for forward in (made, lambda x: plain(made, x)):
        out = forward(x)
        inputs = [x, made.lora_A, made.lora_B, made.base.weight]
        found.append([out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)])
    for ours, right in zip(*found, strict=True):
        assert ours.dtype == right.dtype
        assert float((ours - right).norm() / right.norm()) < error


def test_the_input_of_a_first_layer_needs_no_gradient():
    made, x = layer()
    made(x.detach()).sum().backward()
    assert made.lora_A.grad is not None
    assert made.lora_B.grad is not None


def test_under_autocast_factors_stay_float32_and_get_float32_gradients():
    made, x = layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = made(x)
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
    assert made.lora_A.grad.dtype == made.lora_B.grad.dtype == torch.float32


def test_a_frozen_layer_and_its_term_in_one_function_give_the_same():
    made, x = layer(torch.bfloat16)
    weights = torch.randn(2, 4, 7).bfloat16()
    found = []
    for frozen in (True, False):  # with a trained base they are two
        made.base.requires_grad_(not frozen)
        assert made.joins(x) == frozen
        out = made(x)
        inputs = [x, made.lora_A, made.lora_B]
        found.append([out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)])
    for ours, right in zip(*found, strict=True):
        assert ours.dtype == right.dtype and ours.shape == right.shape
        assert float((ours - right).norm() / right.norm()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.999])
def test_a_share_of_inputs_is_dropped(dtype, share):
    x = torch.empty(300, 1001, dtype=dtype)
    torch.manual_seed(0)
    mask, other = keep_mask(x, share), keep_mask(x, share)
    torch.manual_seed(0)
    assert torch.equal(keep_mask(x, share), mask)
    assert mask.dtype == dtype and mask.shape == x.shape
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    spread = (share * (1 - share) / x.numel()) ** 0.5
    assert abs(float(mask.double().mean()) - (1 - share)) < 5 * spread + 2**-16
    both = float((mask.double() * other.double()).mean())  # independent
    assert abs(both - (1 - share) ** 2) < 10 * spread + 2**-15
    rows = mask.double().mean(1)  # no row, no column fares otherwise
    assert float((rows - rows.mean()).abs().max()) < 6 * (share * (1 - share) / 1001) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_is_of_the_inputs_of_a_and_the_kept_make_up_for_it(dtype):
    made, x = layer(dtype)
    made.base.requires_grad_(False)
    made.dropout = 0.5
    torch.manual_seed(3)
    out = made.train()(x)
    torch.manual_seed(3)
    a, b = made.lora_A.to(dtype), made.lora_B.to(dtype)
    right = made.base(x) + 4 * F.linear(F.linear(x * keep_mask(x, 0.5), a), b)
    weights = torch.randn_like(out)
    inputs = [x, made.lora_A, made.lora_B]
    one, two = (torch.autograd.grad((y * weights).sum(), inputs) for y in (out, right))
    for ours, theirs in zip((out.detach(), *one), (right.detach(), *two), strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.01
    assert not torch.equal(out, made.eval()(x))
