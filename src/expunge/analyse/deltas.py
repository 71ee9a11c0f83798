"""What a model adds to the target, layer by layer: factors of adapters, or whole differences.

Dimensions: r rank, (out, in) the shape of a layer, k directions.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from expunge.adapter_files import block_of
from expunge.merge.branches import read_branches
from expunge.merge.checkpoint import FLOATS, Checkpoint
from expunge.merge.operands import KINDS, decode


@dataclass(frozen=True)
class LowRank:
    """ΔW = B A, the scale within B."""

    a: Tensor  # (r, in) float64
    b: Tensor  # (out, r) float64

    @cached_property
    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (out, q), σ (q,), Vᵀ (q, in) with q = min(r, out, in), without forming ΔW.

        B = Q_b R_b,  Aᵀ = Q_a R_a,  R_b R_aᵀ = U' Σ V'ᵀ  →  U = Q_b U',  V = Q_a V'
        """
        q_b, r_b = torch.linalg.qr(self.b)
        q_a, r_a = torch.linalg.qr(self.a.T)
        u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        return q_b @ u, s, vh @ q_a.T

    def matrix(self) -> Tensor:
        """ΔW in float32: (out, in)."""
        return self.b.float() @ self.a.float()


@dataclass(frozen=True)
class Dense:
    """ΔW held whole, of a model every weight of which may have moved."""

    delta: Tensor  # (out, in) float32

    def matrix(self) -> Tensor:
        """ΔW in float32: (out, in)."""
        return self.delta


Delta = LowRank | Dense


def dot(one: Delta, two: Delta) -> float:
    """The inner product of two deltas of one shape; of factors without forming either.

    ⟨B₁A₁, B₂A₂⟩ = tr((B₁ᵀB₂)(A₂A₁ᵀ)),   ⟨BA, D⟩ = Σ A ∘ (BᵀD)
    """
    if isinstance(one, LowRank) and isinstance(two, LowRank):
        return float(((one.b.T @ two.b) * (one.a @ two.a.T)).sum())
    if isinstance(one, LowRank):
        return float((one.a * (one.b.T @ two.matrix().double())).sum())
    if isinstance(two, LowRank):
        return dot(two, one)
    return float((one.delta.double() * two.delta.double()).sum())


def gram(deltas: Sequence[Delta | None]) -> np.ndarray:
    """All inner products of one layer's deltas; one that is not there is 0: (M, M)."""
    products = np.zeros((len(deltas), len(deltas)))
    for i, one in enumerate(deltas):
        for j, two in enumerate(deltas[: i + 1]):
            if one is not None and two is not None:
                products[i, j] = products[j, i] = dot(one, two)
    return products


class AdapterDeltas(Mapping[str, LowRank]):
    """The layers of an adapter folder, by name."""

    def __init__(self, folder: Path) -> None:
        (self.branch,) = read_branches([folder])

    def __getitem__(self, layer: str) -> LowRank:
        a, b = self.branch.factors[layer]
        return LowRank(a.double(), self.branch.scales[layer] * b.double())

    def __iter__(self):
        return iter(self.branch.factors)

    def __len__(self) -> int:
        return len(self.branch.factors)


class ModelDeltas(Mapping[str, Dense]):
    """The layers of a model folder less those of its base, by name; read when they are asked for.

    Tensors that only one of the two holds, or in another shape, are left out.
    """

    def __init__(self, folder: Path, base: Path) -> None:
        self.model, self.base = Checkpoint(folder), Checkpoint(base)
        self.names = {
            name.removesuffix(".weight"): name
            for name, stored in self.model.items()
            if name in self.base
            and stored.shape == self.base[name].shape
            and {stored.dtype, self.base[name].dtype} <= set(FLOATS)
        }

    def __getitem__(self, layer: str) -> Dense:
        name = self.names[layer]
        one, two = (
            decode(place.raw(name), KINDS[place[name].dtype]) for place in (self.model, self.base)
        )
        shape = self.model[name].shape
        return Dense(torch.from_numpy(one - two).reshape(shape[0] if shape else 1, -1))

    def __iter__(self):
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


Deltas = Mapping[str, Delta]
"""What one model adds to the target, by layer."""


def layers_of(models: Iterable[Deltas]) -> list[str]:
    """Every layer that any of the models changes, block by block."""
    found = {layer for deltas in models for layer in deltas}
    return sorted(found, key=lambda layer: (block_of(layer) is None, block_of(layer) or 0, layer))


def module_of(layer: str) -> str:
    """The kind of a layer: q_proj, up_proj, …"""
    return layer.rpartition(".")[2]
