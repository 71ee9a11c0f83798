"""Companions: what is made to go with the items of a half, and which of it a micro-batch reads.

Dimensions: F forget items, M companions of each, k of them read at a visit.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import Field, field_validator

from expunge.config import Section
from expunge.data.batches import TokenSequence
from expunge.data.refusals import read_refusals
from expunge.errors import DataError
from expunge.unlearn.schedule import MicroBatch
from expunge.unlearn.sets import SETS, Half, Side

Chosen = dict[Half, tuple[int, ...]]
"""A micro-batch: the indices of its items, by set; where they are pairs, of both of each."""


class Refusals(Section):
    """The set `refusal`: a forget prompt and a sentence that declines to answer."""

    file: str | None = None
    """A text file of sentences, one a line; null takes the project's own (data.refusals)."""

    count: int = Field(default=10, ge=1)
    """Sentences drawn for each item, as far as there are so many."""

    each: int = Field(default=1, ge=1)
    """How many of them are read at each visit of the item, in turn."""

    @field_validator("file")
    @classmethod
    def _readable(cls, file: str | None) -> str | None:
        try:
            read_refusals(file)
        except DataError as error:
            raise ValueError(str(error)) from None
        return file


class Alternates(Section):
    """The set `alternate`: a forget prompt and another answer, which the target itself wrote."""

    count: int = Field(default=5, ge=1)
    """Answers written for each item."""

    each: int = Field(default=1, ge=1)
    """How many of them are read at each visit of the item, in turn."""

    temperature: float = Field(default=1.0, gt=0)
    """Of the distribution that they are drawn from."""

    max_new_tokens: int = Field(default=200, ge=1)
    """Longest answer."""

    max_overlap: float = Field(default=0.8, gt=0, le=1)
    """Share of the true answer's words (ROUGE-L recall) from which an answer is thrown away."""

    attempts: int = Field(default=4, ge=1)
    """How often the model is asked for what is missing; then answers of other items stand in."""


class Paraphrases(Section):
    """The set `paraphrase`: a forget prompt and its answer, worded otherwise by a template."""

    count: int = Field(default=2, ge=1, le=6)
    """Templates for each item."""

    each: int = Field(default=2, ge=1)
    """How many of them are read at each visit of the item, in turn."""


class Mismatches(Section):
    """The set `mismatch`: a forget prompt and answers that belong to other items."""

    of: Literal["retain", "forget"] = "retain"
    """Whose answers: LLMU's are normal ones, SKU's those of other forget items."""

    count: int = Field(default=5, ge=1)
    """Answers drawn for each item, as far as there are so many."""

    each: int = Field(default=5, ge=1)
    """How many of them are read at each visit of the item, in turn."""


class RandomLabels(Section):
    """The set `random_label`: a forget item with random tokens for its answer's."""

    count: int = Field(default=1, ge=1)
    """Draws for each item."""

    each: int = Field(default=1, ge=1)
    """How many of them are read at each visit of the item, in turn."""


class Neutral(Section):
    """The set `neutral`: the texts of the recipe's data.neutral, in turn."""

    each: int = Field(default=1, ge=1)
    """How many are read beside each retain item."""


class Companions(Section):
    """How the sets beside forget and retain are made; one that no term reads is not made."""

    refusal: Refusals = Field(default_factory=Refusals)
    """Refusals; also the wanted half of `refusal_pair`."""

    alternate: Alternates = Field(default_factory=Alternates)
    """Alternates; also the wanted half of `alternate_pair`."""

    paraphrase: Paraphrases = Field(default_factory=Paraphrases)
    """Paraphrases."""

    mismatch: Mismatches = Field(default_factory=Mismatches)
    """Answers of other items."""

    random_label: RandomLabels = Field(default_factory=RandomLabels)
    """Random answers."""

    neutral: Neutral = Field(default_factory=Neutral)
    """Neutral texts."""

    seed: int = 42
    """Seeds every draw; the same for all seeds of the branch."""

    def each(self, half: Half) -> int:
        """Companions read at a visit."""
        return getattr(self, half.removesuffix("_pair")).each


@dataclass(frozen=True)
class CompanionSet:
    """The sequences of one set, and which of them go with which item."""

    sequences: Sequence[TokenSequence]
    of: Sequence[Sequence[tuple[int, ...]]]
    """Of each forget item its companions in turn (F, M), each the sequences that make it up."""
    each: int = 1
    common: bool = False
    """Goes with no item in particular, so that `of` has one row, read from turn to turn."""

    @property
    def key(self) -> str:
        """Stands for the tokens and for what of them is scored."""
        content = [(sequence.tokens, sequence.answer_start) for sequence in self.sequences]
        return hashlib.sha256(repr(content).encode()).hexdigest()[:12]

    def at(self, item: int, visit: int) -> tuple[int, ...]:
        """The sequences read when an item is visited for the (visit + 1)th time."""
        mine = self.of[item]
        turns = range(min(self.each, len(mine)))
        return tuple(i for k in turns for i in mine[(visit * self.each + k) % len(mine)])

    def only(self, items: Sequence[int], turns: int) -> "CompanionSet":
        """The companions of some items alone, as a set of its own; an item may come twice.

        Of a set that goes with no item: what is read in so many turns.
        """
        if self.common:
            chosen = [self.of[0][: turns * self.each]]
        else:
            chosen = [self.of[item] for item in items]
        flat = [i for mine in chosen for companion in mine for i in companion]
        place = iter(range(len(flat)))
        of = [[tuple(next(place) for _ in one) for one in mine] for mine in chosen]
        numbered = [replace(self.sequences[i], id=str(place)) for place, i in enumerate(flat)]
        return replace(self, sequences=numbered, of=of)


def with_companions(
    steps: Sequence[Sequence[MicroBatch]], companions: Mapping[Half, CompanionSet]
) -> list[list[Chosen]]:
    """Every micro-batch of a schedule with the companions of its items.

    Visit v of a forget item, from 0, reads its companions v·k … v·k+k-1, modulo M; a common set
    goes round beside the retain items (beside the forget items, where there are none).
    """
    visits: Counter[int] = Counter()
    beside = 0
    found = []
    for step in steps:
        found.append([])
        for batch in step:
            chosen: Chosen = dict(batch.of("forget", "retain"))
            places = [(item, _visit(visits, item)) for item in batch.forget]
            for half, own in companions.items():
                if own.common:
                    turns = range(beside, beside + len(batch.retain or batch.forget))
                    chosen[half] = tuple(i for turn in turns for i in own.at(0, turn))
                else:
                    chosen[half] = tuple(i for place in places for i in own.at(*place))
            beside += len(batch.retain or batch.forget)
            found[-1].append(chosen)
    return found


def on_sides(batch: Chosen, sides: Iterable[Side]) -> Chosen:
    """The sets of a micro-batch that a step rule means by `forget` and `retain`."""
    asked = set(sides)
    return {half: items for half, items in batch.items() if SETS[half].side in asked}


def _visit(visits: Counter[int], item: int) -> int:
    """How often the item came before."""
    visits[item] += 1
    return visits[item] - 1
