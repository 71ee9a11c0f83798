"""The work and the memory of attacking a model by relearning, counted from lengths alone."""

import math
from dataclasses import dataclass

from expunge.evaluate.revival import Relearn
from expunge.models import Dtype
from expunge.unlearn.footprint import Demand, Shape

BACKWARD = 2
"""A token's backward pass beside its forward one; what a step of it takes is not timed."""


@dataclass(frozen=True)
class Relearning:
    """What an attack forwards."""

    trained: int
    """Tokens of all steps."""
    read: int
    """Tokens scored, before and after."""
    steps: int
    longest: int
    batch: int

    @property
    def forwards(self) -> int:
        """Tokens of a forward pass that take as long."""
        return (1 + BACKWARD) * self.trained + self.read


def relearning(how: Relearn, members: list[int], nonmembers: list[int]) -> Relearning:
    """The work on documents of so many tokens; which members are drawn is left to the mean."""
    known = max(1, round(how.share * len(members)))
    mean = sum(members) / max(1, len(members))
    asked = mean * (len(members) - known) + sum(nonmembers)
    return Relearning(
        trained=round(how.epochs * known * mean),
        read=round(2 * asked),
        steps=how.epochs * math.ceil(known / how.batch),
        longest=max([*members, *nonmembers, 1]),
        batch=min(how.batch, known),
    )


def relearn_demand(how: Relearn, work: Relearning, shape: Shape, weights: Dtype) -> Demand:
    """What its training asks of memory, if the longest documents come together."""
    return Demand(
        optimizer=how.optimizer,
        weights=weights,
        passes=((work.longest,) * work.batch,),
        piece=work.longest,
        longest=work.longest,
        rank=how.rank,
        trained=shape.adapter(how.rank),
    )
