"""Scores of single weights: the higher, the sooner a weight may move. Pure functions of tensors.

Shapes: S of a weight; a linear layer's is (out, in).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.errors import TrainingError


@dataclass(frozen=True)
class Evidence:
    """What is known of one weight tensor."""

    weight: Tensor  # (*S)
    forget: Tensor | None = None
    """Gradient of the NLL, summed over the forget items: (*S)."""
    retain: Tensor | None = None
    """The same of the retain items."""
    inputs: Tensor | None = None
    """Norm of what each column is multiplied with, over all tokens of the forget items: (in,)."""
    random: torch.Generator | None = None


def wagle(seen: Evidence, *, mu: float = 1e-3) -> Tensor:
    """Attribution of weights to unlearning: what removing a weight does, with retaining counted in.

        s_i = |(θ_i - g_r,i/μ) · g_f,i|

    g_f and g_r are gradients of the NLL, summed over one pass over each half. As μ → ∞ the score is
    |θ g_f|, SNIP's. At the μ = 1e-6 of the released configurations the first term drowns: the
    score is |g_r g_f|/μ, whatever the weight.

    Source: WAGLE, Jia et al. 2024, arXiv:2410.17509; OPTML-Group/WAGLE, generate_mask.py.
    Differs: μ is a number, not an estimate of the Hessian's diagonal; each item's mean NLL is
    summed, whatever the batch.
    """
    assert seen.forget is not None
    assert seen.retain is not None
    return ((seen.weight - seen.retain / mu) * seen.forget).abs()


def random(seen: Evidence) -> Tensor:
    """Weights drawn at random: what a choice is to be better than.

        s_i ~ U[0, 1)

    Source: a baseline of WAGLE, arXiv:2410.17509.
    """
    draw = torch.rand(seen.weight.shape, generator=seen.random)
    return draw.to(seen.weight.device)


def magnitude(seen: Evidence) -> Tensor:
    """The largest weights.

        s_i = |θ_i|

    Source: a baseline of WAGLE, arXiv:2410.17509.
    """
    return seen.weight.abs()


def gradient(seen: Evidence) -> Tensor:
    """The weights that the forget loss is most sensitive to.

        s_i = |g_f,i|

    Source: a baseline of WAGLE, arXiv:2410.17509; SalUn, Fan et al. 2024, arXiv:2310.12508.
    """
    assert seen.forget is not None
    return seen.forget.abs()


def wanda(seen: Evidence) -> Tensor:
    """The weights that add most to what their layer puts out on the forget items.

        s_ij = |θ_ij| · ‖x_j‖,    x_j the j-th input over all tokens

    Source: Wanda, Sun et al. 2023, arXiv:2306.11695; a baseline of WAGLE, arXiv:2410.17509.
    Differs: Wanda compares the weights of one row; here all linear layers are compared, the head
    left out.
    """
    assert seen.inputs is not None
    return seen.weight.abs() * seen.inputs


def highest(scores: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """Which entries are among the highest `ratio` of all tensors together; of equals the first.

    Exact without sorting: positive float32 numbers order as their bits do, so two counts, of the
    upper and of the lower 16 bits, find the threshold.
    """
    total = sum(score.numel() for score in scores.values())
    wanted = round(ratio * total)
    upper = _counted(_bits(score) >> 16 for score in scores.values())
    high, above = _bin(upper, wanted)
    lower = _counted(bits[bits >> 16 == high] & 0xFFFF for bits in map(_bits, scores.values()))
    low, more = _bin(lower, wanted - above)
    threshold, ties = (high << 16) + low, wanted - above - more
    chosen = {}
    for name, score in scores.items():
        bits = _bits(score)
        equal = bits == threshold
        rank = equal.cumsum(0, dtype=torch.int64)
        chosen[name] = ((bits > threshold) | (equal & (rank <= ties))).view(score.shape)
        ties = max(0, ties - int(rank[-1]))
    return chosen


def check_scores(scores: Mapping[str, Tensor]) -> None:
    """Refuse scores that are not numbers."""
    for name, score in scores.items():
        if not bool(torch.isfinite(score).all()):
            raise TrainingError(f"the mask's scores of {name} are not finite; is mu too small?")


def _bits(score: Tensor) -> Tensor:
    """Non-negative float32 numbers as integers of the same order, flat."""
    return (score.detach().float().flatten() + 0.0).view(torch.int32)


def _counted(values: Iterator[Tensor]) -> Tensor:
    """How often each number below 2^16 occurs."""
    counts = (torch.bincount(v, minlength=1 << 16).cpu() for v in values)
    return sum(counts, torch.zeros(1 << 16, dtype=torch.int64))


def _bin(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bin in which the `wanted`-th from above lies, and how many lie above that bin."""
    from_above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_above, max(1, wanted)))
    return len(counts) - 1 - place, int(from_above[place - 1]) if place else 0
