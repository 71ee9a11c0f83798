"""Masks as a recipe gives them: which weights may move."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from expunge.config import Section


class Scored(Section):
    """The weights of the highest score, over the whole model."""

    kind: Literal["random", "magnitude", "gradient", "wanda"]
    """A name in MASKS."""

    ratio: float = Field(gt=0, le=1)
    """Share of the scored weights that may move."""


class Wagle(Section):
    """The weights that forgetting asks for and retaining does not."""

    kind: Literal["wagle"]
    """A name in MASKS."""

    ratio: float = Field(gt=0, le=1)
    """Share of the weights that may move; its authors take 0.95 on TOFU, 0.4 to 0.6 on WMDP."""

    mu: float = Field(default=1e-3, gt=0)
    """Curvature of the retain loss; the smaller, the more the retain gradient counts."""


class LastBlocks(Section):
    """The last blocks of the model."""

    kind: Literal["last_blocks"]
    """A name in MASKS."""

    count: int = Field(ge=1)
    """How many."""


class Layers(Section):
    """Parts of chosen blocks."""

    kind: Literal["layers"]
    """A name in MASKS."""

    blocks: tuple[int, ...] | None = None
    """Blocks, counted from 0; null means all."""

    modules: tuple[str, ...] | None = None
    """Names of modules in a block, such as mlp or down_proj; `*` stands for anything; null means
    all of the block."""

    @model_validator(mode="after")
    def _chooses(self) -> "Layers":
        if not self.blocks and not self.modules:
            raise ValueError("layers needs blocks, modules or both")
        return self


class Column(Section):
    """What one neuron writes: a column of a down-projection."""

    kind: Literal["column"]
    """A name in MASKS."""

    block: int = Field(ge=0)
    """The block, counted from 0."""

    index: int = Field(ge=0)
    """The neuron."""

    module: str = "down_proj"
    """Name of the linear layer."""


Mask = Annotated[
    Scored | Wagle | LastBlocks | Layers | Column,
    Field(discriminator="kind"),
]
"""One of the sections, told apart by `kind`."""
