"""Normalised gradient difference, with a learning rate fitted to the retain loss along it."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from expunge.unlearn.objective import Term
from expunge.unlearn.sets import SETS
from expunge.unlearn.steps.rule import Now, Record, State, StepOptions, norm
from expunge.unlearn.trainer import Optimizer

_PLACES = (-2.0, -1.0, 0.0, 1.0, 2.0)
"""Where along the step the retain loss is read, in learning rates."""


class NgdiffStep(StepOptions):
    """Normalised gradient difference with an automatic learning rate."""

    rule: Literal["ngdiff"] = "ngdiff"
    """Its name in STEP_RULES."""

    every: int = Field(default=10, ge=0)
    """Steps between two fits of the learning rate, which starts from optimizer.lr and then takes
    the place of the schedule; 0 leaves the schedule's."""

    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Share of the old rate in the new one."""

    least_fit: float = Field(default=0.99, ge=0, lt=1)
    """R² below which a fit is not believed."""

    @property
    def needs_both(self) -> bool:
        """The lengths of the two are brought together."""
        return True

    def check(self, terms: Sequence[Term], optimizer: Optimizer, rank: int | None) -> None:
        """The forget loss is the NLL's ascent, and a fitted rate is that of a plain step."""
        for term in terms:
            told = (term.half, term.loss)
            if SETS[term.half].side == "forget" and told != ("forget", "gradient_ascent"):
                on = "" if term.half == "forget" else f" on {term.half}"
                raise ValueError(
                    f"the step rule ngdiff takes gradient_ascent on forget, not {term.loss}{on}; "
                    "the rule normalized takes any"
                )
        plain = optimizer.kind == "sgd" and optimizer.clip is None and not optimizer.weight_decay
        if self.every and not plain:
            raise ValueError(
                "the step rule ngdiff fits its rate along the gradient itself: set optimizer.kind: "
                "sgd, optimizer.clip: null and optimizer.weight_decay: 0, or step.every: 0 for the "
                "schedule's rate"
            )

    def start(self, rate: float) -> State:
        """The learning rate, where it is fitted."""
        return {"rate": rate} if self.every else {}


def ngdiff(now: Now, step: NgdiffStep) -> Record:
    """Descend the retain NLL and ascend the forget NLL at equal length; the rate is fitted.

        g = ∇M_R/‖∇M_R‖ - ∇M_F/‖∇M_F‖,    g·∇M_R ≥ 0 ≥ g·∇M_F
        η ← 0.9 η + 0.1 min(2η, max(η/2, η*)),    η* the minimum of a parabola in L_R(θ - x g)

    The forget loss is gradient_ascent, L_F = -M_F. To first order a plain step never trades one
    half for the other; AdamW rescales each weight and weight decay adds to them, and the guarantee
    is lost. A fit counts if the
    parabola opens upwards, falls along the step and explains the losses (R²). The ascent never
    fades: give the branch a stop guard.

    Source: NGDiff, Bu et al. 2024, arXiv:2410.22086; the rate is that of GeN, arXiv:2407.02772.
    Differs: the parabola is fitted to five losses, not three, for R² of three is always 1.
    """
    record, forget = now.gradient("forget")
    kept, retain = now.gradient(*now.rest)
    norm_f, norm_r = norm(forget), norm(retain)
    now.leave((1 / norm_r, retain), (1 / norm_f, forget))
    record |= kept | {"norm.forget": norm_f, "norm.retain": norm_r}
    if step.every and now.number % step.every == 0:
        rate = now.state["rate"]
        direction = [parameter.grad for parameter in now.parameters]
        losses = []
        for place in _PLACES:
            with now.moved(direction, -place * rate):
                losses.append(now.total(now.losses(*now.rest)))
        slope, curvature, fit = parabola(losses)
        record["fit"] = fit
        if slope < 0 < curvature and fit > step.least_fit:
            best = -slope / (2 * curvature) * rate
            found = min(2 * rate, max(rate / 2, best))
            now.state["rate"] = step.momentum * rate + (1 - step.momentum) * found
            record["rate.fitted"] = best
    return record


def parabola(losses: Sequence[float]) -> tuple[float, float, float]:
    """Slope, curvature and R² of c + b x + a x² fitted to the losses at x = -2, -1, 0, 1, 2.

    b = Σ x L / 10,    a = Σ (x² - 2) L / 14
    """
    slope = sum(x * loss for x, loss in zip(_PLACES, losses, strict=True)) / 10
    curvature = sum((x * x - 2) * loss for x, loss in zip(_PLACES, losses, strict=True)) / 14
    mean = sum(losses) / 5
    spread = sum((loss - mean) ** 2 for loss in losses)
    explained = sum((slope * x + curvature * (x * x - 2)) ** 2 for x in _PLACES)
    return slope, curvature, explained / spread if spread > 0 else 0.0
