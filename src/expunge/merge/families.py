"""The families of merge methods, and what a row of their table says.

Dimensions: M models, n numbers of a tensor.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import Tensor

from expunge.merge import pieces
from expunge.merge.operands import Operand
from expunge.merge.trim import Keep, Settings

Vote = Literal["unweighted", "weighted"]


@dataclass(frozen=True)
class Span:
    """A weighted sum of the models, its coefficients from their inner products."""

    fn: Callable[[np.ndarray, Settings], np.ndarray]
    of: Literal["weights", "deltas", "either"] = "weights"
    """What is summed; `either` takes deltas where a base is given."""

    measures: bool = True
    """Whether the inner products are needed."""


@dataclass(frozen=True)
class Elect:
    """Trim each delta, elect a sign for each entry, sum or average those that agree.

        τ_i = trim(δ_i),   σ = sign(Σ_i v_i),   v_i = τ_i (unweighted vote) or w_i τ_i (weighted)
        base + λ (Σ_i w_i τ_i [sign(v_i) = σ]) / D,   D = 1, Σ_i [..] (count) or Σ_i |w_i| [..]

    entry by entry; a sum of 0 elects +. Without election every entry takes part.
    """

    keep: Keep = "all"
    elect: bool = False
    by_energy: bool = False
    """Weights are the models' shares of Σ τ²."""


@dataclass(frozen=True)
class Piece:
    """Each weight by itself, given some sums over its tensor."""

    fn: pieces.Apply
    prepare: Callable[[Operand, Settings], Any] = pieces.nothing
    looks: bool = False
    """Whether what it adds to the base hangs on the base's own weights."""


@dataclass(frozen=True)
class Matrix:
    """Whole matrices at once."""

    fn: Callable[..., Tensor]
    statistics: bool = False
    """Needs a matrix from each model beside its weights."""


@dataclass(frozen=True)
class Method:
    """One row: how deltas meet, what it takes, and where it is from."""

    how: Span | Elect | Piece | Matrix
    source: str
    summary: str = ""
    """What it does, where its function's docstring does not say."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Name and default of each option; REQUIRED where it must be given."""

    mergekit: Mapping[str, Any] = field(default_factory=dict)
    """Defaults under which the row is mergekit's."""

    base: bool = True
    """Needs a base model."""

    models: tuple[int, int] = (1, 1 << 30)
    """How few and how many it merges, the base left out."""

    grows: bool = True
    """Whether what it makes of a single update grows with the weight of that."""

    fidelity: str = "exact"
    """exact · as-released quirk · adapted · inspired · own."""

    differs: str = ""
    """Where the code departs from the source."""

    needs: tuple[str, ...] = ()
    """Options and statistics that it asks for, beside the models."""

    cost: str = "one pass over each tensor"
    test: str = (
        "tests/merge/test_mergekit_parity.py::test_a_merge_file_gives_what_mergekit_makes_of_it"
    )

    def each(self, option: str) -> bool:
        """Whether an option is given one a model."""
        return option in ("density", "gamma", "scale") or (
            option == "epsilon" and isinstance(self.how, Elect)
        )

    @property
    def merges(self) -> str:
        """How many models it takes, in words."""
        fewest, most = self.models
        count = "1 model" if fewest == 1 else f"{fewest} models"
        more = "" if fewest == most else " or more"
        return count + more + (" and a base" if self.base else "")

    @property
    def fn(self) -> Callable[..., Any]:
        """What docs/methods.md describes."""
        return self.how.fn if not isinstance(self.how, Elect) else Elect

    @property
    def random(self) -> bool:
        """Draws numbers."""
        return isinstance(self.how, Elect) and self.how.keep in ("random", "ranked")


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED = _Required()
"""The default of an option that must be given."""
