"""What schedules are made of: micro-batches, phases, and the ways to order and part items."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from typing import Any, Literal, TypeVar

from pydantic import Field

from expunge.config import Section

Item = TypeVar("Item")


@dataclass(frozen=True)
class MicroBatch:
    """Indices of the items whose loss is formed together; a half may be empty.

    Of n retain items, n + i in `retain` stands for forget item i while it is still to be kept: the
    retain terms read it.
    """

    forget: tuple[int, ...] = ()
    retain: tuple[int, ...] = ()

    def of(self, *halves: str) -> dict[Any, tuple[int, ...]]:
        """The indices of some halves, by half."""
        return {half: getattr(self, half) for half in halves}


@dataclass(frozen=True)
class Phase:
    """Steps with an optimiser of their own: moments and learning rate start anew with each phase.

    A step is a list of micro-batches.
    """

    steps: list[list[MicroBatch]]
    lr: float = 1.0
    """Factor of the recipe's learning rate."""
    epochs: int = 1
    """Passes that the steps are, all of one length."""


MeanOver = Literal["micro_batch", "step"]


class Paired(Section):
    """How often forget items are seen, and with how many retain items."""

    epochs: int = Field(default=5, ge=1)
    """Passes over the forget items of a phase."""

    micro_batch: int = Field(default=1, ge=1)
    """Forget items whose loss is formed together."""

    accumulation: int = Field(default=4, ge=1)
    """Micro-batches a step."""

    mean_over: MeanOver = Field(default="micro_batch", exclude_if=lambda of: of == "micro_batch")
    """`micro_batch` takes the mean of the losses of a step's micro-batches, as released trainers
    do, so that a token of a short micro-batch weighs more; `step` takes that over all items of the
    step, so that only micro_batch times accumulation matters. Losses that read a micro-batch as one
    (`npo_batch`, `kto`) are refused beside it."""

    retain_per_forget: int = Field(default=1, ge=1)
    """Retain items beside each forget item."""


def epoch_ends(phases: Iterable[Phase]) -> tuple[int, ...]:
    """The steps, counted from 1, after which an epoch of a phase ends."""
    ends, start = [], 0
    for phase in phases:
        length = len(phase.steps)
        ends += [start + length * k // phase.epochs for k in range(1, phase.epochs + 1)]
        start += length
    return tuple(ends)


def chunks(items: Sequence[Item], size: int) -> list[list[Item]]:
    """Runs of `size` items; the last may be smaller."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def parts(items: Sequence[Item], count: int) -> list[list[Item]]:
    """`count` runs whose sizes differ by one at most."""
    edges = [len(items) * k // count for k in range(count + 1)]
    return [list(items[a:b]) for a, b in pairwise(edges)]


def shuffled(items: Iterable[Item], key: str) -> list[Item]:
    """The items in an order that is a function of `key`."""
    order = list(items)
    random.Random(key).shuffle(order)
    return order


class Cycle:
    """Items drawn one after another, from the start again when they are used up."""

    def __init__(self, items: Sequence[int]) -> None:
        self.items: Iterator[int] = cycle(items)

    def take(self, count: int) -> tuple[int, ...]:
        """The next `count`; none where there are no items."""
        return tuple(islice(self.items, count))
