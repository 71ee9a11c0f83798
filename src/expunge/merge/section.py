"""The merge section of a recipe: how the branches of a run become one."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from expunge.config import Section
from expunge.lora import Lora
from expunge.merge.families import Elect, Matrix, Method, Span, Vote
from expunge.merge.methods import METHODS
from expunge.merge.options import check_options, resolved
from expunge.merge.trim import Settings
from expunge.registry import lookup


class Merge(Section):
    """How the branches become one."""

    of: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Names of the branches to merge, in order; null takes every branch."""

    method: str = "ties"
    """A name in merge.methods.METHODS."""

    density: float = Field(default=0.8, gt=0, le=1)
    """Share of each tensor to keep, for the methods that trim or drop."""

    weights: tuple[float, ...] | None = None
    """One weight a branch; null means 1 each."""

    groups: tuple[float, ...] | None = Field(default=None, min_length=1)
    """Factors of all weights in equal groups of blocks, from the first block to the last that the
    branches adapt; a layer outside any block has factor 1. Null means 1 everywhere."""

    vote: Vote = "unweighted"
    """Elect signs before weighting (peft) or after (mergekit)."""

    normalize: bool = False
    """Divide by the weights that took part; only for `space: delta`."""

    options: dict[str, bool | float | str] = Field(default_factory=dict)
    """Further options of the method, by the names that `expunge methods` gives."""

    space: Literal["factors", "delta"] = "factors"
    """`factors`: A's and B's are merged apart, as peft and the published system do; stays an
    adapter of the same rank. `delta`: the operator itself, on ΔW = scale · B A."""

    output: Literal["adapter", "model"] = "adapter"
    """`adapter`: a peft folder. `model`: a full model folder, which needs the base."""

    rank: int | None = Field(default=None, ge=1)
    """Rank of an adapter made in delta space; null means the sum of the branches' ranks."""

    seed: int = Field(default=42, ge=0)
    """Seeds what the methods drop at random."""

    @field_validator("weights", "groups")
    @classmethod
    def _usable(
        cls, given: tuple[float, ...] | None, info: ValidationInfo
    ) -> tuple[float, ...] | None:
        if given is not None and not any(given):
            raise ValueError(f"{info.field_name} must not all be zero")
        return given

    @model_validator(mode="after")
    def _consistent(self) -> "Merge":
        lookup(METHODS, self.method, "merge method")
        how = self.row.how
        check_options(self.method, self.row, self.options)
        if isinstance(how, Span) and how.of == "weights":
            raise ValueError(f"{self.method} merges whole weights; branches are updates of a base")
        if isinstance(how, Matrix) and how.statistics:
            raise ValueError(f"{self.method} needs statistics of each model; see expunge merge")
        if self.space == "factors" and not isinstance(how, Elect):
            raise ValueError(f"{self.method} needs space: delta")
        if self.normalize and self.space == "factors":
            raise ValueError("normalize needs space: delta, since factors carry roots of weights")
        if self.options.get("trim") == "model":
            raise ValueError("branches are trimmed by themselves; trim: model is for merge files")
        if self.groups is not None:
            self._check_groups()
        if self.rank is not None and (self.space, self.output) != ("delta", "adapter"):
            raise ValueError("rank needs space: delta and output: adapter; elsewhere it is given")
        return self

    def _check_groups(self) -> None:
        """Refuse groups where the result does not grow with the weights."""
        how = self.row.how
        if not (isinstance(how, Matrix) or (isinstance(how, Elect) and not how.by_energy)):
            raise ValueError(
                f"groups is not for {self.method}: methods that sum or elect weighted updates take "
                "it, knots and tsv too"
            )
        if self.normalize or self.options.get("divide") == "weights":
            raise ValueError("groups cannot be normalized: dividing by the weights would undo it")

    def check(self, who: str, adapters: Mapping[str, Lora]) -> None:
        """Refuse branches that cannot be merged so, by the adapters that they will have."""
        if self.weights is not None and len(self.weights) != len(adapters):
            raise ValueError(
                f"{who} has {len(self.weights)} weights for {len(adapters)} branches; give one each"
            )
        check_places(who, adapters)
        if self.space == "factors":
            check_ranks(who, adapters, "say space: delta")

    @property
    def row(self) -> Method:
        """The method's row; a weighted sum of branches is one of their updates."""
        return METHODS["task_arithmetic" if self.method == "linear" else self.method]

    def factor(self, block: int | None, blocks: int) -> float:
        """What all weights are multiplied by in one of so many blocks, counted from 0."""
        if self.groups is None or block is None:
            return 1.0
        return self.groups[block * len(self.groups) // blocks]

    def settings(self, name: str, weights: Sequence[float]) -> Settings:
        """What the method is told about one tensor."""
        given: dict[str, Any] = {"density": self.density, "vote": self.vote, **self.options}
        if self.normalize:
            given["divide"] = "weights"
        known = {name: value for name, value in given.items() if name in self.row.options}
        options = resolved(self.method, self.row, known, len(weights), where=name)
        return Settings(name, tuple(weights), options, self.seed)


def check_places(who: str, adapters: Mapping[str, Lora]) -> None:
    """Refuse branches that do not adapt the same layers."""
    for field in ("targets", "layers"):
        places = [getattr(lora, field) for lora in adapters.values()]
        if len({place if place is None else frozenset(place) for place in places}) > 1:
            raise ValueError(
                f"{who} takes branches that adapt the same layers, and lora.{field} differs: "
                f"{_listed(adapters, field)}"
            )


def check_ranks(who: str, adapters: Mapping[str, Lora], remedy: str) -> None:
    """Refuse branches of several ranks where factors are combined entry by entry."""
    if len({lora.rank for lora in adapters.values()}) > 1:
        raise ValueError(
            f"{who}: the branches have ranks {_listed(adapters, 'rank')}, so their factors "
            f"cannot be merged entry by entry; {remedy}"
        )


def _listed(adapters: Mapping[str, Lora], field: str) -> str:
    said = [(name, getattr(lora, field)) for name, lora in adapters.items()]
    return ", ".join(f"{value if value is not None else 'all'} ({name})" for name, value in said)
