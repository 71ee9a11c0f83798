"""Cross-calibration: would other documents have led to the same balance?

Dimensions: G points of a line, D documents of one side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

import numpy as np

from expunge.evaluate.balance import balance, midway
from expunge.evaluate.membership import auc

Sides = tuple[np.ndarray, np.ndarray]
"""Scores of members and of non-members: (G, M), (G, N)."""

STEPS = 40
"""Halvings of the bracket on interpolated scores, which cost nothing."""


@dataclass(frozen=True)
class Line:
    """What the attacks say of every document at some points of a line."""

    points: Sequence[float]
    """t, rising."""

    scores: Mapping[str, Sides]
    """By attack."""

    def at(self, t: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The scores at t, each document's between those of the points beside it."""
        return {name: (self._at(m, t), self._at(n, t)) for name, (m, n) in self.scores.items()}

    def _at(self, values: np.ndarray, t: float) -> np.ndarray:
        return np.array([np.interp(t, self.points, column) for column in values.T])

    def curve(self) -> list[dict[str, float]]:
        """The balance at each point, the attacks taken together as a reading does."""
        found = []
        for t in self.points:
            each = balance({name: (m.tolist(), n.tolist()) for name, (m, n) in self.at(t).items()})
            found.append(
                {
                    "t": t,
                    "auc": midway(one["auc"] for one in each.values()),
                    "two_sided": max(one["two_sided"] for one in each.values()),
                    "ks": max(one["ks"] for one in each.values()),
                }
            )
        return found


def cross_calibrated(
    line: Line, members: Sequence[int], nonmembers: Sequence[int], *, folds: int
) -> dict[str, Any]:
    """For each fold: the t that the other folds balance, and what this one shows there.

    `members` and `nonmembers` are the fold of each document. Returns `folds` (each with `t` and the
    numbers of `balance` by attack), and of the held-out AUC, midway over the attacks, `auc_mean`
    and `auc_deviation` over the folds, beside `t_deviation`. A fold that lacks a side is left out.
    `beyond` counts those that balance at no place between the line's ends, so that `t_deviation`
    is less than it would be.
    """
    m, n = np.asarray(members), np.asarray(nonmembers)
    found = []
    for fold in range(folds):
        sides = [
            side for whose in (m, n) for side in ((whose == fold).sum(), (whose != fold).sum())
        ]
        if min(sides) < 2:
            continue
        t = balanced_at(line, m != fold, n != fold)
        kept = {a: (x[m == fold], y[n == fold]) for a, (x, y) in line.at(t).items()}
        each = balance({a: (x.tolist(), y.tolist()) for a, (x, y) in kept.items()})
        between = midway(one["auc"] for one in each.values())
        found.append({"fold": fold, "t": t, "auc": between, "membership": each})
    aucs, places = [one["auc"] for one in found], [one["t"] for one in found]
    return {
        "folds": found,
        "auc_mean": fmean(aucs) if aucs else None,
        "auc_deviation": pstdev(aucs) if aucs else None,
        "t_deviation": pstdev(places) if places else None,
        "beyond": sum(t in (line.points[0], line.points[-1]) for t in places),
    }


def balanced_at(line: Line, members: np.ndarray, nonmembers: np.ndarray) -> float:
    """Where the AUC of some documents, midway, is 1/2; an end of the line where it is nowhere."""

    def off(t: float) -> float:
        scores = line.at(t).values()
        return midway(auc(m[members].tolist(), n[nonmembers].tolist()) for m, n in scores) - 0.5

    low, high = line.points[0], line.points[-1]
    if off(low) >= 0:
        return low
    if off(high) <= 0:
        return high
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if off(middle) < 0 else (low, middle)
    return (low + high) / 2


def around(t: float, step: float = 0.06) -> list[float]:
    """Five points about t, within [0, 1]."""
    return sorted({min(1.0, max(0.0, t + k * step)) for k in (-2, -1, 0, 1, 2)})
