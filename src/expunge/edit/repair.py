"""Repair of an update: bend it away from what the layers see of the retain set.

Dimensions: N tokens, (out, in) the shape of a linear layer, k directions, r rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from expunge.products import product

_HELD, _SPARE = 4, 16
"""Rows that a sketch holds, in ranks, before it is made smaller; directions beyond those
wanted, which make a random subspace find them."""


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
    """The second moment of a layer's inputs, kept as few rows R with RᵀR ≈ Σ x xᵀ."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.tokens = 0
        self.power = 0.0
        self._rows: list[Tensor] = []

    def add(self, inputs: Tensor) -> None:
        """Take in inputs (N, in); exact until more than four times `rank` have been seen."""
        x = inputs.detach().float()
        self.tokens += len(x)
        self.power += float(x.square().sum(dtype=torch.float64))
        self._rows.append(x)
        if sum(map(len, self._rows)) > _HELD * self.rank:
            self._rows = [condensed(torch.cat(self._rows), self.rank)]

    @property
    def rows(self) -> Tensor:
        """R: (k, in), on the CPU."""
        return torch.cat(self._rows).cpu()

    @cached_property
    def space(self) -> Space:
        """The leading eigenvectors and eigenvalues of C, `rank` at most."""
        rows = condensed(self.rows, self.rank).double()
        values, vectors = _eigen(rows, self.rank)
        mean = self.power / self.tokens / rows.shape[1]
        return Space(vectors.float(), (values / self.tokens).float(), mean)


def condensed(rows: Tensor, rank: int) -> Tensor:
    """About the best `rank` rows R' with R'ᵀR' ≈ RᵀR, by one turn of a random subspace.

    Source: Halko, Martinsson and Tropp 2011.
    """
    if min(rows.shape) <= rank + _SPARE:
        values, vectors = _eigen(rows.double(), rank)
        return (values.sqrt()[:, None] * vectors).to(rows.dtype)
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(rows.shape[1], rank + _SPARE, generator=rng).to(rows)
    basis = torch.linalg.qr(product(rows, start.T)).Q
    basis = torch.linalg.qr(product(rows, product(basis.T, rows.T))).Q
    return product(basis.T, rows.T)  # (rank + spare, in)


def _eigen(rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading eigenvalues of RᵀR, greatest first, and their vectors: (k,), (k, in)."""
    wide = len(rows) <= rows.shape[1]
    values, vectors = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    kept = values > 1e-12 * values[0].clamp_min(1e-30)
    values, vectors = values[kept], vectors[:, kept].T
    return values, (vectors @ rows) / values.sqrt()[:, None] if wide else vectors


def response(update: Tensor, sketch: Sketch) -> float:
    """Mean squared length of what an update adds to outputs: tr(D C Dᵀ), D (n, in)."""
    return float((update.float() @ sketch.rows.T).square().sum()) / sketch.tokens


def row_blocks(rows: int, size: int = 1024) -> Iterator[tuple[int, int]]:
    """(first, last) of blocks of rows."""
    return ((low, min(rows, low + size)) for low in range(0, rows, size))
