"""Corruption: noise on the embeddings of a prompt, the same for the same prompt.

Shapes: P tokens of a prompt, d width.
"""

import math
import zlib
from collections.abc import Callable, Sequence

import torch
from pydantic import Field
from torch import Tensor

from expunge.config import Section

WEAKEST, STRONGEST = 1e-2, 1e2
"""Bounds of the search, in root mean squares of an embedding's entries."""


class Corruption(Section):
    """How the prompt's embeddings are changed."""

    strength: float = Field(gt=0)
    """σ, in root mean squares of the entries of the embedding matrix."""

    seed: int = 0
    """Seeds the noise, together with the prompt."""


def eco(
    embeddings: Tensor, prompt: Sequence[int], rms: float, *, strength: float, seed: int = 0
) -> Tensor:
    """Embedding-corrupted prompts: noise on the embeddings (P, d) of a prompt that is in scope.

        e'_i = e_i + σ · rms(E) · ε_i,    ε ~ N(0, 1), seeded by the prompt

    The same prompt has the same noise, so the same answer. What is in scope, phrases or a
    classifier decide, as for `input_filter`; a text scored without a prompt is one as a whole.
    Weights are unchanged: whoever runs them without the guard has everything.

    Source: Liu et al. 2024 (ECO), arXiv:2406.07933.
    Differs: Gaussian noise on every token and dimension; the strength by bisection.
    """
    seeded = zlib.crc32(f"{seed}:{list(prompt)}".encode())
    noise = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(seeded))
    return embeddings + (strength * rms * noise).to(embeddings)


def search_strength(loss: Callable[[float], float], target: float, *, steps: int) -> float:
    """The strength at which the loss on forget items reaches a target, by values alone.

        bisect log σ in [log 0.01, log 100]:  halve towards L(σ) = target

    A loss that never gets there ends at the strongest, one that is there from the start at the
    weakest.

    Source: this project, in place of the zeroth-order descent of ECO, arXiv:2406.07933.
    """
    low, high = math.log(WEAKEST), math.log(STRONGEST)
    for _ in range(steps):
        middle = (low + high) / 2
        if loss(math.exp(middle)) < target:
            low = middle
        else:
            high = middle
    return math.exp(high)
