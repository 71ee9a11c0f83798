"""The guards of a recipe: one section for each kind."""

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from expunge.config import Section
from expunge.guard.filters import REFUSAL
from expunge.guard.prompting import INSTRUCTION, Style
from expunge.guard.scope import Matching


class _Guard(Section):
    """What all kinds have."""

    of: str = "target"
    """The model of the results that stands behind it."""

    @property
    def helpers(self) -> dict[str, str]:
        """The models that it listens to, by role."""
        return {}

    @property
    def retain_readers(self) -> tuple[str, ...]:
        """What of it reads retain items, as a recipe names it."""
        match = getattr(self, "match", None)
        return match.retain_readers if isinstance(match, Matching) else ()

    def check(self, who: str, adapters: Mapping[str, bool], cut: Collection[str]) -> None:
        """Refuse, with a ValueError, models that it cannot join: `adapters` says of each whether it
        is an adapter on the target, and `cut` are branches of the target's first blocks."""


class Prefix(_Guard):
    """An instruction before every prompt."""

    kind: Literal["prefix"]
    """`prefix`."""

    text: str = Field(default=INSTRUCTION, min_length=1)
    """The instruction."""

    subject: str | None = Field(default=None, min_length=1)
    """Tell the model that it has unlearned this, as RWKU's ICU does, in place of `text`."""

    style: Style = "auto"
    """`chat`: as the system message; `plain`: right before the prompt; `auto`: by the tokenizer."""

    @model_validator(mode="after")
    def _one_text(self) -> "Prefix":
        if self.subject is not None and "text" in self.model_fields_set:
            raise ValueError("give text or subject, not both")
        return self


class InputFilter(_Guard):
    """Prompts in scope are refused."""

    kind: Literal["input_filter"]
    """`input_filter`."""

    match: Matching = Field(default_factory=Matching)
    """What is in scope."""

    refusal: str = Field(default=REFUSAL, min_length=1)
    """What is said instead."""


class OutputFilter(_Guard):
    """Answers that give the forget set away are replaced."""

    kind: Literal["output_filter"]
    """`output_filter`."""

    match: Matching = Field(default_factory=Matching)
    """What makes a short answer a leak: its prompt, or it, is in scope."""

    ngram: int = Field(default=3, ge=1)
    """Words of a run that counts as common; shorter answers leak only in scope."""

    overlap: float = Field(default=0.5, gt=0, le=1)
    """Share of a forget answer's runs of words that an answer may not reach."""

    pii: bool = True
    """Look for the forget set's personal data, however it is written."""

    refusal: str = Field(default=REFUSAL, min_length=1)
    """What is said instead."""


class Icul(_Guard):
    """Examples with wrong answers before every prompt."""

    kind: Literal["icul"]
    """`icul`."""

    items: int = Field(default=4, ge=1)
    """K, forget items with another's answer."""

    correct: int = Field(default=4, ge=0)
    """L, retain items with their own."""

    seed: int = Field(default=0, ge=0)
    """Draws items and answers."""

    @property
    def retain_readers(self) -> tuple[str, ...]:
        """The examples with right answers."""
        return (".correct",) if self.correct else ()


class Uld(_Guard):
    """The logits of an assistant are taken away."""

    kind: Literal["uld"]
    """`uld`."""

    assistant: str
    """The branch, or the adapter or model folder, that remembers the forget set."""

    weight: float = Field(default=-0.8)
    """w; below 0 takes away."""

    tau: float | None = Field(default=0.01, gt=0, le=1)
    """τ of the filter; null takes away everywhere."""

    blocks: int | None = Field(default=None, ge=1)
    """The first blocks that the assistant's adapter lies on; null: what its branch says, or all."""

    @property
    def helpers(self) -> dict[str, str]:
        """The assistant."""
        return {"assistant": self.assistant}

    def check(self, who: str, adapters: Mapping[str, bool], cut: Collection[str]) -> None:
        """`blocks` are the first of `of`, which the assistant must be or be an adapter on."""
        itself = self.of == self.assistant and not adapters.get(self.of)
        if self.blocks is None or itself:
            return
        if self.assistant in cut:
            raise ValueError(
                f"{who}: the branch '{self.assistant}' says its blocks itself; leave blocks out"
            )
        if self.of != "target" or not adapters.get(self.assistant):
            raise ValueError(
                f"{who}: blocks are the first of the target, so that of must be target and the "
                f"assistant an adapter on it; leave blocks out, or choose others than "
                f"'{self.of}' and '{self.assistant}'"
            )


class Offset(_Guard):
    """The difference of two helpers is added."""

    kind: Literal["offset"]
    """`offset`."""

    new: str
    """The helper that has unlearned."""

    old: str
    """The same helper before."""

    weight: float = Field(default=1.0)
    """w."""

    @property
    def helpers(self) -> dict[str, str]:
        """Both."""
        return {"new": self.new, "old": self.old}


class Whp(_Guard):
    """What a reinforced model says more of is lowered."""

    kind: Literal["whp"]
    """`whp`."""

    reinforced: str
    """The helper that learned the content even better."""

    alpha: float = Field(default=5.0, gt=0)
    """α."""

    @property
    def helpers(self) -> dict[str, str]:
        """The reinforced model."""
        return {"reinforced": self.reinforced}


class AnyContrast(_Guard):
    """The logits of any helpers are added, weighted."""

    kind: Literal["contrast"]
    """`contrast`."""

    weights: dict[str, float] = Field(min_length=1)
    """w_k by helper."""

    tau: float | None = Field(default=None, gt=0, le=1)
    """τ of the filter; null joins everywhere."""

    @property
    def helpers(self) -> dict[str, str]:
        """All, each by its own name."""
        return {name: name for name in self.weights}


class Eco(_Guard):
    """The embeddings of prompts in scope are corrupted."""

    kind: Literal["eco"]
    """`eco`."""

    match: Matching = Field(default_factory=Matching)
    """What is in scope."""

    strength: float | None = Field(default=None, gt=0)
    """σ, in root mean squares of an embedding's entries; null searches for it."""

    target: float = Field(default=3.0, gt=0)
    """The search: mean NLL a token that forget answers shall have."""

    search_items: int = Field(default=16, ge=1)
    """The search: forget items it measures."""

    search_steps: int = Field(default=8, ge=1)
    """The search: how often it measures them."""

    seed: int = Field(default=0, ge=0)
    """Seeds the noise, and draws the items."""


GuardSection = Annotated[
    Prefix | InputFilter | OutputFilter | Icul | Uld | Offset | Whp | AnyContrast | Eco,
    Field(discriminator="kind"),
]


def options_of(section: Any) -> dict[str, Any]:
    """What a guard was made with, as guard.json keeps it."""
    return section.model_dump(mode="json", exclude={"kind", "of"})
