"""A toy for step rules: two losses of one weight tensor in place of the halves of a branch."""

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from expunge.unlearn.steps import STEP_RULES, Now


class Toy:
    """A weight and the losses of its halves; `recall` descends what forget ascends."""

    def __init__(self, start: Tensor, forget, retain, rate: float = 0.1, seed: str = "0") -> None:
        self.weights = Parameter(start.clone())
        self.of = {"forget": forget, "retain": retain}
        self.rate, self.seed = rate, seed
        self.state: dict[str, float] = {}
        self.number = 0
        self.mask: Tensor | None = None

    def backward(self, *halves: str, scale: dict[str, float] | None = None) -> dict[str, float]:
        losses = {half: self.of[half](self.weights) for half in halves}
        sum((scale or {}).get(half, 1.0) * loss for half, loss in losses.items()).backward()
        return {half: float(loss.detach()) for half, loss in losses.items()}

    @torch.no_grad()
    def losses(self, *halves: str) -> dict[str, float]:
        return {half: float(self.of[half](self.weights)) for half in halves}

    def recall(self) -> dict[str, float]:
        return {"nll": -self.backward("forget", scale={"forget": -1.0})["forget"]}

    def gradient(self, rule: str, **options) -> tuple[Tensor, dict[str, float]]:
        """What the rule leaves and what it says of the next step; the state is carried on."""
        row = STEP_RULES[rule]
        step = row.options(rule=rule, **options)
        self.state = self.state or step.start(self.rate)
        now = Now(
            [self.weights],
            self.backward,
            losses=self.losses,
            recall=self.recall,
            masks={} if self.mask is None else {self.weights: self.mask},
            state=self.state,
            number=self.number,
            seed=self.seed,
        )
        self.weights.grad = None
        before = self.weights.detach().clone()
        record = row.fn(now, step)
        self.number += 1
        assert torch.equal(self.weights, before)  # a rule leaves the weights as they were
        return self.weights.grad.clone(), record

    @torch.no_grad()
    def go(self, gradient: Tensor, rate: float) -> None:
        """One plain step."""
        self.weights -= rate * gradient


@pytest.fixture(scope="session")
def toy():
    return Toy


@pytest.fixture(scope="session")
def linear():
    """A loss whose gradient is the given vector everywhere."""
    return lambda vector: lambda weights: (weights * torch.as_tensor(vector)).sum()


@pytest.fixture(scope="session")
def quadratic():
    """½ (w - c)ᵀ A (w - c), times a sign."""

    def make(curvature: Tensor, centre: Tensor, sign: float = 1.0):
        def loss(weights: Tensor) -> Tensor:
            away = (weights - centre).flatten()
            return sign * 0.5 * away @ curvature @ away

        return loss

    return make
