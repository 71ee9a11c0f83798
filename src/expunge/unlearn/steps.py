"""Step rules: how one optimiser step's gradient is made from the two halves' losses.

A rule leaves the gradient in `.grad` and returns what to log. θ are the trainable parameters.
`Backward` adds what this rank's share of the items gives; a rule sums over ranks before it
measures a gradient and before it ends.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import Parameter

from expunge import parallel, sharding
from expunge.config import Section

Record = dict[str, float]
Backward = Callable[..., Record]
"""(*halves) → adds the gradient of the loss of these halves to `.grad`; returns its parts.

Halves that are asked for together are forwarded together.
"""


class Step(Section):
    """Which step rule, and its dials."""

    rule: Literal["joint", "normalized"] = "joint"
    """A name in STEP_RULES."""

    forget_weight: float = Field(default=1.0, gt=0)
    """normalized: the largest share of the forget direction."""

    fade_below: float = Field(default=0.0, ge=0)
    """normalized: below this forget loss the forget direction fades in proportion; 0 never."""


@dataclass(frozen=True)
class StepRule:
    """One row: the function and where it comes from."""

    fn: Callable[[Backward, Sequence[Parameter], Step], Record]
    apart: bool = False
    """Asks for the gradients of the halves one after the other."""
    fidelity: str = "exact"
    needs: str = ""
    cost: str = "1 C a half"
    test: str = "tests/unlearn/test_steps.py"


def joint(backward: Backward, parameters: Sequence[Parameter], step: Step) -> Record:
    """One gradient of the summed loss.

        g = ∇(L_F + L_R)

    Source: plain stochastic gradient descent on the objective.
    """
    record = backward("forget", "retain")
    parallel.sum_gradients(parameters)
    return record


def normalized(backward: Backward, parameters: Sequence[Parameter], step: Step) -> Record:
    """Each half's gradient brought to length one, so that neither drowns the other.

        g = ∇L_R/‖∇L_R‖ + w ∇L_F/‖∇L_F‖,    w = forget_weight · min(1, L_F / fade_below)

    Source: NGDiff, Bu et al. 2024, arXiv:2410.22086.
    Differs: any forget loss in place of -NLL; the share fades as a bounded loss is met; the
        learning rate is the schedule's, not the fitted one.
    """
    record = backward("forget")
    parallel.sum_gradients(parameters)
    ascent = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    record |= backward("retain")
    parallel.sum_gradients(parameters)
    norm_f, norm_r = _norm(ascent), _norm([p.grad for p in parameters])
    fade = min(1.0, record["forget"] / step.fade_below) if step.fade_below else 1.0
    share = step.forget_weight * fade
    for parameter, other in zip(parameters, ascent, strict=True):
        if parameter.grad is None or other is None:
            continue
        parameter.grad.div_(norm_r).add_(other, alpha=share / norm_f)
    return record | {"norm.forget": norm_f, "norm.retain": norm_r, "share": share}


def _norm(tensors: Sequence[Tensor | None]) -> float:
    """Global 2-norm, never zero."""
    given = [t for t in tensors if t is not None]
    squares = [torch.linalg.vector_norm(sharding.local(t)).square() for t in given]
    return max(sharding.norm_of_all(math.sqrt(float(sum(squares))), given), 1e-12)


STEP_RULES = {
    "joint": StepRule(joint),
    "normalized": StepRule(
        normalized,
        apart=True,
        fidelity="adapted",
        needs="retain",
        cost="1 C a half and one gradient buffer",
    ),
}
