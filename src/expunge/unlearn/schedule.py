"""Schedules: which forget and retain items each optimiser step sees. A pure function of the step.

A step is a list of micro-batches; each holds the indices of its forget and of its retain items.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from expunge.config import Section


@dataclass(frozen=True)
class MicroBatch:
    """Indices into the forget and the retain set."""

    forget: tuple[int, ...]
    retain: tuple[int, ...]

    def of(self, *halves: str) -> dict[Any, tuple[int, ...]]:
        """The indices of some halves, by half."""
        return {half: getattr(self, half) for half in halves}


class Pairing(Section):
    """The released order: an epoch is one pass over the forget set, shuffled."""

    epochs: int = Field(default=5, ge=1)
    """Passes over the forget set."""

    micro_batch: int = Field(default=1, ge=1)
    """Forget items whose loss is formed together."""

    accumulation: int = Field(default=4, ge=1)
    """Micro-batches a step."""

    retain_per_forget: int = Field(default=1, ge=1)
    """Retain items beside each forget item: item i has i·k … i·k+k-1, modulo their number."""


def paired_steps(
    config: Pairing, forget_count: int, retain_count: int, *, seed: int
) -> list[list[MicroBatch]]:
    """Every step of a run: forget item i is trained beside retain items i·k … i·k+k-1.

    The last step of an epoch may be smaller. With k > 1 each epoch shifts by k-1 items, so that
    more of the retain set is seen; with k = 1 the pairs are those of the released system.

    Source: zjunlp/unlearn, semeval25 (arXiv:2503.21088).
    """
    k = config.retain_per_forget
    steps = []
    for epoch in range(config.epochs):
        order = list(range(forget_count))
        random.Random(f"{seed}:{epoch}").shuffle(order)
        batches = [
            MicroBatch(
                forget=tuple(chosen),
                retain=tuple(
                    (i * k + j + epoch * (k - 1)) % retain_count for i in chosen for j in range(k)
                ),
            )
            for chosen in _chunks(order, config.micro_batch)
        ]
        steps.extend(_chunks(batches, config.accumulation))
    return steps


def _chunks(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


@dataclass(frozen=True)
class Schedule:
    """One row of the table."""

    fn: Callable[..., list[list[MicroBatch]]]
    needs: str
    cost: str
    test: str
    fidelity: str = "exact"


SCHEDULES = {
    "pairing": Schedule(
        paired_steps,
        needs="retain",
        cost="epochs x (1 + retain_per_forget) C for each forget item",
        test="tests/unlearn/test_schedule.py",
    )
}
