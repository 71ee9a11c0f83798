"""Tokens drawn from the model's distribution, the same whatever rows are decoded together.

Dimensions: R rows, V vocabulary.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor


class Sampler:
    """Draws the next token of each row, from a stream of numbers that the row has for itself."""

    def __init__(self, seeds: Sequence[str], *, temperature: float = 1.0) -> None:
        """One seed a prompt."""
        self.streams = [random.Random(seed) for seed in seeds]
        self.temperature = temperature

    def __call__(self, logits: Tensor, numbers: Sequence[int]) -> list[int]:
        """A token for each row: logits (R, V), the prompt's number of each.

        The first token v with P(0) + … + P(v) > u, where u is uniform in [0, 1).
        """
        odds = torch.softmax(logits.double() / self.temperature, -1).cumsum(-1)  # (R, V)
        draws = torch.tensor([self.streams[n].random() for n in numbers], dtype=torch.float64)
        points = draws.to(odds.device)[:, None] * odds[:, -1:]
        return (
            torch.searchsorted(odds, points, right=True)
            .squeeze(1)
            .clamp_max(odds.shape[1] - 1)
            .tolist()
        )
