"""A decoder block, forward and backward, in as few operations as its arithmetic takes.

autograd runs a block of a Llama as a hundred small operations, each over fresh memory, and adds up
the gradients of what several layers read one by one. Here the layers that read one input share
products and sums, and no more is kept than the backward pass reads.

Dimensions: T tokens of a pack, d width, H query and G key-value heads, w their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from expunge.fused.parts import (
    Gradients,
    Layer,
    normed,
    normed_back,
    products,
    products_back,
    rotated,
    rotated_back,
)
from expunge.low_rank import keep_mask
from expunge.short_attention import attended, attended_back

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_QKV, _O, _IN, _OUT = slice(0, 3), slice(3, 4), slice(4, 6), slice(6, 7)


@dataclass(frozen=True)
class Form:
    """What of a block is no tensor."""

    lengths: tuple[int, ...]
    width: int
    """w"""
    scaling: float
    eps: tuple[float, float]
    scales: tuple[float, ...]
    """Of the low-rank terms of LAYERS, that make up for dropped inputs too."""
    dropping: tuple[float, ...]
    """The shares of their inputs that are dropped."""
    kind: torch.dtype
    """That products are formed in; x has its own."""


def block(
    x: Tensor, cos: Tensor, sin: Tensor, form: Form, norms: tuple[Tensor, Tensor], layers: list[Any]
) -> Tensor:
    """x + attention(norm x), and to that its MLP(norm): (T, d) to (T, d).

    h = x + O attention(rotated Q n, rotated K n, V n),  n = norm₁ x
    y = h + D (silu(G m) ∘ U m),  m = norm₂ h

    `layers` are the (W, b, A, B) of LAYERS, None what one of them lacks; cos and sin (T, w).
    """
    flat = [part for layer in layers for part in layer]
    return _Block.apply(x, cos[:, None], sin[:, None], form, *norms, *flat)  # pyright: ignore


class _Block(torch.autograd.Function):
    """Gradients to x, to factors, and to weights and norms where those are trained."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, form: Form, *weights: Tensor | None
    ) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            first, second = weights[:2]
            assert first is not None and second is not None
            narrow = [None if part is None else part.to(form.kind) for part in weights[2:]]
            cos, sin = cos.to(form.kind), sin.to(form.kind)
            masks = [
                keep_mask(x.new_empty(len(x), a.shape[1], dtype=form.kind), share)
                if share and a is not None
                else None
                for a, share in zip(narrow[2::4], form.dropping, strict=True)
            ]
            layers = _layers(narrow, masks, form.scales)
            n, r1 = normed(x, first, form.eps[0])
            n = n.to(form.kind)
            (q, k, v), low_n = products(n, layers[_QKV])
            q, k = (rotated(heads.view(len(x), -1, form.width), cos, sin) for heads in (q, k))
            heads, kept = attended(q, k, v.view_as(k), form.lengths, form.scaling)
            heads = heads.view(len(x), -1)
            (h,), low_heads = products(heads, layers[_O])
            h = x + h
            m, r2 = normed(h, second, form.eps[1])
            m = m.to(form.kind)
            (gate, up), low_m = products(m, layers[_IN])
            opened = F.silu(gate)
            (y,), low_inner = products(opened * up, layers[_OUT])
        lows = [low_n, low_heads, low_m, low_inner]
        own = [x, cos, sin, first, second, n, r1, heads, h, m, r2, gate, up, opened]
        ctx.form, ctx.counts = form, (len(own), len(lows), len(narrow), len(masks))
        ctx.save_for_backward(*own, *lows, *narrow, *masks, *kept)
        return y.add_(h) if y.dtype == h.dtype else h + y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        form, saved = ctx.form, iter(ctx.saved_tensors)
        own, lows, narrow, masks = (list(islice(saved, count)) for count in ctx.counts)
        x, cos, sin, first, second, n, r1, heads, h, m, r2, gate, up, opened = own
        low_n, low_heads, low_m, low_inner = lows
        layers = _layers(narrow, masks, form.scales)
        to_first, to_second, to_weights = ctx.needs_input_grad[4:7]
        g: Tensor = gradients[0]

        outer = [g.to(form.kind)]
        of_down = products_back(outer, opened * up, low_inner, layers[_OUT], to_weights=to_weights)
        inner = of_down[0]
        to_up, to_gate = inner * opened, inner.mul_(up)
        torch.ops.aten.silu_backward.grad_input(to_gate, gate, grad_input=to_gate)
        outer = [to_gate, to_up]
        to_m, of_in = products_back(outer, m, low_m, layers[_IN], to_weights=to_weights)
        to_h, of_second = normed_back(to_m, h, second, r2, to_weight=to_second)
        to_h = to_h.to(g.dtype).add_(g)

        outer = [to_h.to(form.kind)]
        to_heads, of_o = products_back(outer, heads, low_heads, layers[_O], to_weights=to_weights)
        by_head = to_heads.view(len(x), -1, form.width)
        q, k, v = attended_back(by_head, list(saved), form.lengths, form.scaling)
        q, k = rotated_back(q, cos, sin), rotated_back(k, cos, sin)
        outer = [heads.view(len(x), -1) for heads in (q, k, v)]
        to_n, of_qkv = products_back(outer, n, low_n, layers[_QKV], to_weights=to_weights)
        to_x, of_first = normed_back(to_n, x, first, r1, to_weight=to_first)
        to_x = to_x.to(g.dtype).add_(to_h)
        found = [*of_qkv, *of_o, *of_in, *of_down[1]]
        return to_x, None, None, None, of_first, of_second, *_flat(found)


def _layers(
    flat: Sequence[Any], masks: Sequence[Tensor | None], scales: tuple[float, ...]
) -> list[Layer]:
    """The layers of (W, b, A, B) one after another."""
    parts = zip(flat[::4], flat[1::4], flat[2::4], flat[3::4], scales, masks, strict=True)
    return [Layer(*part) for part in parts]


def _flat(found: list[Gradients]) -> list[Tensor | None]:
    return [part for one in found for part in (one.weight, one.bias, one.a, one.b)]
