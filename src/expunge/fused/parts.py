"""The parts of a decoder block, each with its gradient: norm, rotation, linear layers of one input.

Dimensions: T tokens, d width, (out, in) the shape of a layer, r rank, H heads, w their width.
Every function here runs without autograd.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm, and r = 1/√(mean x² + eps) of each row: (T, d), (T, 1).

    y = W ∘ (r x), r x rounded to the type of x as transformers does.
    """
    wide = x.to(torch.float32, copy=True)
    r = torch.linalg.vecdot(wide, wide).div_(x.shape[1]).add_(eps).rsqrt_()[:, None]
    return wide.mul_(r).to(x.dtype).mul_(weight), r


def normed_back(
    g: Tensor, x: Tensor, weight: Tensor, r: Tensor, *, to_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of RMSNorm to x, (T, d) float32, and to W if asked for.

    With x̂ = r x and u = W ∘ g:   ∂x = r (u - x̂ mean(u ∘ x̂)),   ∂W = Σ_rows g ∘ x̂
    """
    unit, u = x.float() * r, (g * weight).float()
    of_weight = (g.float() * unit).sum(0).to(weight.dtype) if to_weight else None
    u.addcmul_(unit, torch.linalg.vecdot(u, unit)[:, None], value=-1 / x.shape[1]).mul_(r)
    return u, of_weight


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, (T, H, w) with cos and sin (T, 1, w):   y = (x₁c₁ - x₂s₁, x₂c₂ + x₁s₂)."""
    half = x.shape[2] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return y


def rotated_back(g: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient to x of `rotated`:   ∂x = (g₁c₁ + g₂s₂, g₂c₂ - g₁s₁)."""
    half = g.shape[2] // 2
    x = g * cos
    x[..., :half].addcmul_(g[..., half:], sin[..., half:])
    x[..., half:].addcmul_(g[..., :half], sin[..., :half], value=-1)
    return x


@dataclass(frozen=True)
class Layer:
    """A linear layer, W x + b + scale · B A x: W (out, in), A (r, in), B (out, r)."""

    weight: Tensor
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0


@dataclass
class Gradients:
    """Those of one layer, in float32; None where there is none or it was not asked for."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None


def products(x: Tensor, layers: Sequence[Layer]) -> tuple[list[Tensor], Tensor | None]:
    """What layers of one input give, each (T, out), and x Aᵀ of all their A's: (T, Σ r).

    One product serves the A's of all of them.
    """
    stacked = _stacked(layers)
    low = None if stacked is None else x @ stacked.T
    outputs = [F.linear(x, layer.weight, layer.bias) for layer in layers]
    for y, layer, columns in zip(outputs, layers, _columns(layers), strict=True):
        if low is not None and layer.b is not None:
            y.addmm_(low[:, columns], layer.b.T, alpha=layer.scale)
    return outputs, low


def products_back(
    outer: Sequence[Tensor],
    x: Tensor,
    low: Tensor | None,
    layers: Sequence[Layer],
    *,
    to_weights: bool,
) -> tuple[Tensor, list[Gradients]]:
    """The gradients of `products`, from those of what it gave: to x (T, in), and of each layer.

    With z = scale · g B of each:

    ∂x = Σ g W + z A,   ∂W = gᵀ x,   ∂b = Σ_rows g,   ∂A = zᵀ x,   ∂B = scale · gᵀ (x Aᵀ)
    """
    found = [Gradients() for _ in layers]
    given = outer[0] @ layers[0].weight
    for g, layer in zip(outer[1:], layers[1:], strict=True):
        given.addmm_(g, layer.weight)
    if to_weights:
        for g, layer, one in zip(outer, layers, found, strict=True):
            one.weight = (g.T @ x).float()
            one.bias = None if layer.bias is None else g.sum(0, dtype=torch.float32)
    stacked = _stacked(layers)
    if stacked is None or low is None:
        return given, found
    z = torch.cat(
        [
            (g @ at.b).mul_(at.scale)
            for g, at in zip(outer, layers, strict=True)
            if at.b is not None
        ],
        dim=1,
    )
    given.addmm_(z, stacked)
    to_a = (z.T @ x).float()
    for g, layer, one, rows in zip(outer, layers, found, _columns(layers), strict=True):
        if layer.b is not None:
            one.a = to_a[rows]
            one.b = (g.T @ low[:, rows]).float().mul_(layer.scale)
    return given, found


def _stacked(layers: Sequence[Layer]) -> Tensor | None:
    """The A's under one another: (Σ r, in)."""
    there = [layer.a for layer in layers if layer.a is not None]
    if len(there) < 2:
        return there[0] if there else None
    return torch.cat(there)


def _columns(layers: Sequence[Layer]) -> list[slice]:
    """Where the r's of each layer lie among those of all."""
    found, end = [], 0
    for layer in layers:
        start, end = end, end + (0 if layer.a is None else len(layer.a))
        found.append(slice(start, end))
    return found
