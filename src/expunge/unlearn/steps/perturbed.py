"""Step rules that read a gradient at moved weights: flat, smoothed, invariant minima."""

import random
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from expunge import parallel
from expunge.unlearn.steps.rule import Gradients, Now, Record, StepOptions, norm


class SamStep(StepOptions):
    """The forget gradient at the nearby weights where the forget loss is worst."""

    rule: Literal["sam"] = "sam"
    """Its name in STEP_RULES."""

    radius: float = Field(default=0.01, gt=0)
    """ρ, the length of the perturbation of all trained weights together."""


class SmoothStep(StepOptions):
    """The forget gradient at randomly moved weights."""

    rule: Literal["smooth"] = "smooth"
    """Its name in STEP_RULES."""

    deviation: float = Field(default=1e-4, gt=0)
    """ρ, the standard deviation of the noise on each weight."""

    samples: int = Field(default=1, ge=1)
    """Draws a step, whose gradients are averaged."""


class IluStep(StepOptions):
    """A penalty on how much the retain loss would change if the weights were rescaled."""

    rule: Literal["ilu"] = "ilu"
    """Its name in STEP_RULES."""

    penalty: float = Field(default=0.1, gt=0)
    """λ, the weight of the penalty."""

    scaling: Literal["scalar", "elementwise"] = "scalar"
    """One factor w for all trained weights, or one for each."""

    probe: float = Field(default=1e-3, gt=0, lt=1)
    """Length of the finite difference, as a share of the norm of the weights."""

    @property
    def needs_both(self) -> bool:
        """Without retain items the penalty has no slope."""
        return True


def sam(now: Now, step: SamStep) -> Record:
    """Sharpness-aware forgetting: stay forgotten in a ball around the weights.

        g = ∇L_F(θ + ρ ∇L_F(θ)/‖∇L_F(θ)‖) + ∇L_R(θ)

    Source: Fan et al. 2025, arXiv:2502.05374.
    """
    ascended, ascent = now.gradient("forget")
    length = norm(ascent)
    with now.moved(ascent, step.radius / length):
        del ascent
        record = now.backward("forget")
    record |= now.backward(*now.rest)
    parallel.sum_gradients(now.parameters)
    return record | ({"norm.forget": length} if ascended else {})


def smooth(now: Now, step: SmoothStep) -> Record:
    """Randomised smoothing: forget at weights that are moved at random.

        g = mean over u ~ N(0, ρ²) of ∇L_F(θ + u) + ∇L_R(θ)

    Source: Fan et al. 2025, arXiv:2502.05374.
    """
    scale = {"forget": 1 / step.samples}
    records = []
    for draw in range(step.samples):
        with now.moved(_noise(now, draw), step.deviation):
            records.append(now.backward("forget", scale=scale))
    record = {name: sum(r[name] for r in records) / step.samples for name in records[0]}
    record |= now.backward(*now.rest)
    parallel.sum_gradients(now.parameters)
    return record


def ilu(now: Now, step: IluStep) -> Record:
    """Invariant unlearning: later training on the retain data should not move the weights back.

        g = ∇(L_F + L_R + λ P),    P = (θ·∇L_R)²  or  ‖θ ⊙ ∇L_R‖²
        ∇P = 2 (a + H v),    scalar: s = θ·∇L_R, a = s ∇L_R, v = s θ
                             elementwise: a = θ ⊙ ∇L_R², v = θ² ⊙ ∇L_R

    H v is the difference of two retain gradients, without dropout. P is ∂L_R/∂w squared at w = 1,
    of weights w ∘ θ: the penalty of invariant risk minimisation.

    Source: Wang et al. 2025, arXiv:2506.01339.
    Differs: written from the formula alone, whose w may be one number or one a weight; the retain
        half stands for the unrelated data; θ are the trained weights, the factors of an adapter.
    """
    record, forget = now.gradient("forget")
    weights = [parameter.detach() for parameter in now.parameters]
    with now.without_dropout():
        kept, slope = now.gradient(*now.rest)
        a, v, penalty = _penalty(weights, slope, step.scaling)
        length, size = norm(now.free(v)), step.probe * norm(weights)
        with now.moved(v, size / length):
            _, beyond = now.gradient(*now.rest)
    factor = 2 * step.penalty
    curved = factor * length / size
    now.leave((1.0, forget), (factor, a), (curved, beyond), (1 - curved, slope))
    return record | kept | {"penalty": penalty}


def _penalty(
    weights: Sequence[Tensor], slope: Gradients, scaling: str
) -> tuple[Gradients, Gradients, float]:
    """a, v and P of the penalty; see `ilu`."""
    pairs = list(zip(weights, slope, strict=True))
    if scaling == "scalar":
        s = sum(float((w * g).sum()) for w, g in pairs if g is not None)
        return [None if g is None else s * g for _, g in pairs], [s * w for w in weights], s * s
    a = [None if g is None else w * g.square() for w, g in pairs]
    v = [None if g is None else w.square() * g for w, g in pairs]
    return a, v, sum(float((w * g).square().sum()) for w, g in pairs if g is not None)


def _noise(now: Now, draw: int) -> Gradients:
    """Standard normal numbers, the same on every rank, for the weights that may move."""
    found: Gradients = []
    for place, parameter in enumerate(now.parameters):
        seed = random.Random(f"{now.seed}:{draw}:{place}").getrandbits(63)
        rng = torch.Generator().manual_seed(seed)
        drawn = torch.randn(parameter.shape, generator=rng)
        found.append(drawn.to(parameter.device, parameter.dtype))
    return now.free(found)
