"""The sets that a term may read: the two halves, and what is made to go with their items.

A set has the losses that make sense on it. Its side is the gradient that a step rule counts it to:
what changes the model is on the forget side, what holds it is on the retain side.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from expunge.unlearn.departure import DEPARTURE_LOSSES
from expunge.unlearn.forget import FORGET_LOSSES
from expunge.unlearn.losses import Loss
from expunge.unlearn.preference import PREFERENCE_LOSSES
from expunge.unlearn.retain import RETAIN_LOSSES

Half = Literal[
    "forget",
    "retain",
    "refusal",
    "alternate",
    "paraphrase",
    "mismatch",
    "random_label",
    "neutral",
    "refusal_pair",
    "alternate_pair",
]
Side = Literal["forget", "retain"]
SIDES: tuple[Side, ...] = ("forget", "retain")


@dataclass(frozen=True)
class ItemSet:
    """One row: what a term may do with a set, and how its items come."""

    losses: Mapping[str, Loss] = field(default_factory=lambda: RETAIN_LOSSES)
    side: Side = "forget"
    data: tuple[str, ...] = ("forget",)
    """Sets of the recipe that it is, or is made of."""
    width: int = 1
    """Sequences that belong together: 2 where an item is a pair, first what is wanted."""


# Levels are those of the forget items themselves.
_WITHOUT_LEVELS = {name: row for name, row in FORGET_LOSSES.items() if not row.needs_level}

SETS: dict[Half, ItemSet] = {
    "forget": ItemSet({**RETAIN_LOSSES, **DEPARTURE_LOSSES, **FORGET_LOSSES}),
    "retain": ItemSet(side="retain", data=("retain",)),
    "refusal": ItemSet(),
    "alternate": ItemSet(),
    "paraphrase": ItemSet({**RETAIN_LOSSES, **DEPARTURE_LOSSES, **_WITHOUT_LEVELS}),
    "mismatch": ItemSet(),
    "random_label": ItemSet(),
    "neutral": ItemSet({**RETAIN_LOSSES, **DEPARTURE_LOSSES}, side="retain", data=("neutral",)),
    "refusal_pair": ItemSet(PREFERENCE_LOSSES, width=2),
    "alternate_pair": ItemSet(PREFERENCE_LOSSES, width=2),
}


def units(half: Half, items: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The items of a set that no loss can part: one by one, or pair by pair."""
    width = SETS[half].width
    return [items[start : start + width] for start in range(0, len(items), width)]
