"""Any function of a token's whole next-token distribution, and its gradient, a block at a time.

Dimensions: N scored tokens, d width, V vocabulary, n tokens of a block. Logits exist a block at a
time; no [N x V] matrix is ever held.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from expunge.heads import Anchor, blocks
from expunge.products import product, product_back

PerToken = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(logits (n, V), targets (n,), the reference's logits (n, V) or none) → values (n,), each a
function of its own row alone."""


def token_values(
    states: Tensor, head: Tensor, targets: Tensor, fn: PerToken, reference: Anchor | None = None
) -> Tensor:
    """What `fn` says of each token's whole distribution, logits a block at a time: (N,).

    `reference` holds final hidden states, and their head where `head` has moved since. Logits are
    float32, or float64 where the states are.
    """
    rows = None if reference is None else reference.rows
    old = head.detach() if reference is None or reference.head is None else reference.head
    return _TokenValues.apply(states, head, targets, fn, rows, old)  # pyright: ignore


def standardized(logits: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
    """Log-probs by the spread of their own distribution, which is what min-k++ reads: (n,).

        s = asinh(z),   z = (log p_y - μ) / σ,   μ = Σ_v p_v log p_v,   σ² = Σ_v p_v (log p_v - μ)²

    Where a model is certain of another token z is a hundred spreads and more; asinh keeps the order
    and makes it a number that can be matched. σ is at least 1e-4.

    Source: z of Zhang et al. 2025 (min-k++), arXiv:2404.02936; asinh is this project's.
    """
    logps = logits.log_softmax(-1)
    p = logps.exp()
    mean = (p * logps).sum(-1)
    spread = (p * (logps - mean[:, None]).square()).sum(-1).clamp_min(1e-8).sqrt()
    return ((logps.gather(1, targets[:, None])[:, 0] - mean) / spread).asinh()


class _TokenValues(torch.autograd.Function):
    """With s_n = ∂fn_n/∂logits_n of autograd, ∂fn_n/∂h_n = s_n·W is formed in the forward pass.

    A trainable head needs its own gradient, Σ g s_n h_nᵀ, and logits once more for it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        head: Tensor,
        targets: Tensor,
        fn: PerToken,
        rows: Tensor | None,
        old: Tensor,
    ) -> Tensor:
        weight = head.to(states.dtype)
        wide = torch.promote_types(states.dtype, torch.float32)
        values = torch.empty(len(states), dtype=wide, device=states.device)
        ctx.made = fn, rows, old
        ctx.save_for_backward(states if ctx.needs_input_grad[1] else None, head, targets)
        slope = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        for block in blocks(len(states)):
            found, rise = _values(
                states[block], weight, targets[block], fn, _part(rows, block), old
            )
            values[block] = found
            if slope is not None:
                slope[block] = product_back(rise.to(states.dtype), weight)
        ctx.slope = slope
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Any
    ) -> tuple[Tensor | None, ...]:
        states, head, targets = ctx.saved_tensors
        (fn, rows, old), grad = ctx.made, gradients[0]
        to_states = None if ctx.slope is None else ctx.slope * grad[:, None].to(ctx.slope.dtype)
        if states is None:
            return to_states, None, None, None, None, None
        weight = head.to(states.dtype)
        to_head = torch.zeros_like(head, dtype=grad.dtype)
        for block in blocks(len(states)):
            _, rise = _values(states[block], weight, targets[block], fn, _part(rows, block), old)
            rise = (rise * grad[block, None]).to(states.dtype)
            to_head += product(rise.T, states[block].T).to(grad.dtype)
        return to_states, to_head.to(head.dtype), None, None, None, None


def _values(
    states: Tensor,
    weight: Tensor,
    targets: Tensor,
    fn: PerToken,
    rows: Tensor | None,
    old: Tensor,
) -> tuple[Tensor, Tensor]:
    """The values of a block (n,), and their slopes with respect to its logits (n, V)."""
    logits = _wide(product(states, weight))
    reference = None if rows is None else _wide(product(rows.to(states), old.to(states)))
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        values = fn(logits, targets, reference)
        (rise,) = torch.autograd.grad(values.sum(), logits)
    return values.detach(), rise


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _part(rows: Tensor | None, block: slice) -> Tensor | None:
    return None if rows is None else rows[block]
