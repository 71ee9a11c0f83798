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
    mask: Tensor | None = None
    """Of the inputs of A, as `low_rank.keep_mask` gives it; None where all are kept."""

    def kept(self, x: Tensor) -> Tensor:
        """The inputs of A: (T, in)."""
        return x if self.mask is None else x * self.mask


@dataclass
class Gradients:
    """Those of one layer, in float32; None where there is none or it was not asked for."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None


def products(x: Tensor, layers: Sequence[Layer]) -> tuple[list[Tensor], Tensor | None]:
    """What layers of one input give, each (T, out), and x Aᵀ of all their A's: (T, Σ r).

    One product serves the A's of all of them, unless each drops inputs of its own.
    """
    adapted = [layer for layer in layers if layer.a is not None]
    low = None
    if any(layer.mask is not None for layer in adapted):
        low = torch.cat([layer.kept(x) @ layer.a.T for layer in adapted if layer.a is not None], 1)
    elif adapted:
        low = x @ _stacked(adapted).T
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
    adapted = [(g, layer) for g, layer in zip(outer, layers, strict=True) if layer.a is not None]
    if low is None or not adapted:
        return given, found
    parts = [(g @ layer.b).mul_(layer.scale) for g, layer in adapted if layer.b is not None]
    to_a = []
    if any(layer.mask is not None for _, layer in adapted):
        for z, (_, layer) in zip(parts, adapted, strict=True):
            assert layer.a is not None
            to_x = z @ layer.a
            given.add_(to_x if layer.mask is None else to_x.mul_(layer.mask))
            to_a.append((z.T @ layer.kept(x)).float())
    else:
        z = torch.cat(parts, dim=1)
        given.addmm_(z, _stacked([layer for _, layer in adapted]))
        to_a = list((z.T @ x).float().split([part.shape[1] for part in parts]))
    for g, layer, one, columns in zip(outer, layers, found, _columns(layers), strict=True):
        if layer.b is not None:
            one.a = to_a.pop(0)
            one.b = (g.T @ low[:, columns]).float().mul_(layer.scale)
    return given, found


def _stacked(layers: Sequence[Layer]) -> Tensor:
    """The A's under one another: (Σ r, in)."""
    there = [layer.a for layer in layers if layer.a is not None]
    return there[0] if len(there) == 1 else torch.cat(there)


def _columns(layers: Sequence[Layer]) -> list[slice]:
    """Where the r's of each layer lie among those of all."""
    found, end = [], 0
    for layer in layers:
        start, end = end, end + (0 if layer.a is None else len(layer.a))
        found.append(slice(start, end))
    return found
