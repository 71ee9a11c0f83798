"""Float32 products on a CPU, about twice as fast.

torch gives them to MKL, which leaves more than half of the arithmetic of processors that are not
Intel's unused (benchmarks/products.py); here oneDNN gets them, as torch itself does in bfloat16.

Dimensions: T rows, (out, in) the shape of a weight.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST = 1 << 22
"""Multiplications from which on oneDNN is faster; below, its set-up takes longer than the work."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, for x (..., in) and W (out, in): (..., out)."""
    if not _fast(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _Product.apply(x, weight, bias)  # pyright: ignore[reportReturnType]
    return _product(x, weight, bias)


def product_back(y: Tensor, weight: Tensor) -> Tensor:
    """y W, for y (..., out) and W (out, in): (..., in)."""
    return product(y, weight.T)


class FastLinear(nn.Linear):
    """A linear layer whose forward pass goes through `product`."""

    def forward(self, input: Tensor) -> Tensor:  # the name that torch gives it
        """W x + b."""
        return product(input, self.weight, self.bias)


def speed_up(model: nn.Module) -> None:
    """Make every plain linear layer of `model` a FastLinear, its weights untouched."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FastLinear


class _Product(torch.autograd.Function):
    """y = x Wᵀ + b:   ∂x = ∂y W,   ∂W = ∂yᵀ x,   ∂b = Σ ∂y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wanted = ctx.needs_input_grad
        ctx.save_for_backward(x if wanted[1] else None, weight if wanted[0] else None)
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad,), (x, weight) = gradients, ctx.saved_tensors
        flat = grad.flatten(0, -2)
        to_x = None if weight is None else _product(grad, weight.T, None)
        to_weight = None if x is None else _product(flat.T, x.flatten(0, -2).T, None)
        return to_x, to_weight, flat.sum(0) if ctx.needs_input_grad[2] else None


def _fast(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and x.numel() > 0
        and x.numel() * len(weight) >= LEAST
        and torch.backends.mkldnn.is_available()
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
