"""The low-rank term of an adapted layer, forward and backward.

Dimensions: r rank, (out, in) the shape of the layer. ΔW = scale · B A, A (r, in), B (out, r).
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def keep_mask(x: Tensor, share: float) -> Tensor:
    """1 where an input is kept, 0 where it is dropped, a `share` of them: shaped as x, of its type.

    torch draws such masks on a CPU by one thread and a number each, which takes as long as the rest
    of a layer. Here four numbers of 15 bits come of one of 64 bits, so a share is met to 2⁻¹⁶.
    """
    if x.device.type != "cpu":
        return torch.empty_like(x).bernoulli_(1 - share)
    seed = int(torch.randint(2**62, (1,)))
    drawn = np.random.SFC64(seed).random_raw(-(-x.numel() // 4)).view(np.int16)[: x.numel()]
    bits = torch.from_numpy(drawn).view(x.shape).bitwise_and_(0x7FFF)
    bits = bits.neg_().add_(round(share * 2**15) - 1).bitwise_right_shift_(15)  # -1 where kept
    if x.dtype == torch.bfloat16:
        return bits.bitwise_and_(0x3F80).view(torch.bfloat16)  # 1.0, or 0
    return bits.neg_().to(x.dtype)


def adapted(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """W x + b + scale · B A x of a frozen W: (..., in) to (..., out)."""
    return _Adapted.apply(x, weight, bias, a, b, scale)  # pyright: ignore[reportReturnType]


def with_term(x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """y + scale · B A x: (..., in) and (..., out) to (..., out)."""
    return _LowRank.apply(x, y, a, b, scale)  # pyright: ignore[reportReturnType]


class _Adapted(torch.autograd.Function):
    """W x + b + scale · B A x of a frozen W, each sum formed where its first part lies.

    With g = ∂y and z = scale · g B:   ∂x = g W + z A,   ∂A = zᵀ x,   ∂B = scale · gᵀ (x Aᵀ)
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        flat, a, b = x.flatten(0, -2), a.to(x.dtype), b.to(x.dtype)
        low = flat @ a.T  # (tokens, r)
        y = F.linear(x, w, bias)  # no view of another, for a layer may add to it in place
        y.view(-1, y.shape[-1]).addmm_(low, b.T, alpha=scale)
        ctx.save_for_backward(flat, w, low, a, b)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        x, w, low, a, b = ctx.saved_tensors
        grad = gradients[0]
        flat = grad.flatten(0, -2)
        z = (flat @ b).mul_(ctx.scale)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = (flat @ w).addmm_(z, a).view(*grad.shape[:-1], -1)
        to_a, to_b = z.T @ x, flat.T @ low
        return to_x, None, None, to_a.float(), to_b.float().mul_(ctx.scale), None


class _LowRank(torch.autograd.Function):
    """y + scale · x Aᵀ Bᵀ, with the factors cast to the type of y and their gradients cast back.

    With g = ∂y and z = scale · g B:   ∂x = z A,   ∂A = zᵀ x,   ∂B = scale · gᵀ (x Aᵀ)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        flat, a, b = x.flatten(0, -2), a.to(y.dtype), b.to(y.dtype)
        low = flat @ a.T  # (tokens, r)
        ctx.save_for_backward(flat, low, a, b)
        ctx.scale = scale
        made = torch.empty_like(y, memory_format=torch.contiguous_format)
        torch.addmm(y.flatten(0, -2), low, b.T, alpha=scale, out=made.view(-1, y.shape[-1]))
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, Tensor, Tensor, Tensor, None]:
        x, low, a, b = ctx.saved_tensors
        grad = gradients[0]
        flat = grad.flatten(0, -2)
        z = (flat @ b).mul_(ctx.scale)
        to_x = (z @ a).view(*grad.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        to_a, to_b = z.T @ x, flat.T @ low
        return to_x, grad, to_a.float(), to_b.float().mul_(ctx.scale), None
