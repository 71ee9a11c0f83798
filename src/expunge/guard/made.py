"""guard.json: all that a guard needs beside the model, as data that is checked when read."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from expunge import runs
from expunge.config import Section, parse_section
from expunge.errors import RecipeError
from expunge.guard.contrast import Contrast
from expunge.guard.corrupt import Corruption
from expunge.guard.filters import REFUSAL, Outputs
from expunge.guard.helpers import HelperSpec
from expunge.guard.prompting import Before
from expunge.guard.scope import Scope

FILE = "guard.json"


class Made(Section):
    """What a guard does, step by step; whatever is null it does not do."""

    format: Literal[1]
    """Of this file."""

    kind: str
    """A name in guard.methods.GUARDS."""

    options: dict[str, Any] = Field(default_factory=dict)
    """What it was made with, for the record."""

    before: Before | None = None
    """Put before every prompt."""

    scope: Scope | None = None
    """What is to be forgotten; a prompt that is in scope is refused, or corrupted."""

    outputs: Outputs | None = None
    """Answers that give it away are replaced."""

    refusal: str = Field(default=REFUSAL, min_length=1)
    """Said in place of an answer."""

    contrast: Contrast | None = None
    """How logits are changed."""

    helpers: tuple[HelperSpec, ...] = ()
    """The models whose logits are joined."""

    corruption: Corruption | None = None
    """How the embeddings of a prompt in scope are changed."""

    @model_validator(mode="after")
    def _whole(self) -> "Made":
        asked = 0 if self.contrast is None else len(self.contrast.weights)
        if len(self.helpers) != asked:
            raise ValueError(f"{asked} weights, but {len(self.helpers)} helpers")
        if self.scope is None and (self.corruption or self.outputs):
            raise ValueError("outputs and corruption need a scope")
        if not (self.before or self.scope or self.contrast):
            raise ValueError("it does nothing")
        if self.contrast is not None and self.corruption is not None:
            raise ValueError("contrast and corruption do not go together")
        return self

    @property
    def refuses_prompts(self) -> bool:
        """Whether a prompt in scope is refused."""
        return self.scope is not None and self.outputs is None and self.corruption is None


def write_guard(made: Made, folder: Path) -> None:
    """Write guard.json, whole or not at all."""
    runs.make_folder(folder)
    runs.write_json(
        folder / FILE,
        made.model_dump(mode="json", exclude_defaults=True)
        | {"format": made.format, "kind": made.kind},
    )


def read_guard(folder: Path) -> Made:
    """Read and check a guard.json; whatever is wrong with it is one `RecipeError`."""
    path = folder / FILE
    if not path.is_file():
        raise RecipeError(f"{folder} holds no {FILE}, so it is not a guard's folder")
    try:
        content = runs.read_json(path)
    except RecursionError:
        raise RecipeError(f"{path} is nested too deep to be a guard's") from None
    return parse_section(content, Made, origin=str(path))
