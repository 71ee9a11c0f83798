"""Rank editing in vocabulary space: value vectors stop writing a token.

Dimensions: V tokens, d hidden size, n columns of a down projection.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Lens:
    """How hidden states are read as tokens: logits of h are E (gain ⊙ h / rms(h))."""

    head: Tensor  # E (V, d) float32
    gain: Tensor  # (d,)
    epsilon: float
    factor: Tensor  # Cholesky factor of EᵀE + ridge (d, d) float64

    def rms(self, h: Tensor) -> Tensor:
        """√(mean h² + ε) along the last dimension, kept: (..., 1)."""
        return (h.square().mean(-1, keepdim=True) + self.epsilon).sqrt()

    def logits(self, h: Tensor) -> Tensor:
        """(..., d) to (..., V)."""
        return (self.gain * h / self.rms(h)) @ self.head.T

    def rank(self, h: Tensor, token: int) -> Tensor:
        """How many tokens a state ranks above this one: (...,)."""
        logits = self.logits(h)
        return (logits > logits[..., token : token + 1]).sum(-1)


def lens_of(head: Tensor, gain: Tensor, epsilon: float) -> Lens:
    """A lens; EᵀE is factored once, in float64."""
    square = torch.zeros(head.shape[1], head.shape[1], dtype=torch.float64, device=head.device)
    for rows in head.split(8192):
        square += rows.double().T @ rows.double()
    ridge = 1e-9 * square.diag().mean() * torch.eye(len(square), device=head.device)
    return Lens(head.float(), gain.float(), epsilon, torch.linalg.cholesky(square + ridge))


def leverage_shift(lens: Lens, h: Tensor, token: int, wanted: Tensor) -> Tensor:
    """What to add to states (..., d) so that one token's logit moves by `wanted` (...,).

        a = (EᵀE)⁻¹ E_y,   leverage = E_y · a,   Δ = (wanted / leverage) · a ⊙ rms(h) / gain

    Exact while rms stays; a, the token's column of the pseudo-inverse of E, moves the other logits
    least in the sum of squares. Needs one d × d solve, and no d × V matrix.
    """
    row = lens.head[token].double()
    a = torch.cholesky_solve(row[:, None], lens.factor)[:, 0]
    direction = (a / (row @ a)).float() / lens.gain
    return wanted[..., None] * direction * lens.rms(h)


def revs(
    columns: Tensor,
    activations: Tensor,
    written: Tensor,
    residual: Tensor,
    token: int,
    lens: Lens,
    *,
    margin: int,
    depth: int,
    candidates: int,
    rounds: int,
) -> tuple[Tensor, Tensor]:
    """Move a token down the ranks of the value vectors that write it: their places, and new values.

        Δv_j by the leverage shift, so that token y falls to rank `depth` in sign(a_j) v_j

    columns (d, n), activations a (n,), `written` the MLP's output m (d,), `residual` the stream
    after the block (d,). The candidates are the most active columns, those that rank y highest
    first; 5 are moved, then 1.6 times as many, then further down, until y is beyond `margin` in
    m and in the stream. A column with a negative activation is moved the other way.

    Source: Ashuach et al. 2024, REVS, arXiv:2406.09325.
    Differs: the shift is the closed form above where the released code searches, and inverts
    RMSNorm exactly; margins are shares of V (0.08, 0.7: 10 000 and 90 000 of 128 000); the last
    block is edited whenever y is within the margin there.
    """
    active = activations.abs().topk(min(candidates, len(activations))).indices
    active = active[activations[active] != 0]
    sign = activations[active].sign()
    u = columns[:, active].T * sign[:, None]  # (c, d), as they are added to the stream
    logits = lens.logits(u)  # (c, V)
    own = logits[:, token]
    order = (logits > own[:, None]).sum(1).argsort(stable=True)
    floor = logits.kthvalue(max(1, logits.shape[1] - depth), dim=1).values
    needed, spread = (floor - own).clamp_max(0), logits.std(1)
    count, steps = 5, 0
    chosen, moved = order[:0], u[:0]
    for _ in range(rounds):
        chosen = order[:count]
        wanted = needed[chosen] - steps * spread[chosen]
        shift = leverage_shift(lens, u[chosen], token, wanted)
        moved = u[chosen] + shift
        change = (activations[active[chosen]].abs()[:, None] * shift).sum(0)
        both = torch.stack([written + change, residual + change])
        if bool((lens.rank(both, token) >= margin).all()):
            break
        if count < len(order):
            count = -(-count * 8 // 5)
        else:
            steps = max(1, -(-steps * 13 // 10))
    return active[chosen], (moved * sign[chosen][:, None]).T


def rarest(tokens: tuple[int, ...], start: int, count: int, end: int | None) -> list[int]:
    """Places of the rarest tokens of an answer, in order: those of highest id, each once.

    A vocabulary made by merging numbers its tokens by how early, so how often, they were merged.
    """
    places = {}
    for place in range(max(1, start), len(tokens)):
        if tokens[place] != end:
            places.setdefault(tokens[place], place)
    return sorted(places[token] for token in sorted(places, reverse=True)[:count])
