"""The work of attacking a model by relearning, counted from lengths alone."""

import math
from dataclasses import dataclass

from expunge.evaluate.revival import Relearn

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

    @property
    def forwards(self) -> int:
        """Tokens of a forward pass that take as long."""
        return (1 + BACKWARD) * self.trained + self.read


def relearning(how: Relearn, members: list[int], nonmembers: list[int]) -> Relearning:
    """The work on documents of so many tokens; which members are drawn is left to the mean."""
    known = how.trained_on(len(members))
    mean = sum(members) / max(1, len(members))
    asked = mean * (len(members) - known) + sum(nonmembers)
    return Relearning(
        trained=round(how.epochs * known * mean),
        read=round(2 * asked),
        steps=how.epochs * math.ceil(known / how.batch),
    )
