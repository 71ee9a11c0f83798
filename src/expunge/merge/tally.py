"""What a merge of branches did, summed over layers: size, direction, what it cost."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Tally:
    """Sums over the layers from which the report is made."""

    def __init__(self, branches: int) -> None:
        self.layers = 0
        self.square = self.lost = 0.0
        self.squares = [0.0] * branches
        self.products = [0.0] * branches
        self.was_cut = False
        self.survival: float | None = None

    def count(self, delta: Tensor, branches: Iterable[Tensor]) -> None:
        """Take in the merged ΔW of one layer, and that of each branch."""
        self.layers += 1
        self.square += _dot(delta, delta)
        for number, own in enumerate(branches):
            self.squares[number] += _dot(own, own)
            self.products[number] += _dot(own, delta)

    def cut(self, delta: Tensor, kept: Tensor) -> None:
        """Take in what a truncation lost of one layer."""
        self.was_cut = True
        self.lost += _dot(delta - kept, delta - kept)

    def report(self) -> dict[str, Any]:
        """Layers, norm, cosine to each branch, and what truncation and storage cost."""
        norm = math.sqrt(self.square)
        lengths = [norm * math.sqrt(square) for square in self.squares]
        return {
            "layers": self.layers,
            "norm": norm,
            "cosine": [p / n if n else 0.0 for p, n in zip(self.products, lengths, strict=True)],
            "truncation_error": _ratio(self.lost, self.square) if self.was_cut else None,
            "storage_survival": self.survival,
        }


def _dot(one: Tensor, two: Tensor) -> float:
    return float(torch.dot(one.flatten(), two.flatten()))


def _ratio(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole else 0.0
