"""The calibration section of a recipe: what is searched, what for, and within which limits."""

import re
from collections.abc import Iterable, Mapping
from operator import not_

from pydantic import Field, field_serializer, field_validator, model_validator

from expunge.adapter_files import blocks_of
from expunge.calibrate.candidate import space_of
from expunge.calibrate.objectives import OBJECTIVES
from expunge.config import Section
from expunge.errors import RecipeError
from expunge.evaluate.balance import CHEAP
from expunge.lora import Lora
from expunge.merge.section import Merge, check_places
from expunge.registry import lookup

Range = tuple[float, float]


_NAMED = re.compile(r"(?i)([?&](?:password|passwd|pwd|sslpassword)=)[^&]*")
"""A password among the options of a URL."""


def without_passwords(url: str) -> str:
    """The URL of a storage with *** for each password, as SQLAlchemy reads it; of one that it does
    not read, all from the user to the last @."""
    by_hand = _NAMED.sub(r"\1***", re.sub(r"(?<=://)([^/@:?]*):.*@", r"\1:***@", url))
    try:
        from sqlalchemy import make_url
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError:
        return by_hand
    try:
        read = make_url(url)
    except (SQLAlchemyError, ValueError):
        return by_hand
    if "@" in f"{read.host}{read.database}":  # the password goes on there
        return by_hand
    plain = read.render_as_string(hide_password=True)
    shown = _NAMED.sub(r"\1***", plain)
    return url if read.password is None and shown == plain else shown


class Floors(Section):
    """What a candidate must keep, against the target; a collapsed one never does."""

    retain: float = Field(default=0.9, ge=0, le=1)
    """Least share of the target's score that each retain term keeps."""

    neutral: float = Field(default=1.15, ge=1)
    """Most that the NLL of neutral texts may grow, as a factor."""

    mmlu: float | None = Field(default=None, ge=0)
    """Most MMLU accuracy that may be lost, judged on the finalists; null asks nothing."""


class Calibrate(Section):
    """A merge of two branches, chosen so that forgotten text looks like text never seen."""

    of: tuple[str, ...] | None = Field(default=None, min_length=1)
    """The branches to choose among; null takes every LoRA branch."""

    objective: str = "balanced"
    """A name in calibrate.objectives.OBJECTIVES."""

    floors: Floors = Field(default_factory=Floors)
    """What must be kept."""

    attacks: tuple[str, ...] = ("loss", "min_k_plus_plus", "zlib_total")
    """The membership attacks that are balanced together."""

    methods: tuple[str, ...] = ("linear", "ties")
    """Merge methods to choose among; a plain sum is exact, what trims works on the factors."""

    density: Range = (0.5, 1.0)
    """Shares kept, from and to, for methods that trim."""

    scale: Range = (0.7, 1.3)
    """Sums of the weights, from and to."""

    groups: int = Field(default=1, ge=1)
    """Equal groups of blocks that may be weighted apart; 1 weighs all alike."""

    spread: Range = (0.6, 1.4)
    """Factors of a group's weights, from and to."""

    repair: float = Field(default=0.0, ge=0)
    """Greatest strength of the retain-aware repair (SAGE) that is tried; 0 tries none."""

    snapshots: int = Field(default=3, ge=0)
    """Kept snapshots of each branch that are ends too, at most, evenly spread."""

    trials: int = Field(default=12, ge=1)
    """Lines between two ends that are tried; on each the balance is solved for."""

    steps: int = Field(default=5, ge=2)
    """Candidates on one line, at most, until it is balanced."""

    tolerance: float = Field(default=0.02, gt=0, lt=0.5)
    """How near the AUC, midway over the attacks, must come to 1/2 on the calibration fold. Of few
    members, half of what one of them counts is near enough to be called balanced."""

    per_term: int = Field(default=12, ge=2)
    """Items of each term that are screened, at most."""

    documents: int = Field(default=40, ge=4)
    """Members, and non-members, that the search reads, at most; with by_task of each task. The
    finalists are balanced on all."""

    finalists: int = Field(default=2, ge=1)
    """Candidates that are balanced on all documents of the calibration fold, generated from and
    scored officially there; up to three times as many where these fail or are not balanced."""

    sampler: str = Field(default="tpe", pattern="^(tpe|cmaes)$")
    """Optuna's sampler of what is not solved for."""

    storage: str | None = None
    """URL of Optuna's storage, for many workers; null is SQLite in the stage's folder. A password
    in it is used and written nowhere."""

    standins: bool = False
    """Calibrate against documents made up in the form of the members, not the given non-members,
    which then only judge."""

    by_task: bool = Field(default=False, exclude_if=not_)
    """Balance the documents of each `task` apart, too: the worst attack on the worst task counts.
    Nonmembers need a `task` in their rows; members without one take that of their items."""

    seed: int = 0
    """Seeds the sampler and the samples."""

    @property
    def judged(self) -> int:
        """How many candidates are judged as finalists, at most."""
        return min(3 * self.finalists, self.trials)

    @field_serializer("storage", when_used="json")
    def _without_password(self, url: str | None) -> str | None:
        return None if url is None else without_passwords(url)

    @field_validator("attacks")
    @classmethod
    def _attacks_are_cheap(cls, attacks: tuple[str, ...]) -> tuple[str, ...]:
        for name in attacks:
            if name not in CHEAP:
                raise ValueError(f"attacks: '{name}' is none of {', '.join(CHEAP)}")
        if not attacks or len(set(attacks)) < len(attacks):
            raise ValueError("attacks must name at least one, and none twice")
        return attacks

    @field_validator("density", "scale", "spread")
    @classmethod
    def _in_order(cls, given: Range) -> Range:
        if not 0 < given[0] <= given[1]:
            raise ValueError("a range is two numbers above 0, the lesser first")
        return given

    def check(self, who: str, adapters: Mapping[str, Lora]) -> None:
        """Refuse branches that cannot be merged so, by the adapters that they will have."""
        check_places(who, adapters)
        ranks = {lora.rank for lora in adapters.values()}
        trims = [method for method in self.methods if space_of(method) == "factors"]
        if trims and len(ranks) > 1:
            raise ValueError(
                f"{who}: {trims[0]} works on the factors of branches of one rank, and these have "
                f"ranks {', '.join(map(str, sorted(ranks)))}; say methods: [linear]"
            )

    def check_blocks(self, who: str, layers: Iterable[str]) -> None:
        """Refuse more groups than blocks, up to the last that the branches adapt a layer of."""
        blocks = blocks_of(layers)
        if self.groups > blocks:
            raise RecipeError(
                f"{who}: groups is {self.groups}, and the branches adapt {blocks} blocks; at most "
                "one group each"
            )

    @model_validator(mode="after")
    def _known(self) -> "Calibrate":
        lookup(OBJECTIVES, self.objective, "calibration objective")
        for method in self.methods:
            groups = (1.0,) * self.groups if self.groups > 1 else None
            row = Merge(method=method, space=space_of(method), groups=groups).row
            few, most = row.models
            if few > 1 or most < 2:
                raise ValueError(
                    f"methods: {method} does not take one branch as well as two, and the lines of "
                    "a calibration lead from a branch to another or to the target"
                )
            if not row.grows:
                raise ValueError(
                    f"methods: {method} makes the same of one branch whatever its weight, so "
                    "nothing lies between that and the target, where lines of a calibration lead"
                )
        if not self.methods:
            raise ValueError("methods must name at least one")
        if self.density[1] > 1:
            raise ValueError("density is at most 1")
        return self
