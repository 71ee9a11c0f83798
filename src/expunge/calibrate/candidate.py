"""Candidates: points between two ends, each a branch at some step or the target itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from expunge.config import Section
from expunge.merge.families import Elect
from expunge.merge.methods import METHODS
from expunge.merge.section import Merge
from expunge.registry import lookup

TARGET = "target"
"""The end without any update."""


class End(Section):
    """One end of a line of merges."""

    branch: str
    """A branch's name, or `target` for no update at all."""

    step: int | None = None
    """The step of a kept snapshot; null is the branch as training left it."""

    @property
    def label(self) -> str:
        """As in `deep@40`."""
        return self.branch if self.step is None else f"{self.branch}@{self.step}"


class Candidate(Section):
    """A merge on the line between two ends: t = 0 is `over`, t = 1 is `under`.

    weights = scale · (1 - t, t)
    """

    over: End
    """The end that forgets too much."""

    under: End
    """The end that forgets too little."""

    t: float
    """Where between them."""

    method: str = "linear"
    """A name in merge.methods.METHODS."""

    scale: float = 1.0
    """Sum of the two weights."""

    density: float = 0.8
    """Share kept, for methods that trim or drop."""

    groups: tuple[float, ...] | None = None
    """Factors of the weights for equal groups of blocks; null is 1 everywhere."""

    repair: float = Field(default=0.0, ge=0)
    """Strength of the retain-aware repair of the merged update; 0 is none."""

    weights: tuple[float, float] | None = None
    """Both weights outright, in place of t and scale: what a plain merge uses."""

    @property
    def label(self) -> str:
        """The line it lies on, and where."""
        where = f"{self.method} {self.over.label}–{self.under.label}"
        return where + (f" {self.weights}" if self.weights else f" t={self.t:.3f}")

    @property
    def parts(self) -> list[tuple[End, float]]:
        """The updates that are merged, each with its weight; the target has none."""
        if self.over == self.under:
            return [] if self.over.branch == TARGET else [(self.over, self.scale)]
        pair = self.weights or (self.scale * (1 - self.t), self.scale * self.t)
        both = [(self.over, pair[0]), (self.under, pair[1])]
        return [(end, weight) for end, weight in both if weight and end.branch != TARGET]

    @property
    def merge(self) -> Merge | None:
        """The merge of its parts, in order; none where there is nothing to merge."""
        weights = tuple(weight for _, weight in self.parts)
        if not weights:
            return None
        return Merge(
            method=self.method,
            density=self.density,
            weights=weights,
            space=space_of(self.method),
            groups=self.groups,
        )

    def at(self, t: float) -> "Candidate":
        """The same line, elsewhere."""
        return self.model_copy(update={"t": t})


def alone(end: End, scale: float = 1.0) -> Candidate:
    """An end by itself."""
    return Candidate(over=end, under=end, t=0.0, scale=scale)


def plain(method: str, over: End, under: End, density: float) -> Candidate:
    """The paper's merge of two ends: weights 1 and 1."""
    weights = (1.0, 1.0)
    return Candidate(
        over=over, under=under, t=0.5, scale=2.0, method=method, density=density, weights=weights
    )


def space_of(method: str) -> Literal["factors", "delta"]:
    """Where a method merges branches: a plain sum is exact on ΔW, and stays low-rank there; what
    trims does so on the factors, as the published system."""
    how = lookup(METHODS, "task_arithmetic" if method == "linear" else method, "merge method").how
    return "factors" if isinstance(how, Elect) and how != Elect() else "delta"


def folders_of(candidate: Candidate, ends: Mapping[str, Path]) -> list[Path]:
    """The adapter folders of a candidate's parts; `ends` are the folders by label."""
    return [ends[end.label] for end, _ in candidate.parts]
