"""Cross-calibration: would other documents have led to the same balance?

Dimensions: G points of a line, D documents of one side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

from expunge.evaluate.balance import balance, furthest, midway
from expunge.evaluate.membership import auc

Sides = tuple[np.ndarray, np.ndarray]
"""Of members and of non-members: scores (G, M), (G, N), or masks (M,), (N,)."""

STEPS = 40
"""Halvings of the bracket on interpolated scores, which cost nothing."""


@dataclass(frozen=True)
class Line:
    """What the attacks say of every document at some points of a line."""

    points: Sequence[float]
    """t, rising."""

    scores: Mapping[str, Sides]
    """By attack."""

    tasks: tuple[Sequence[str], Sequence[str]] | None = None
    """The task of each member and of each non-member, where tasks are balanced apart."""

    def at(self, t: float, kept: Sides | None = None) -> dict[str, Sides]:
        """The scores at t, each document's between those of the points beside it, (M,) and (N,),
        and those of each task where these are balanced apart; `kept` are masks of either side."""
        found: dict[str, Sides] = {}
        for name, (members, others) in self.scores.items():
            m, n = self._at(members, t), self._at(others, t)
            one, two = kept or (np.full(len(m), fill_value=True), np.full(len(n), fill_value=True))
            found[name] = m[one], n[two]
            for task in sorted({*self.tasks[0]}) if self.tasks else ():
                mine, theirs = (np.asarray(whose) == task for whose in self.tasks or ())
                found[f"{name} of {task}"] = m[one & mine], n[two & theirs]
        return found

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
                    "two_sided": furthest(one["two_sided"] for one in each.values()),
                    "ks": max(one["ks"] for one in each.values()),
                }
            )
        return found


def cross_calibrated(
    line: Line, members: Sequence[int], nonmembers: Sequence[int], *, folds: int
) -> dict[str, Any]:
    """For each fold: the t that the other folds balance, and what this one shows there.

    `members` and `nonmembers` are the fold of each document. Returns `folds` (each with `t` and the
    numbers of `balance` by attack and task), and of the held-out AUC, midway over these, `auc_mean`
    and `auc_deviation` over the folds, beside `t_deviation`. A fold that lacks a side, of a task
    too, is left out.
    `beyond` counts those that balance at no place between the line's ends, so that `t_deviation`
    is less than it would be.
    """
    m, n = np.asarray(members), np.asarray(nonmembers)
    found = []
    for fold in range(folds):
        held, others = (m == fold, n == fold), (m != fold, n != fold)
        given = [*line.at(0.0, held).values(), *line.at(0.0, others).values()]
        if min(len(side) for sides in given for side in sides) < 2:
            continue
        t = balanced_at(line, others)
        each = balance({a: (x.tolist(), y.tolist()) for a, (x, y) in line.at(t, held).items()})
        between = midway(one["auc"] for one in each.values())
        found.append({"fold": fold, "t": t, "auc": between, "membership": each})
    aucs, places = [one["auc"] for one in found], [one["t"] for one in found]
    return {
        "folds": found,
        "auc_mean": fmean(aucs) if aucs else None,
        "auc_deviation": stdev(aucs) if len(aucs) > 1 else None,
        "t_deviation": stdev(places) if len(places) > 1 else None,
        "beyond": sum(t in (line.points[0], line.points[-1]) for t in places),
    }


def balanced_at(line: Line, kept: Sides | None = None) -> float:
    """Where the AUC of some documents, midway, is 1/2; an end of the line where it is nowhere."""

    def off(t: float) -> float:
        return midway(auc(m.tolist(), n.tolist()) for m, n in line.at(t, kept).values()) - 0.5

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
