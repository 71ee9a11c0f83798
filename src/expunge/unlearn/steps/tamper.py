"""Tamper resistance: forget as it would look after somebody has fine-tuned the model back."""

import math
import random
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from expunge.errors import RecipeError
from expunge.unlearn.steps.rule import Gradients, Now, Record, StepOptions

LARGEST = 200_000_000
"""Parameters of the largest model that is trained without `force`."""


class TarStep(StepOptions):
    """The forget loss at the weights that a simulated fine-tuning of the forget half passes."""

    rule: Literal["tar"] = "tar"
    """Its name in STEP_RULES."""

    attack_steps: int = Field(default=4, ge=1, le=8)
    """K, steps of the simulated fine-tuning."""

    attack_rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=(2e-5, 4e-5, 1e-4), min_length=1
    )
    """Learning rates of the attacker, one of which is drawn for each step."""

    decay: float = Field(default=0.0625, ge=0)
    """λ: an earlier step of the attack weighs exp(-λ) of the next."""

    force: bool = False
    """Train a model of more than 200 million parameters all the same."""

    def check_model(self, model: nn.Module) -> None:
        """Refuse what would take days."""
        count = sum(parameter.numel() for parameter in model.parameters())
        if count > LARGEST and not self.force:
            raise RecipeError(
                f"the step rule tar is for tiny models, and this one has {count / 1e6:.0f} million "
                f"parameters (at most {LARGEST / 1e6:.0f}); step.force: true trains it all the same"
            )


def tar(now: Now, step: TarStep) -> Record:
    """Forget so that fine-tuning does not bring it back: tiny models only.

        θ_i = θ_{i-1} - AdamW(∇M_F(θ_{i-1})),  i = 1 … K,  θ_0 = θ
        g = Σ_i w_i ∇L_F(θ_i) + ∇L_R(θ),    w_i ∝ exp(λ (i - K)), Σ w_i = 1

    First order: the gradient at θ_i is taken as one at θ. L_F is the tamper loss, the entropy's
    descent or the NLL's ascent in the source. The start weights come back to the bit.

    Source: Tamirisa et al. 2024, arXiv:2408.00761.
    Differs: K ≤ 8 steps instead of 64, each followed by the tamper loss; the attacker trains on the
        step's own forget items, and its rates are greater (theirs are 2e-6, 2e-5 and 4e-5); no
        random mapping before.
    """
    parameters = list(now.parameters)
    rate = random.Random(now.seed).choice(step.attack_rates)
    attacker = torch.optim.AdamW(parameters, lr=rate, weight_decay=0)
    weights = [math.exp(step.decay * (i + 1 - step.attack_steps)) for i in range(step.attack_steps)]
    record: Record = {}
    total: Gradients = [None] * len(parameters)
    with now.moved([None] * len(parameters), 0.0):
        for weight in weights:
            recalled = now.recall()
            for parameter, gradient in zip(parameters, now.taken(), strict=True):
                parameter.grad = gradient
            attacker.step()
            attacker.zero_grad()
            found, gradients = now.gradient("forget")
            share = weight / sum(weights)
            for place, gradient in enumerate(gradients):
                if gradient is not None:
                    held = total[place]
                    scaled = gradient.mul_(share)
                    total[place] = scaled if held is None else held.add_(scaled)
            for name, value in found.items():
                record[name] = record.get(name, 0.0) + share * value
            if recalled:
                record |= {"recall.last": recalled["nll"], "attack.lr": rate}
    kept, retain = now.gradient(*now.rest)
    now.leave((1.0, total), (1.0, retain))
    return record | kept
