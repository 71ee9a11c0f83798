"""What a method takes beside the model that it changes: data, other models, access."""

from dataclasses import dataclass
from typing import Literal

Access = Literal["text", "embeddings", "logits", "weights"]
"""To the model: `text`: prompts and answers, as an API gives them; `embeddings`, `logits`: its
forward pass in transformers; `weights`: to change them."""


@dataclass(frozen=True)
class Needs:
    """What a method takes, each by itself, so that a reader can ask what there is for them."""

    data: tuple[str, ...] = ()
    """Sets of the recipe: forget, retain, neutral; or LEVELS."""

    models: tuple[str, ...] = ()
    """Other models and adapters, in words."""

    access: Access | None = "weights"
    """The least access to the model; None where none is asked, as for metrics."""

    besides: tuple[str, ...] = ()
    """What the program reads or makes by itself, and what a recipe must say, in words."""

    def __str__(self) -> str:
        """As tables and `expunge methods` say it."""
        named = {"data": self.data, "models": self.models, "access": (self.access or "",)}
        said = [f"{what}: {', '.join(given)}" for what, given in named.items() if any(given)]
        return "; ".join((*said, *self.besides))


FORGET = Needs(("forget",))
BOTH = Needs(("forget", "retain"))
LEVELS = "unseen texts or a model that has not learnt the items (levels.of)"
UNLEARNT = "one that has not learnt the items (levels.of)"
