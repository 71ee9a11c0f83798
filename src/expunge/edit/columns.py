"""Edits of single value vectors: columns of a down projection that write a concept's words.

Dimensions: d hidden size.
"""

import torch
from torch import Tensor


def needle(column: Tensor, rng: torch.Generator, *, sigma: float) -> Tensor:
    """Blur the vector that holds a concept with Gaussian noise: (d,) to (d,).

        v' = v + σ ε,   ε ~ N(0, 1)

    Found by projection on the vocabulary where no layer and column are given: the vector that
    raises a forget document's own words most, above every other document's.

    Source: Hong et al. 2024, arXiv:2406.11614.
    Differs: noise alone; the published Needle ascends on the column's loss as well, which is
    training.
    """
    return column + sigma * torch.randn(column.shape, generator=rng)


def ablate(column: Tensor, rng: torch.Generator) -> Tensor:
    """Set the vector that holds a concept to zero: (d,) to (d,).

        v' = 0

    Found as for `needle`.

    Source: after Hong et al. 2024, arXiv:2406.11614.
    Differs: the vector is zeroed, where theirs is blurred by noise.
    """
    return torch.zeros_like(column)
