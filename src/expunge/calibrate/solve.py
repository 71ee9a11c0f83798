"""Solve for the balance along one line: membership grows from its one end to its other."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class Balance(Protocol):
    """What is known of membership at one point."""

    @property
    def auc(self) -> float:
        """1/2 where members look like text never seen."""
        ...

    @property
    def gap(self) -> float:
        """Of the same sign as AUC - 1/2, and without an end."""
        ...


@dataclass(frozen=True)
class Solved:
    """Where a line is balanced, as near as was found."""

    t: float
    auc: float
    bracketed: bool
    """Whether points on both sides of 1/2 were seen, or one on it."""


def solve_balance(
    read: Callable[[float], Balance],
    *,
    ends: tuple[float | None, float | None] = (None, None),
    tolerance: float,
    steps: int,
    start: float | None = None,
) -> Solved:
    """The t in [0, 1] where the AUC is 1/2, by false position within a bracket.

        t = a - g_a (b - a) / (g_b - g_a),   kept a tenth of the bracket off its ends

    `ends` are the gaps at 0 and 1 as far as they are known: they place the first step, where
    `start` does not, and are not taken for seen. The side of a point is that of its AUC; the gap
    only says how far it is, for an AUC of 0 or 1 says nothing. A side that stays twice has its gap
    halved (Illinois).
    """
    low, high = 0.0, 1.0
    below, above = -abs(ends[0] or 1.0), abs(ends[1] or 1.0)
    seen_below = seen_above = False
    best: tuple[float, float] | None = None
    last = 0
    for step in range(steps):
        width = high - low
        t = low - below * width / (above - below)
        t = min(max(t, low + 0.1 * width), high - 0.1 * width)
        t = start if start is not None and step == 0 else t
        found = read(t)
        off = found.auc - 0.5
        if best is None or abs(off) < abs(best[1] - 0.5):
            best = (t, found.auc)
        if abs(off) <= tolerance:
            return Solved(t, found.auc, bracketed=True)
        size = max(abs(found.gap), 1e-3)
        if off < 0:
            low, below, seen_below = t, -size, True
            above = above / 2 if last < 0 else above
        else:
            high, above, seen_above = t, size, True
            below = below / 2 if last > 0 else below
        last = -1 if off < 0 else 1
    assert best is not None
    return Solved(*best, bracketed=seen_below and seen_above)
