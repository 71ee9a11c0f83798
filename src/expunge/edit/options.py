"""The options of each edit: what there is, what it may be, what it defaults to."""

from typing import Literal

from pydantic import Field, model_validator

from expunge.config import Section


class NoOptions(Section):
    """Of an edit without options."""


class Scale(Section):
    """How far an update is taken."""

    scale: float = Field(default=1.0)
    """α or λ, what the update is multiplied by."""


class Weighted(Section):
    """How much of each model is taken."""

    weights: tuple[float, ...] | None = Field(default=None, min_length=1)
    """One for each model, `of` first; null means 1 each."""


class Repair(Section):
    """How an update is bent away from the retain set."""

    strength: float = Field(default=1.0, ge=0)
    """μ: how much a change on retain inputs costs against a change of the update."""

    rank: int = Field(default=256, ge=1)
    """Eigenvectors of the inputs' second moment that are kept for each layer."""

    items: int = Field(default=64, ge=1)
    """Retain items that are read, evenly spread over the set."""

    relative: bool = True
    """Divide each layer's second moment by its mean eigenvalue."""


class Prune(Section):
    """Which units are deleted, and in how many steps."""

    importance: Literal["mean", "freq", "rms", "std"] = "mean"
    """Of activations: mean magnitude, share above 0, root mean square, standard deviation."""

    mlp: float = Field(default=0.02, ge=0, lt=1)
    """Share of all MLP units that each step deletes."""

    attention: float = Field(default=0.0, ge=0, lt=1)
    """Share of all attention units (before the output projection) that each step deletes."""

    steps: int = Field(default=1, ge=1)
    """Steps, each looking at the model as the last one left it."""

    epsilon: float | None = Field(default=None, gt=0)
    """ε, so that a unit that never fires for the retain set is not infinitely good; null means
    1e-3 for freq and 1e-5 for the others."""

    @model_validator(mode="after")
    def _something(self) -> "Prune":
        if not (self.mlp or self.attention):
            raise ValueError("mlp and attention are both 0, so nothing would be pruned")
        if self.steps * max(self.mlp, self.attention) >= 1:
            raise ValueError("so many steps of that share would prune every unit")
        return self


class Search(Section):
    """Which value vectors are edited."""

    layer: int | None = Field(default=None, ge=0)
    """Number of the block; null looks for the vectors of each forget document."""

    column: int | None = Field(default=None, ge=0)
    """Column of its down projection."""

    vectors: int = Field(default=1, ge=1)
    """Vectors looked for, for each forget document."""

    concept_tokens: int = Field(default=16, ge=1)
    """Tokens of a document's answers that stand for it."""

    @model_validator(mode="after")
    def _place(self) -> "Search":
        if (self.layer is None) != (self.column is None):
            raise ValueError("give layer and column, or neither to look for the vectors")
        return self


class Needle(Search):
    """Which value vectors are blurred, and how much."""

    sigma: float = Field(default=0.1, gt=0)
    """Standard deviation of the noise, in the units of the weights."""


class Ranks(Section):
    """How far down target tokens are moved, and where."""

    targets: int = Field(default=2, ge=1)
    """Target tokens of each forget answer: its rarest, which are those of highest id."""

    margin: float = Field(default=0.08, gt=0, lt=1)
    """Rank, as a share of the vocabulary, that a target must be beyond."""

    depth: float = Field(default=0.7, gt=0, lt=1)
    """Rank, as a share of the vocabulary, to which it falls in an edited vector."""

    candidates: int = Field(default=100, ge=1)
    """Most active vectors of a block that may be edited for one target."""

    rounds: int = Field(default=100, ge=1)
    """Tries for one target in one block, each with more vectors or further down."""

    items: int | None = Field(default=None, ge=1)
    """Forget items whose answers are taken; null means all."""

    @model_validator(mode="after")
    def _deeper(self) -> "Ranks":
        if self.depth < self.margin:
            raise ValueError(
                "depth must be at least margin, or vectors would go on writing what must fall"
            )
        return self
