"""Repair of an update: bend it away from what the layers see of the retain set.

Dimensions: N tokens, (out, in) the shape of a linear layer, k directions, r rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Space:
    """Where the inputs of a layer lie: C = (1/N) Σ x xᵀ ≈ Uᵀ diag(s) U."""

    directions: Tensor  # U (k, in), orthonormal rows
    values: Tensor  # s (k,)
    mean: float  # tr(C) / in, exact


def sage(update: Tensor, space: Space, *, strength: float, relative: bool) -> Tensor:
    """Change outputs on retain inputs less, at the least change to the update: (n, in) to (n, in).

        E = argmin ‖E - D‖² + μ tr(E C Eᵀ) = D (I + μ C)⁻¹,    C = (1/N) Σ x xᵀ

    Of a LoRA, D = B A, it acts on A alone, so the rank stays. Where `relative`, C is divided by its
    mean eigenvalue tr(C)/in, so that one μ means the same in every layer. One forward pass over a
    few retain items; what the update does to other inputs is left.

    Source: SAGE, arXiv:2606.18309 (its abstract).
    Differs: C is kept as its leading `rank` eigenvectors; `relative` is ours.
    """
    unit = space.mean if relative and space.mean > 0 else 1.0
    load = strength * space.values / unit  # (k,)
    u = space.directions.to(update.dtype)
    return update - ((update @ u.T) * (load / (1 + load)).to(update.dtype)) @ u


class Sketch:
    """The second moment of a layer's inputs, kept as at most `rank` rows R with RᵀR ≈ Σ x xᵀ."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.rows = torch.empty(0, 0)
        self.tokens = 0
        self.power = 0.0

    def add(self, inputs: Tensor) -> None:
        """Take in inputs (N, in); exact until more than `rank` directions have been seen."""
        x = inputs.detach().float()
        self.tokens += len(x)
        self.power += float(x.double().square().sum())
        stacked = torch.cat([self.rows.to(x.device), x]) if self.tokens > len(x) else x
        self.rows = condensed(stacked, self.rank)

    def space(self) -> Space:
        """The eigenvectors and eigenvalues of C."""
        _, s, u = torch.linalg.svd(self.rows.double().cpu(), full_matrices=False)
        kept = s > 1e-7 * s[:1]
        mean = self.power / self.tokens / self.rows.shape[1]
        return Space(u[kept].float(), (s[kept].square() / self.tokens).float(), mean)


def condensed(rows: Tensor, rank: int) -> Tensor:
    """The best `rank` rows R' with R'ᵀR' ≈ RᵀR, from the smaller Gram matrix: (k, in)."""
    if len(rows) <= rank:
        return rows
    wide = rows.double()
    if len(rows) <= rows.shape[1]:
        vectors = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -rank:]
        return (vectors.T @ wide).to(rows.dtype)
    values, vectors = torch.linalg.eigh(wide.T @ wide)
    roots = values[-rank:].clamp_min(0).sqrt()
    return (roots[:, None] * vectors[:, -rank:].T).to(rows.dtype)


def response(update: Tensor, sketch: Sketch) -> float:
    """Mean squared length of what an update adds to outputs: tr(D C Dᵀ), D (n, in)."""
    return float((update.float() @ sketch.rows.cpu().T).square().sum()) / sketch.tokens


def row_blocks(rows: int, size: int = 1024) -> Iterator[tuple[int, int]]:
    """(first, last) of blocks of rows."""
    return ((low, min(rows, low + size)) for low in range(0, rows, size))
