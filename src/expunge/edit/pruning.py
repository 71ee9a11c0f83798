"""Selective pruning: which units fire for the forget set and hardly for the retain set.

Dimensions: U units of a layer, N tokens.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["mean", "freq", "rms", "std"]

EPSILON: Mapping[Kind, float] = {"mean": 1e-5, "freq": 1e-3, "rms": 1e-5, "std": 1e-5}
"""ε where none is given; a share of tokens is on another scale than an activation."""


class Activity:
    """Sums over tokens of the activations of U units, from which any importance follows."""

    def __init__(self) -> None:
        self.tokens = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, activations: Tensor) -> None:
        """Take in activations (N, U)."""
        x = activations.detach().double().cpu()
        self.tokens += len(x)
        parts = {"abs": x.abs(), "on": (x > 0).double(), "square": x.square(), "plain": x}
        for name, values in parts.items():
            self.sums[name] = self.sums.get(name, torch.zeros(())) + values.sum(0)

    def importance(self, kind: Kind) -> Tensor:
        """I of each unit: (U,).

        mean |a|, the share of tokens with a > 0, √mean a², or the standard deviation of a.
        """
        means = {name: total / self.tokens for name, total in self.sums.items()}
        if kind == "mean":
            return means["abs"]
        if kind == "freq":
            return means["on"]
        if kind == "rms":
            return means["square"].sqrt()
        return (means["square"] - means["plain"].square()).clamp_min(0).sqrt()


def prune(forget: Tensor, retain: Tensor, *, epsilon: float) -> Tensor:
    """Delete the units that matter most to the forget set and least to the retain set.

        score = I_f / (I_r + ε),   I = mean |a| (or freq, rms, std) over the tokens of each set

    The units of all layers are ranked together; the first share of them is deleted (weights in and
    out, and biases, become zero), and the next step looks at the pruned model. Units are those
    before a down projection and before an attention's output projection. It suits skills and
    domains; a single fact is seldom in a unit of its own.

    Source: Pochinkov and Schoots 2024, arXiv:2403.01267.
    """
    return forget / (retain + epsilon)


def highest(
    scores: Mapping[int, Tensor], gone: Mapping[int, set[int]], share: float
) -> dict[int, list[int]]:
    """The best `share` of all units by layer, those already gone left out (but counted in it)."""
    total = sum(len(values) for values in scores.values())
    rows = [
        (float(value), layer, unit)
        for layer, values in scores.items()
        for unit, value in enumerate(values.tolist())
        if unit not in gone.get(layer, ())
    ]
    rows.sort(key=lambda row: (-row[0], row[1], row[2]))
    found: dict[int, list[int]] = {}
    for _, layer, unit in rows[: round(share * total)]:
        found.setdefault(layer, []).append(unit)
    return found


def silenced_values(units: set[int], heads: int, groups: int, size: int) -> list[int]:
    """Rows of the value projection that only deleted units read.

    Unit h · size + j of an attention's H heads reads row (h // (H/G)) · size + j of G groups; with
    grouped queries a row serves H/G heads and goes when all of them have lost it.
    """
    each = heads // groups
    return [
        group * size + j
        for group in range(groups)
        for j in range(size)
        if all((group * each + h) * size + j in units for h in range(each))
    ]
