"""What a step rule is given, and what every rule is made of. θ are the trainable parameters."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from expunge import parallel, sharding
from expunge.config import Section
from expunge.needs import FORGET, Needs
from expunge.unlearn.objective import Term
from expunge.unlearn.trainer import Optimizer

Record = dict[str, float]
State = dict[str, float]
"""What a rule carries from step to step; `rate`, where it is there, replaces the schedule's."""

Gradients = list[Tensor | None]
"""A tensor for each parameter; None where nothing reaches it."""

Forwarded = tuple[str, int, int]
"""An item of a pack: its half, its index there, its tokens."""


class StepOptions(Section):
    """The options of one rule, and what they refuse."""

    def check(self, terms: Sequence[Term], optimizer: Optimizer, rank: int | None) -> None:
        """Refuse, with a ValueError, a branch that the rule cannot train; `rank` of its adapter."""

    def check_model(self, model: nn.Module) -> None:
        """Refuse, with a RecipeError, a model that the rule cannot train."""

    @property
    def needs_both(self) -> bool:
        """Whether each step must hold items of both halves, for one gradient is read against the
        other."""
        return False

    @property
    def recomputes(self) -> bool:
        """Whether it goes with optimizer.checkpointing."""
        return True

    def start(self, rate: float) -> State:
        """What the rule carries into the first step, where the peak learning rate is `rate`."""
        return {}


def _no_losses(*halves: str) -> Record:
    raise AssertionError("nothing gives the losses of a step here")


@dataclass(frozen=True)
class Now:
    """One step as its rule sees it."""

    parameters: Sequence[Parameter]
    backward: Callable[..., Record]
    """(*halves, scale={half: factor}) → adds the gradient of the loss of these halves, each times
    its factor, to `.grad`; returns its parts, unscaled. Halves that are asked for together are
    forwarded together. It adds what this rank's share of the items gives."""

    losses: Callable[..., Record] = _no_losses
    """(*halves) → the same record of the same items, without gradient and without dropout."""

    recall: Callable[[], Record] = _no_losses
    """Adds the gradient of the mean NLL of the forget items to `.grad`: what an attacker lowers.
    Empty where the step holds none."""

    rest: Sequence[str] = ("retain",)
    """The halves beside forget that a term reads."""

    masks: Mapping[Parameter, Tensor] = field(default_factory=dict)
    """Which weights of a parameter may move, for those that may move in part."""

    model: nn.Module = field(default_factory=nn.Module)
    forwarding: Sequence[Forwarded] = ()
    """The items of the pack that is being forwarded, in their order."""

    state: State = field(default_factory=dict)
    """Carried from step to step, and from a killed run to the next."""

    number: int = 0
    """Steps before this one."""

    seed: str = ""
    """Of this step; the same on every rank."""

    def gradient(self, *halves: str) -> tuple[Record, Gradients]:
        """The gradient of these halves over all ranks, taken out of `.grad`."""
        record = self.backward(*halves)
        return record, self.taken()

    def taken(self) -> Gradients:
        """What lies in `.grad`, summed over ranks, 0 at weights that may not move; nothing lies
        there then."""
        parallel.sum_gradients(self.parameters)
        found = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return self.free(found)

    def free(self, tensors: Gradients) -> Gradients:
        """The tensors, of each parameter one, with 0 put where a weight may not move."""
        for parameter, tensor in zip(self.parameters, tensors, strict=True):
            mask = self.masks.get(parameter)
            if mask is not None and tensor is not None:
                tensor.masked_fill_(~mask, 0.0)
        return tensors

    def leave(self, *parts: tuple[float, Gradients]) -> None:
        """Leave Σ factor · gradient in `.grad`; the gradients are used up."""
        for place, parameter in enumerate(self.parameters):
            for factor, gradients in parts:
                given, gradients[place] = gradients[place], None
                if given is None:
                    continue
                if parameter.grad is None:
                    parameter.grad = given if factor == 1.0 else given.mul_(factor)
                else:
                    parameter.grad.add_(given, alpha=factor)

    def total(self, record: Record) -> float:
        """The loss of all halves but forget."""
        return sum(record[half] for half in self.rest if half in record)

    @contextmanager
    def moved(self, by: Sequence[Tensor | None], length: float) -> Iterator[None]:
        """Within the block the weights are θ + length · by; after it they are θ to the bit.

        What is in `by` is not held on to.
        """
        direction: Tensor | None = None
        held = [sharding.local(parameter.detach()) for parameter in self.parameters]
        start = [tensor.clone() for tensor in held]
        for place, tensor in enumerate(held):
            direction = by[place]
            if direction is not None:
                tensor.add_(sharding.local(direction), alpha=length)
        by, direction = (), None
        try:
            yield
        finally:
            for tensor, before in zip(held, start, strict=True):
                tensor.copy_(before)

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """Within the block the loss is a function of the weights alone."""
        was = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was)


def norm(tensors: Sequence[Tensor | None]) -> float:
    """Global 2-norm, never zero."""
    given = [t for t in tensors if t is not None]
    squares = [torch.linalg.vector_norm(sharding.local(t)).square() for t in given]
    return max(sharding.norm_of_all(math.sqrt(float(sum(squares))), given), 1e-12)


@dataclass(frozen=True)
class StepRule:
    """One row: the function, its options, and what is known of it."""

    fn: Callable[[Now, Any], Record]
    options: type[StepOptions]
    test: str
    """The test that proves it."""
    apart: bool = True
    """Asks for the gradients of the halves one after the other."""
    buffers: int = 1
    """Copies of what is trained that it holds, beside the weights and one gradient."""
    sharded: bool = False
    """Whether it works on slices of the weights."""
    selective: bool = False
    """Leaves some weights without a gradient on purpose."""
    fidelity: str = "exact"
    needs: Needs = FORGET
    cost: str = "1 C a half"
