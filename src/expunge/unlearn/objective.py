"""Objectives: a weighted sum of loss terms, each on one set of the data and over one scope.

Shapes: B sequences of a micro-batch, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from pydantic import Field, model_validator
from torch import Tensor

from expunge.config import Section
from expunge.data.batches import Scope
from expunge.data.examples import Items
from expunge.errors import RecipeError
from expunge.registry import lookup
from expunge.scores import Scores
from expunge.unlearn.losses import Hidden, Loss
from expunge.unlearn.reference import Asked
from expunge.unlearn.sets import SETS, Half
from expunge.unlearn.weighting import Weighting

if TYPE_CHECKING:
    from transformers import PretrainedConfig


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

    layer: int | None = Field(default=None, ge=0)
    """The block, counted from 0, whose output a loss on hidden states reads."""

    items: Items = Field(default="all", exclude_if=lambda items: items == "all")
    """`questions` reads questions alone (ids that end in qa and a number), `texts` the others, of
    companions those of such items. In a mean over items or pairs one that is not read counts with a
    loss of 0; a mean over tokens is of the tokens that are read."""

    skip_first: int | None = Field(default=None, ge=0)
    """Scored tokens at the start of each item to leave out; null as the loss's source has it."""

    weighting: Weighting | None = None
    """Which tokens it acts on, and how much; null weighs all alike."""

    options: dict[str, float] = Field(default_factory=dict)
    """The loss's own hyperparameters, such as beta."""

    @model_validator(mode="after")
    def _known(self) -> Term:
        try:
            row = self.row
        except RecipeError as error:
            raise ValueError(str(error)) from None
        for name in self.options:
            if name not in row.options:
                known = ", ".join(row.options) or "none"
                raise ValueError(f"{self.loss} has no option '{name}'. Its options: {known}")
            value = self.options[name]
            if name in row.positive and value <= 0:
                raise ValueError(f"{self.loss} needs {name} above 0 (got {value:g})")
            if name in row.nonnegative and value < 0:
                raise ValueError(f"{self.loss} needs {name} of at least 0 (got {value:g})")
        if (row.reads == "hidden") != (self.layer is not None):
            says = "needs layer, the number of a block" if self.layer is None else "takes no layer"
            raise ValueError(f"{self.loss} {says}")
        if self.half != "forget" and self.needs_level:
            raise ValueError(f"only the items of forget have levels, not those of {self.half}")
        return self

    @property
    def row(self) -> Loss:
        """The row of the loss table."""
        return lookup(SETS[self.half].losses, self.loss, f"{self.half} loss")

    @property
    def skips(self) -> int:
        """Scored tokens that it leaves out at the start of each item."""
        return self.row.skip_first if self.skip_first is None else self.skip_first

    @property
    def needs_reference(self) -> bool:
        """Whether it reads the reference's log-probs, itself or for its weights."""
        reads = self.weighting is not None and self.weighting.row.reads != "text"
        return self.row.needs_reference or reads

    @property
    def needs_level(self) -> bool:
        """Whether it reads the level of each item, itself or for its weights."""
        return bool(self.row.needs_level) or self.weighs_by_level

    @property
    def weighs_by_level(self) -> bool:
        """Whether its weights read the level of each token."""
        return self.weighting is not None and self.weighting.row.reads == "levels"


def check_model(terms: Iterable[Term], config: PretrainedConfig) -> None:
    """Refuse terms that read a block which a model of this config does not have."""
    count = config.get_text_config().num_hidden_layers
    for term in terms:
        if term.layer is not None and term.layer >= count:
            raise RecipeError(
                f"{term.half} {term.loss} reads layer {term.layer}, but the model has {count} "
                f"blocks: 0 to {count - 1}"
            )


class Objective:
    """The terms of a recipe, asked half by half; a term's number is its place in the recipe."""

    def __init__(self, terms: tuple[Term, ...]) -> None:
        self.terms = terms

    def on(self, half: Half) -> tuple[Term, ...]:
        """The terms that read one set."""
        return tuple(term for term in self.terms if term.half == half)

    def numbered(self, half: Half) -> list[tuple[int, Term]]:
        """The terms that read one half, each with its number."""
        return [(number, term) for number, term in enumerate(self.terms) if term.half == half]

    def number(self, term: Term) -> int:
        """The number of a term, by which its own readings are named."""
        return next(number for number, other in enumerate(self.terms) if other is term)

    def name(self, number: int) -> str:
        """What a term is called in the log: half.loss, and which one where there are several."""
        half, loss = self.terms[number].half, self.terms[number].loss
        alike = [n for n, term in self.numbered(half) if term.loss == loss]
        place = alike.index(number)
        return f"{half}.{loss}" + (f".{place + 1}" if place else "")

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
        return any(term.needs_reference for term in self.on(half))

    def needs_kl(self, half: Half) -> bool:
        """Whether a term of this half reads the KL to the reference."""
        return any(term.row.needs_kl for term in self.on(half))

    def needs_level(self, half: Half) -> bool:
        """Whether a term of this half reads the level of each item."""
        return any(term.needs_level for term in self.on(half))

    def needs_standardized(self, half: Half) -> bool:
        """Whether a term of this half reads standardised log-probs."""
        return any(term.row.needs_standardized for term in self.on(half))

    def asks(self, half: Half) -> Asked:
        """What the terms of this half read of the reference."""
        rows = [(term.row, term.layer) for term in self.on(half)]

        def layers(what: str) -> tuple[int, ...]:
            wanted = {layer for row, layer in rows if row.needs_reference_hidden == what}
            return tuple(sorted(layer for layer in wanted if layer is not None))

        return Asked(
            logps=self.needs_reference(half),
            kl=self.needs_kl(half),
            states=any(row.needs_reference_states for row, _ in rows),
            hidden=layers("states"),
            norms=layers("norms"),
        )

    def reads(self, half: Half, what: str) -> bool:
        """Whether a term of this half reads `scores`, `logits` or `hidden` states."""
        return any(term.row.reads == what for term in self.on(half))

    def layers(self, half: Half) -> set[int]:
        """The blocks whose outputs terms of this half read."""
        return {term.layer for term in self.on(half) if term.layer is not None}

    @property
    def deepest(self) -> int | None:
        """The deepest block that is read, where nothing behind it is; else None."""
        layers = [term.layer for term in self.terms]
        known = [layer for layer in layers if layer is not None]
        return max(known, default=None) if len(known) == len(layers) else None

    def loss(
        self,
        half: Half,
        current: Scores,
        reference: Scores | None,
        in_answer: Tensor,
        share: Callable[[Term], float] = lambda term: 1.0,
        norms: Mapping[int, float] | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum over one half of a micro-batch, and each term unweighted.

        `in_answer` (N,) marks the scored tokens that belong to answers. Where they are only a part
        of the micro-batch, `share` is each term's share of what it is a mean over. `norms` are the
        mean lengths of reference states, by the number of the term that reads them.
        """
        total = current.token_logps.new_zeros(())
        parts = {}
        for number, term in self.numbered(half):
            narrow = term.scope == "answer" and self.scope(half) == "document"
            now = current.where(in_answer) if narrow else current
            then = reference.where(in_answer) if narrow and reference is not None else reference
            weights = now.more.get(column("weights", number))
            now = now.weighted(weights)
            then = then and then.weighted(weights)
            norm = (norms or {}).get(number, 1.0)
            losses = _losses(number, term, now, then, norm)
            if weights is not None:
                losses = _where_weighed(losses, now)
            value = losses.mean() * share(term)
            parts[self.name(number)] = float(value.detach())
            total = total + term.weight * value
        return total, parts


def column(what: str, number: int) -> str:
    """The name in `Scores.more` of a term's weights or losses, or of a block's states."""
    return f"{what}.{number}"


def _losses(number: int, term: Term, now: Scores, then: Scores | None, norm: float) -> Tensor:
    """Losses of a term, whose mean is the micro-batch's: (B,) or (1,)."""
    row = term.row
    if row.reads == "scores":
        return row(now, then, **term.options)
    if row.reads == "logits":
        losses = now.more[column("losses", number)]
    else:
        assert term.layer is not None
        name = column("states", term.layer)
        old = then.more.get(name) if then is not None else None
        losses = row.fn(Hidden(now.more[name], old, norm), **term.options)
    return now.mean(losses)[None] if row.mean_over == "tokens" else now.mean_by_sequence(losses)


def _where_weighed(losses: Tensor, now: Scores) -> Tensor:
    """The losses of items or pairs, 0 where no token weighs anything."""
    weighs = now.lengths > 0
    if 2 * len(losses) == len(weighs):
        weighs = weighs[0::2] | weighs[1::2]
    elif len(losses) != len(weighs):
        weighs = weighs.any()[None]
    return losses.where(weighs, 0.0)
