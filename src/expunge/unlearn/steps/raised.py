"""A retain weight that answers when the retain loss rises above what it was at first."""

from typing import Literal

from pydantic import Field, model_validator

from expunge import parallel
from expunge.unlearn.steps.rule import Now, Record, State, StepOptions


class RaisedStep(StepOptions):
    """Retain more strongly while the retain loss is above its mean of the first steps."""

    rule: Literal["raised"] = "raised"
    """Its name in STEP_RULES."""

    first: int = Field(ge=1)
    """Steps whose mean retain loss is stored: an epoch's. Their weight is `least`."""

    least: float = Field(default=1.2, gt=0)
    """The smallest retain weight."""

    most: float = Field(default=2.3, gt=0)
    """The greatest."""

    slope: float = Field(default=0.3, gt=0)
    """Factor of the power."""

    base: float = Field(default=6.0, gt=1)
    """What is raised to the power of the excess, in nats."""

    offset: float = 0.8
    """What is added to it."""

    @model_validator(mode="after")
    def _ordered(self) -> "RaisedStep":
        if self.most < self.least:
            raise ValueError("most must be at least least")
        return self

    def start(self, rate: float) -> State:
        """The retain weight; the sum of the first retain losses and how many there were."""
        return {"weight": self.least, "sum": 0.0, "count": 0.0}

    def weight(self, excess: float) -> float:
        """The retain weight where the loss is so far above its mean."""
        raised = self.slope * self.base ** min(excess, 64.0) + self.offset
        return min(max(raised, self.least), self.most)


def raised(now: Now, step: RaisedStep) -> Record:
    """A weight on the retain loss that grows with how far that loss is above its first mean.

        g = ∇(L_F + a L_R),    a = clip(0.3 · 6^Δ + 0.8, 1.2, 2.3),    Δ = L_R - mean of the first

    Source: SHA256 at SemEval-2025 Task 4, as its description gives it.
    Differs: a follows the retain loss of the step before; the mean is that of the first steps.
    """
    state = now.state
    used = state["weight"]
    record = now.backward("forget", *now.rest, scale=dict.fromkeys(now.rest, used))
    parallel.sum_gradients(now.parameters)
    if any(half in record for half in now.rest):
        loss = now.total(record)
        if state["count"] < step.first:
            state["sum"] += loss
            state["count"] += 1
        else:
            state["weight"] = step.weight(loss - state["sum"] / state["count"])
    return record | {"weight": used}
