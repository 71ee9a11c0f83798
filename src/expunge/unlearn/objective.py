"""Objectives: a weighted sum of loss terms, each on one set of the data and over one scope.

Shapes: B sequences of a micro-batch.
"""

from collections.abc import Callable, Mapping

from pydantic import Field, model_validator
from torch import Tensor

from expunge.config import Section
from expunge.data.batches import Scope
from expunge.errors import RecipeError
from expunge.registry import lookup
from expunge.scores import Scores
from expunge.unlearn.losses import Loss
from expunge.unlearn.sets import SETS, Half


class Term(Section):
    """One weighted loss."""

    half: Half
    """The set it reads: forget, retain, or what is made to go with their items (`companions`)."""

    loss: str
    """A name in a loss table, among those that make sense on the set."""

    weight: float = Field(default=1.0, gt=0)
    """Its factor in the sum."""

    scope: Scope = "answer"
    """`answer` scores the answer and EOS; `document` scores the prompt too."""

    options: dict[str, float] = Field(default_factory=dict)
    """The loss's own hyperparameters, such as beta."""

    @model_validator(mode="after")
    def _known(self) -> "Term":
        try:
            row = self.row
        except RecipeError as error:
            raise ValueError(str(error)) from None
        for name in self.options:
            if name not in row.options:
                known = ", ".join(row.options) or "none"
                raise ValueError(f"{self.loss} has no option '{name}'. Its options: {known}")
        return self

    @property
    def row(self) -> Loss:
        """The row of the loss table."""
        return lookup(SETS[self.half].losses, self.loss, f"{self.half} loss")


class Objective:
    """The terms of a recipe, asked set by set."""

    def __init__(self, terms: tuple[Term, ...]) -> None:
        self.terms = terms

    def on(self, half: Half) -> tuple[Term, ...]:
        """The terms that read one set."""
        return tuple(term for term in self.terms if term.half == half)

    @property
    def halves(self) -> tuple[Half, ...]:
        """The sets that a term reads, in the order of SETS."""
        return tuple(half for half in SETS if self.on(half))

    def read(self, batch: Mapping[Half, tuple[int, ...]]) -> dict[Half, tuple[int, ...]]:
        """Of a micro-batch the sets that a term reads."""
        return {half: items for half, items in batch.items() if items and self.on(half)}

    def scope(self, half: Half) -> Scope:
        """The widest scope that a term of this half reads."""
        return "document" if any(t.scope == "document" for t in self.on(half)) else "answer"

    def divisible(self, half: Half) -> bool:
        """Whether the loss of a micro-batch is the sum of shares of its items."""
        return all(term.row.mean_over != "micro-batch" for term in self.on(half))

    def needs_reference(self, half: Half) -> bool:
        """Whether a term of this half reads the reference's log-probs."""
        return any(term.row.needs_reference for term in self.on(half))

    def needs_kl(self, half: Half) -> bool:
        """Whether a term of this half reads the KL to the reference."""
        return any(term.row.needs_kl for term in self.on(half))

    def loss(
        self,
        half: Half,
        current: Scores,
        reference: Scores | None,
        in_answer: Tensor,
        share: Callable[[Term], float] = lambda term: 1.0,
    ) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum over one half of a micro-batch, and each term unweighted.

        `in_answer` (N,) marks the scored tokens that belong to answers. Where they are only a part
        of the micro-batch, `share` is each term's share of what it is a mean over.
        """
        total = current.token_logps.new_zeros(())
        parts = {}
        for term in self.on(half):
            narrow = term.scope == "answer" and self.scope(half) == "document"
            now = current.where(in_answer) if narrow else current
            then = reference.where(in_answer) if narrow and reference is not None else reference
            value = term.row(now, then, **term.options).mean() * share(term)
            parts[f"{half}.{term.loss}"] = float(value.detach())
            total = total + term.weight * value
        return total, parts
