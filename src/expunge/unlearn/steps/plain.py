"""Step rules of one gradient a half: summed, brought to length one, held by a multiplier."""

from typing import Literal

from pydantic import Field

from expunge import parallel
from expunge.unlearn.steps.rule import Now, Record, State, StepOptions, norm


class JointStep(StepOptions):
    """One gradient of the summed loss."""

    rule: Literal["joint"] = "joint"
    """Its name in STEP_RULES."""


class NormalizedStep(StepOptions):
    """Each half's gradient brought to length one."""

    rule: Literal["normalized"] = "normalized"
    """Its name in STEP_RULES."""

    forget_weight: float = Field(default=1.0, gt=0)
    """The largest share of the forget direction."""

    fade_below: float = Field(default=0.0, ge=0)
    """Below this forget loss the forget direction fades in proportion; 0 never."""

    @property
    def needs_both(self) -> bool:
        """The lengths of the two are brought together."""
        return True


class DualStep(StepOptions):
    """Forget under the constraint that the retain loss stays below a limit."""

    rule: Literal["dual"] = "dual"
    """Its name in STEP_RULES."""

    limit: float = Field(ge=0)
    """ε, the retain loss (the sum of its terms) that is allowed."""

    multiplier: float = Field(default=1.0, ge=0)
    """λ at the start."""

    rate: float = Field(default=0.1, gt=0)
    """η, by how much λ moves for each unit of the constraint."""

    warmup: int = Field(default=0, ge=0)
    """Steps before λ begins to move."""

    every: int = Field(default=1, ge=1)
    """Steps between two moves of λ, which read the mean retain loss of those steps; an epoch's
    steps make it move once an epoch."""

    def start(self, rate: float) -> State:
        """λ, and the retain losses since it moved last."""
        return {"multiplier": self.multiplier, "sum": 0.0, "count": 0.0}


def joint(now: Now, step: JointStep) -> Record:
    """One gradient of the summed loss.

        g = ∇(L_F + L_R)

    Source: plain stochastic gradient descent on the objective.
    """
    record = now.backward("forget", *now.rest)
    parallel.sum_gradients(now.parameters)
    return record


def normalized(now: Now, step: NormalizedStep) -> Record:
    """Each half's gradient brought to length one, so that neither drowns the other.

        g = ∇L_R/‖∇L_R‖ + w ∇L_F/‖∇L_F‖,    w = forget_weight · min(1, L_F / fade_below)

    Source: NGDiff, Bu et al. 2024, arXiv:2410.22086.
    Differs: any forget loss in place of -NLL; the share fades as a bounded loss is met; the
        learning rate is the schedule's, not the fitted one.
    """
    record, forget = now.gradient("forget")
    kept, retain = now.gradient(*now.rest)
    norm_f, norm_r = norm(forget), norm(retain)
    fade = min(1.0, record["forget"] / step.fade_below) if step.fade_below else 1.0
    share = step.forget_weight * fade
    now.leave((1 / norm_r, retain), (share / norm_f, forget))
    return record | kept | {"norm.forget": norm_f, "norm.retain": norm_r, "share": share}


def dual(now: Now, step: DualStep) -> Record:
    """Forget as far as the retain loss allows: a multiplier grows while it is above its limit.

        g = ∇(L_F + λ L_R),    then  λ ← max(0, λ + η (L_R - ε))

    At rest either L_R = ε or λ = 0: no weight between the halves has to be guessed. Any forget loss
    will do.

    Source: the controller of PDU, Entesari et al. 2025, arXiv:2506.05314.
    Differs: λ moves once a step or once in `every`, not at each micro-batch.
    """
    state = now.state
    scale = dict.fromkeys(now.rest, state["multiplier"])
    record = now.backward("forget", *now.rest, scale=scale)
    parallel.sum_gradients(now.parameters)
    used = state["multiplier"]
    if now.number >= step.warmup and any(half in record for half in now.rest):
        state["sum"] += now.total(record)
        state["count"] += 1
        if state["count"] >= step.every:
            over = state["sum"] / state["count"] - step.limit
            state |= {"multiplier": max(0.0, used + step.rate * over), "sum": 0.0, "count": 0.0}
    return record | {"multiplier": used}
