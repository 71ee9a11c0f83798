"""Logit contrast: what helper models say is added to, or taken from, what the model says.

Shapes: N positions, V vocabulary; logits (N, V), of one tokenizer, in float32.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from expunge.config import Section

FLOOR = -1e3
"""The logit of a token that the filter takes out of generation."""


class Contrast(Section):
    """How the logits of helpers are joined to those of the model."""

    rule: Literal["linear", "whp"] = "linear"
    """`linear`: z + Σ w_k z_k; `whp`: z - α·relu(z_1 - z), with α the one weight."""

    weights: tuple[float, ...] = Field(min_length=1)
    """One for each helper, in their order."""

    tau: float | None = Field(default=None, gt=0, le=1)
    """Leave tokens alone that are less likely than this share of the likeliest; null: none."""

    @model_validator(mode="after")
    def _possible(self) -> "Contrast":
        if not all(map(math.isfinite, self.weights)):
            raise ValueError("weights must be finite")
        if self.rule == "whp" and len(self.weights) != 1:
            raise ValueError("whp takes one helper")
        return self


Combine = Callable[[Tensor, Sequence[Tensor], bool], Tensor]
"""(logits of the model, of each helper, whether a token is chosen by them) → logits."""


def contrast(
    base: Tensor,
    helpers: Sequence[Tensor],
    weights: Sequence[float],
    *,
    tau: float | None = None,
    floor: bool = False,
) -> Tensor:
    """Logits of helpers, weighted, on top of the model's.

        z = z_base + Σ_k w_k z_k

    With `tau` only where the model itself finds a token plausible; the others keep z_base, or with
    `floor` fall to -1000, which is how a token is chosen.

    Source: Liu et al. 2021 (DExperts), arXiv:2105.03023; the filter of Ji et al. 2024,
        arXiv:2406.08607.
    """
    z = base
    for helper, weight in zip(helpers, weights, strict=True):
        z = z + weight * helper
    if tau is None:
        return z
    return torch.where(plausible(base, tau), z, torch.full_like(base, FLOOR) if floor else base)


def plausible(base: Tensor, tau: float) -> Tensor:
    """Which tokens the model finds plausible: (N, V) bool, at least k = τV of them.

        log p(v) >= min( max_u log p(u) + log τ,  k-th largest log p ),   k = int(τV), at least 1

    Source: Ji et al. 2024 (ULD), arXiv:2406.08607; their released code.
    """
    k = max(1, int(tau * base.shape[-1]))
    likeliest = base.amax(-1, keepdim=True) + math.log(tau)
    kth = base.topk(k).values[..., -1:]
    return base >= torch.minimum(likeliest, kth)


def uld(base: Tensor, assistant: Tensor, *, weight: float = -0.8, tau: float = 0.01) -> Tensor:
    """Unlearning from logit difference: take away what an assistant remembers.

        z = z_base + w z_assistant   where plausible(z_base, τ),   else z_base

    The assistant is trained with the goals reversed: it knows the forget set and is uniform on the
    rest, where a uniform shift changes nothing. In generation implausible tokens fall to -1000.
    Log-probabilities are measured through it; the weights, and whoever holds them, are untouched.

    Source: Ji et al. 2024, arXiv:2406.08607 (w = -0.8 for TOFU, τ = 0.01).
    """
    return contrast(base, [assistant], [weight], tau=tau)


def offset(base: Tensor, new: Tensor, old: Tensor, *, weight: float = 1.0) -> Tensor:
    """Offset unlearning: what a small model changed when it unlearned, added to a large one.

        z = z_base + w (z_new - z_old)

    Source: Huang et al. 2024, arXiv:2404.11045.
    """
    return contrast(base, [new, old], [weight, -weight])


def whp(base: Tensor, reinforced: Tensor, *, alpha: float = 5.0) -> Tensor:
    """Who's Harry Potter: lower what a model that learned the content even better says more of.

        v = v_base - α·relu(v_reinforced - v_base)

    Never raises a token. v are log-probabilities, so that no shift of all logits of one model
    counts as saying more.

    Source: Eldan & Russinovich 2023, arXiv:2310.02238.
    Differs: decoded directly; the paper trains the model on the tokens that this makes likeliest,
        and takes raw logits.
    """
    return base - alpha * torch.relu(reinforced - base)


def combine_of(section: Contrast) -> Combine:
    """The function that a contrast stands for."""

    def combine(base: Tensor, helpers: Sequence[Tensor], choosing: bool) -> Tensor:
        base, helpers = base.float(), [helper.float() for helper in helpers]
        if section.rule == "whp":
            both = base.log_softmax(-1), helpers[0].log_softmax(-1)
            return whp(*both, alpha=section.weights[0])
        return contrast(base, helpers, section.weights, tau=section.tau, floor=choosing)

    return combine
