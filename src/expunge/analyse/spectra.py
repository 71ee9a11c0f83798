"""Spectra of low-rank updates, and how far the directions of two of them overlap.

Dimensions: r rank, (out, in) the shape of a layer, k directions.
"""

from typing import Any

import torch
from torch import Tensor

from expunge.analyse.deltas import LowRank

Row = dict[str, Any]


def effective_rank(singular: Tensor) -> float:
    """How many directions an update really uses, as a smooth count.

        erank = exp(H(p)),   p_i = σ_i / Σ_j σ_j,   H(p) = -Σ p_i ln p_i

    k equal singular values give k; nothing at all gives 0.

    Source: Roy and Vetterli 2007, The effective rank: a measure of effective dimensionality.
    """
    total = singular.sum()
    if not total > 0:
        return 0.0
    p = singular / total
    return float(torch.special.entr(p).sum().exp())


def spectrum(delta: LowRank) -> Row:
    """Effective rank, the share of the first direction, and the singular values."""
    _, singular, _ = delta.svd
    square = float((singular**2).sum())
    return {
        "rank": len(delta.a),
        "effective_rank": effective_rank(singular),
        "first_share": float(singular[0] ** 2) / square if square else None,
        "singular_values": [float(value) for value in singular],
    }


def overlap(one: LowRank, two: LowRank, k: int) -> Row:
    """How far the first k directions of two updates span the same space, in 0..1.

        columns = ‖U₁ᵀU₂‖² / k,   rows = ‖V₁ᵀV₂‖² / k

    the mean squared cosine of the principal angles. Two random spaces give k / out and k / in.

    Source: Björck and Golub 1973 for principal angles; the measure is that of arXiv:2106.09685.
    """
    (u, s, vh), (other_u, other_s, other_vh) = one.svd, two.svd
    out, wide = u.shape[0], vh.shape[1]
    k = min(k, _strong(s), _strong(other_s))
    if not k:
        return {"k": 0, "columns": None, "rows": None, "chance_columns": None, "chance_rows": None}
    return {
        "k": k,
        "columns": float((u[:, :k].T @ other_u[:, :k]).square().sum() / k),
        "rows": float((vh[:k] @ other_vh[:k].T).square().sum() / k),
        "chance_columns": k / out,
        "chance_rows": k / wide,
    }


def _strong(singular: Tensor) -> int:
    """Directions of any strength; the others are noise."""
    return int((singular > 1e-9 * singular.max()).sum()) if singular.max() > 0 else 0
