"""What is read off the output head: log-probs of targets, and the KL to a reference.

Dimensions: N scored tokens, d width, V vocabulary, n tokens of a block. Logits exist a block at a
time; no [N x V] matrix is ever held.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expunge.products import product, product_back
from expunge.softmax import Block

BLOCK = 256
"""Scored tokens whose logits are held at once."""


@dataclass(frozen=True)
class Anchor:
    """What the reference says of N tokens, for the KL to it; see `anchor_of` and `token_kl`.

    Where the head is frozen, two things of each distribution suffice: its mean row of the head and
    its entropy. Where the head moves, the reference's states and its own head are kept.

    Rows are kept in the type of the states. What that rounds off, times the reference's state, is
    added to the entropy: the KL is then wrong by the rounding times how far the state has moved.
    """

    rows: Tensor  # (N, d) mean rows of the head; final hidden states where `head` is given
    entropies: Tensor | None = None  # (N,)
    head: Tensor | None = None  # (V, d)


def joined(anchors: Sequence[Anchor], device: torch.device) -> Anchor | None:
    """The anchors of some sequences as one, on a device; None where there are none."""
    if not anchors:
        return None
    entropies = [anchor.entropies for anchor in anchors if anchor.entropies is not None]
    return Anchor(
        torch.cat([anchor.rows for anchor in anchors]).to(device),
        torch.cat(entropies).to(device) if entropies else None,
        anchors[0].head,
    )


def token_logps(states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """log p(target) for each state, float32, logits a block at a time: (N,).

    log p(y | h) = h·W_y - log Σ_v exp(h·W_v)
    """
    return _TokenLogps.apply(states, head, targets)  # pyright: ignore[reportReturnType]


def token_logps_and_kl(
    states: Tensor, head: Tensor, targets: Tensor, anchor: Anchor
) -> tuple[Tensor, Tensor]:
    """log p(target), and KL(reference || current) over the whole vocabulary: both (N,).

    The head is frozen, so the reference's logits are not needed again: with p = softmax(W h) and
    the mean row W̄_p = Σ_v p_v W_v,

        KL(q || p) = H(p) - H(q) + (W̄_p - W̄_q)·h,   ∂KL/∂h = W̄_p - W̄_q,   ∂log p(y)/∂h = W_y - W̄_p

    since Σ_v q_v log p_v = W̄_q·h - log Σ_v exp(h·W_v). That is one product with the head and one
    back for both, where logits of q take two more products.
    """
    assert anchor.entropies is not None
    return _TokenLogpsAndKL.apply(  # pyright: ignore[reportReturnType]
        states, head, targets, anchor.rows, anchor.entropies
    )


def token_kl(states: Tensor, head: Tensor, anchor: Anchor) -> Tensor:
    """KL(reference || current) over the whole vocabulary, logits a block at a time: (N,).

        KL = Σ_v q_v (log q_v - log p_v),   p = softmax(W h),  q = softmax(W_ref h_ref)

    An anchor without a head of its own takes `head` as frozen.
    """
    if anchor.head is None:
        none = torch.zeros(len(states), dtype=torch.int64, device=states.device)
        return token_logps_and_kl(states, head, none, anchor)[1]
    return _TokenKL.apply(states, anchor.rows, head, anchor.head)  # pyright: ignore


@torch.no_grad()
def anchor_of(states: Tensor, head: Tensor) -> Anchor:
    """The anchor of a frozen head: of each state its distribution's mean row and entropy."""
    none = torch.zeros(len(states), dtype=torch.int64, device=states.device)
    return logps_and_anchor(states, head, none)[1]


@torch.no_grad()
def logps_and_anchor(states: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Anchor]:
    """log p(target) (N,), and the anchor of a frozen head, from the same logits."""
    logps = torch.empty(len(states), dtype=torch.float32, device=states.device)
    rows, entropies = torch.empty_like(states), torch.empty_like(logps)
    weight = head.to(states.dtype)
    for block in blocks(len(states)):
        here = Block.of(states[block], weight)
        logps[block] = here.logps(targets[block])
        mean = here.mean_row(weight)
        rows[block] = mean
        entropies[block] = here.entropy() + _along(mean - rows[block], states[block])
    return logps, Anchor(rows, entropies)


class _TokenLogps(torch.autograd.Function):
    """∂/∂h log p(y|h) = W_y - p·W is formed in the forward pass, so backward is one product.

    A trainable head needs its own gradient, Σ g (1_y - p) hᵀ, and logits once more for it.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        logps = torch.empty(len(states), dtype=torch.float32, device=states.device)
        weight = head.to(states.dtype)
        slope = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        for block in blocks(len(states)):
            here = Block.of(states[block], weight)
            logps[block] = here.logps(targets[block])
            if slope is not None:
                slope[block] = -product_back(here.residual(targets[block]), weight)
        trained = (states, weight) if ctx.needs_input_grad[1] else (None, None)
        ctx.save_for_backward(slope, *trained, targets)
        ctx.kind = head.dtype
        return logps

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, Tensor | None, None]:
        slope, states, weight, targets = ctx.saved_tensors
        grad = gradients[0]
        to_states = None if slope is None else slope * grad[:, None].to(slope.dtype)
        if states is None:
            return to_states, None, None
        to_head = None
        for block in blocks(len(states)):
            residual = Block.of(states[block], weight).residual(targets[block])
            residual.mul_(-grad[block, None].to(residual.dtype))
            part = product(residual.T, states[block].T).float()
            to_head = part if to_head is None else to_head.add_(part)
        return to_states, None if to_head is None else to_head.to(ctx.kind), None


class _TokenLogpsAndKL(torch.autograd.Function):
    """Both slopes are formed in the forward pass from one product with the frozen head."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, head: Tensor, targets: Tensor, rows: Tensor, entropies: Tensor
    ) -> tuple[Tensor, Tensor]:
        weight, rows = head.to(states.dtype), rows.to(states.dtype)
        logps = torch.empty(len(states), dtype=torch.float32, device=states.device)
        kl, to_logps, to_kl = (torch.empty_like(one) for one in (logps, states, states))
        for block in blocks(len(states)):
            here = Block.of(states[block], weight)
            logps[block] = here.logps(targets[block])
            mean = here.mean_row(weight)
            further = mean - rows[block]
            kl[block] = here.entropy() + _along(further, states[block]) - entropies[block]
            to_logps[block], to_kl[block] = weight[targets[block]] - mean, further
        ctx.save_for_backward(to_logps, to_kl)
        return logps, kl

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None, None]:
        slopes = zip(ctx.saved_tensors, gradients, strict=True)
        one, two = (slope * grad[:, None].to(slope.dtype) for slope, grad in slopes)
        return one + two, None, None, None, None


class _TokenKL(torch.autograd.Function):
    """∂KL/∂h = (p - q)·W is formed in the forward pass; ∂KL/∂W = Σ g (p - q) hᵀ needs p again."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, reference: Tensor, head: Tensor, reference_head: Tensor
    ) -> Tensor:
        weight, old = head.to(states.dtype), reference_head.to(states.dtype)
        reference = reference.to(states.dtype)
        kl = torch.empty(len(states), dtype=torch.float32, device=states.device)
        slope = torch.empty_like(states)
        for block in blocks(len(states)):
            log_p = product(states[block], weight).float().log_softmax(-1)
            log_q = product(reference[block], old).float().log_softmax(-1)
            q = log_q.exp()
            kl[block] = (q * (log_q - log_p)).sum(-1)
            slope[block] = product_back(log_p.exp_().sub_(q).to(states.dtype), weight)
        ctx.save_for_backward(slope, states, reference, head, reference_head)
        return kl

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, Tensor | None, None]:
        slope, states, reference, head, reference_head = ctx.saved_tensors
        grad = gradients[0]
        to_states = slope * grad[:, None].to(slope.dtype)
        if not ctx.needs_input_grad[2]:
            return to_states, None, None, None
        weight, old = head.to(states.dtype), reference_head.to(states.dtype)
        to_head = torch.zeros_like(head, dtype=torch.float32)
        for block in blocks(len(states)):
            p = product(states[block], weight).float().softmax(-1)
            q = product(reference[block], old).float().softmax(-1)
            residual = (p - q) * grad[block, None]
            to_head += product(residual.to(states.dtype).T, states[block].T).float()
        return to_states, None, to_head.to(head.dtype), None


def blocks(count: int) -> list[slice]:
    """The slices of `count` tokens that are worked on at once."""
    return [slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]


def _along(rows: Tensor, states: Tensor) -> Tensor:
    """rows·h of each token: (n,) float32."""
    return torch.linalg.vecdot(rows, states.float())
